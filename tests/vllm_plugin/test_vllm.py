"""vLLM with the plugin computes what fewbit computes: logits, generated tokens, over HTTP, and in two processes.

Runs where vLLM is installed, that is in an environment of its own:

    python -m venv V && V/bin/pip install '.[vllm]' pytest openai && V/bin/python -m pytest tests/vllm_plugin -m slow
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cells
import prepare
import pytest
import torch

import fewbit
import fewbit.errors
from models import tiny_model, tiny_tokenizer
from moe_models import MOE_SHAPES

# vLLM takes these from the environment only: the engine in this process, a small cache.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise each process wants a NUMA node to itself
}
vllm = pytest.importorskip("vllm", reason="needs vLLM: pip install '.[vllm]' in an environment of its own")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not prepare.MODEL.exists(), reason="needs SmolLM2: python benchmarks/prepare.py"),
]

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a",
    "Water boils at one hundred degrees because",
)
NEW_TOKENS = 16
SETTINGS: dict[str, dict[str, Any]] = {
    "4 bits": {"bits": 4},
    "3 bits": {"bits": 3},
    "2 bits, asymmetric, v2": {"bits": 2, "sym": False, "format": "gptq_v2"},
    "2 bits, asymmetric, v1": {"bits": 2, "sym": False},
    "8 bits": {"bits": 8},
    "act-order": {"bits": 4, "act_order": "full"},
    "unequal q, k, v": {
        "override": {r"q_proj$": {"bits": 8}, r"k_proj$": {"group_size": 32}, r"up_proj$": {"bits": 3}}
    },
    "unquantized k_proj": {"ignore": (r"k_proj$", r"layers\.0\.")},
    "quantized lm_head": {"lm_head": True},
}


@pytest.fixture(scope="module", params=SETTINGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with some settings."""
    folder = tmp_path_factory.mktemp("checkpoint") / "out"
    settings = {"group_size": 64, "fast": True, "num_samples": 4, "seq_len": 128, **SETTINGS[request.param]}
    text = (prepare.DATA / "wiki.train.txt").read_text()[:20_000]
    config = fewbit.QuantConfig(**settings)
    fewbit.quantize(prepare.MODEL, config, dataset=[text], output=folder, device="cpu")
    return folder


def engine(folder: Path, dtype: str = "float32", **options: Any) -> Any:
    """vLLM's engine; it must be fewbit that multiplies."""
    settings = {"enforce_eager": True, "max_model_len": 128, "max_num_seqs": 4, "max_logprobs": -1}
    found = vllm.LLM(str(folder), dtype=dtype, **{**settings, **options})
    assert found.llm_engine.model_config.quantization == "fewbit"
    return found


@pytest.fixture
def stopped() -> Iterator[None]:
    """Ends what an engine leaves behind, so that the next one can start."""
    yield
    vllm.distributed.cleanup_dist_env_and_memory()


def log_probabilities(llm: Any, tokens: list[int]) -> torch.Tensor:
    """(tokens − 1, vocabulary): row i is what precedes token i + 1."""
    every = vllm.SamplingParams(max_tokens=1, prompt_logprobs=-1, detokenize=False)
    prompt = vllm.TokensPrompt(prompt_token_ids=tokens)
    rows = llm.generate(prompt, every, use_tqdm=False)[0].prompt_logprobs[1:]
    return torch.tensor([[row[token].logprob for token in range(len(row))] for row in rows])


def generated(llm: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Greedily, all prompts at once."""
    greedy = vllm.SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    given = [vllm.TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    return [list(found.outputs[0].token_ids) for found in llm.generate(given, greedy, use_tqdm=False)]


def own_tokens(model: Any, prompt: list[int]) -> list[int]:
    """What transformers generates with fewbit's layers; no token that the model can choose ends it."""
    ids = torch.tensor([prompt])
    result = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False,
        eos_token_id=model.config.vocab_size, pad_token_id=0,
    )  # fmt: skip
    return result[0, len(prompt) :].tolist()


@pytest.mark.usefixtures("stopped")
def test_logits_and_tokens_are_fewbits_own(checkpoint: Path) -> None:
    own = fewbit.load(checkpoint, device="cpu", dtype="float32", fuse=False, lm_head_runtime=16)
    llm = engine(checkpoint)
    prompts = [llm.get_tokenizer().encode(prompt) for prompt in PROMPTS]
    for prompt in prompts:
        with torch.no_grad():
            expected = own(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
        found = log_probabilities(llm, prompt)
        assert (found - expected).abs().max() < 1e-2
        assert (expected.exp() * (expected - found)).sum(-1).mean().abs() < 1e-6
    assert generated(llm, prompts) == [own_tokens(own, prompt) for prompt in prompts]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with random weights, whose heads two processes can share; act-order, asymmetric, 3 bits."""
    folder = tmp_path_factory.mktemp("small")
    cells.write_model(folder / "model")
    others = (("override", {r"down_proj$": {"bits": 2}, r"v_proj$": {"bits": 8}}),)
    cell = cells.Cell(bits=3, group_size=32, sym=False, act_order="full", others=others)
    cells.write_checkpoint(folder / "model", cell, folder / "out")
    return folder / "out"


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_compiled_models_round_only_activations(small: Path, dtype: str) -> None:
    found = log_probabilities(engine(small, dtype, enforce_eager=False), cells.tokens())
    expected = cells.expected(small)[: len(found)]
    assert (found - expected).abs().max() < {"float16": 0.1, "bfloat16": 0.5}[dtype]
    assert (expected.exp() * (expected - found)).sum(-1).mean() < {"float16": 1e-4, "bfloat16": 5e-3}[dtype]


@pytest.mark.usefixtures("stopped")
def test_two_processes_share_the_layers(small: Path) -> None:
    found = log_probabilities(engine(small, tensor_parallel_size=2), cells.tokens())
    expected = cells.expected(small)[: len(found)]
    assert (found - expected).abs().max() < 2e-3


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts(family: str, processes: int, tmp_path: Path) -> None:
    wide = {"hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 96, "head_dim": 32}
    model = tiny_model(family, **{**MOE_SHAPES[family], **wide})
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    config = fewbit.QuantConfig(
        bits=4, group_size=32, sym=False, fast=True, override={r"experts\.1\.(up|w3)": {"bits": 8}}
    )
    batches = [{"input_ids": torch.arange(start, start + 60).unsqueeze(0)} for start in range(3, 60, 7)]
    fewbit.quantize(tmp_path / "model", config, dataset=batches, output=tmp_path / "out", device="cpu")
    tokens = list(range(3, 35))
    own = fewbit.load(tmp_path / "out", device="cpu", dtype="float32", kernel="reference")
    with torch.no_grad():
        expected = own(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    found = log_probabilities(engine(tmp_path / "out", tensor_parallel_size=processes), tokens)
    assert (found - expected).abs().max() < 2e-3


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture
def served(small: Path, tmp_path: Path) -> Iterator[str]:
    """The address of vLLM's server. (The command ``vllm`` of vllm-cpu 0.32.0 looks for a package called vllm.)"""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_ENABLE")}
    with open(tmp_path / "server.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(small), "--port", str(port),
             "--served-model-name", "small", "--enforce-eager", "--max-model-len", "128", "--dtype", "float32"],
            stdout=log, stderr=log, env=environment,
        )  # fmt: skip
        try:
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait(60)


def test_the_server_answers_the_openai_client(served: str, small: Path) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=served, api_key="none")
    wait_until_ready(client, openai.APIConnectionError)
    tokens = cells.tokens()
    stream = client.completions.create(
        model="small", prompt=tokens, max_tokens=NEW_TOKENS, temperature=0, stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )  # fmt: skip
    found = [token for chunk in stream for token in chunk.choices[0].token_ids or ()]
    own = fewbit.load(small, device="cpu", dtype="float32", fuse=False, lm_head_runtime=16)
    assert found == own_tokens(own, tokens)


def wait_until_ready(client: Any, refused: type[Exception]) -> None:
    for _ in range(300):
        try:
            assert [model.id for model in client.models.list()] == ["small"]
        except refused:
            time.sleep(1)
        else:
            return
    raise AssertionError("the server did not start within five minutes")


@pytest.mark.usefixtures("stopped")
def test_files_without_a_layer_are_refused_with_its_name(small: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in small.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1.self_attn.k_proj" not in name}
    save_file(kept, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"layers\.1\.self_attn\.qkv_proj: the files have no weights for 128"):
        engine(broken)


@pytest.mark.usefixtures("stopped")
def test_vllms_own_kernel_runs_when_it_is_asked_for(tmp_path: Path) -> None:
    cells.write_model(tmp_path / "model")
    cells.write_checkpoint(tmp_path / "model", cells.Cell(), tmp_path / "out")
    found = vllm.LLM(str(tmp_path / "out"), quantization="gptq", enforce_eager=True, max_model_len=64)
    assert found.llm_engine.model_config.quantization == "auto_gptq"


def test_the_plugin_takes_gptq_on_cpus_unless_another_method_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fewbit.vllm_plugin import vllm_config

    choose = vllm_config.FewbitConfig.override_quantization_method
    gptq = {"quant_method": "gptq", "bits": 4}
    assert choose(gptq, None) == choose(gptq, "fewbit") == "fewbit"
    assert choose(gptq, "gptq") is None
    assert choose({"quant_method": "awq"}, None) is None
    monkeypatch.setattr(vllm_config.current_platform, "is_cpu", lambda: False, raising=False)
    assert choose(gptq, None) is None
    with pytest.raises(fewbit.errors.ConfigError, match="--quantization fewbit runs on CPUs"):
        choose(gptq, "fewbit")


def test_files_without_quantized_tensors_and_a_missing_module_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fewbit import native
    from fewbit.vllm_plugin.vllm_config import FewbitConfig

    config = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False}
    with pytest.raises(
        fewbit.errors.CheckpointError, match=r"says gptq, but no tensor .* is named \*\.qweight"
    ):
        FewbitConfig.from_config(config).maybe_update_config(str(prepare.MODEL))
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "unsupported_reason", lambda: "it was not built")
    with pytest.raises(fewbit.errors.KernelError, match="it was not built"):
        FewbitConfig.from_config(config)
