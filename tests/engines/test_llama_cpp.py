"""llama.cpp computes the same from an exported file, for every type of model, and splits text the same way.

pytest tests/engines/test_llama_cpp.py -m slow --engine llama.cpp=V/bin/python
"""

from __future__ import annotations

import ctypes
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from float32_gguf import as_float32
from measure import ask
from test_exports import matrix
from test_gguf_file import CASES
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import fewbit
from fewbit import demo
from fewbit.exports.gguf_blocks import blocks_of
from fewbit.exports.gguf_models import KINDS
from fewbit.exports.gguf_vocabulary import _LLAMA3

pytestmark = pytest.mark.slow

PythonOf = Callable[[str], str]
VOCABULARY = 1024
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# What differs between types; windows are shorter than the 48 tokens of the test.
CHANGES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen2": {"head_dim": 24},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 5.0},
    "gemma3_text": {
        "sliding_window": 16,
        "query_pre_attn_scalar": 32,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "phi3": {"head_dim": 24, "sliding_window": None},
    "olmo2": {"head_dim": 24},
    "granite": {
        "head_dim": 24,
        "attention_multiplier": 0.1,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
    "smollm3": {"head_dim": 24},
}
TOKENS = torch.randint(3, VOCABULARY, (48,), generator=torch.Generator().manual_seed(1)).tolist()


def trained(
    byte_fallback: bool = False, ignore_merges: bool = False, **settings: Any
) -> PreTrainedTokenizerFast:
    """A tokenizer of the kind of Llama 2's, or byte-level BPE, trained on the demo's text."""
    tokenizer = Tokenizer(
        models.BPE(
            byte_fallback=byte_fallback,
            ignore_merges=ignore_merges,
            unk_token="<unk>" if byte_fallback else None,
        )
    )
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    alphabet = [] if byte_fallback else pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<|endoftext|>"]  # llama.cpp looks for the last in Phi-3
    special += [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 1, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(
        demo.calibration_text().read_text(encoding="utf-8").splitlines(True), trainer
    )
    if byte_fallback:  # bytes are ordinary tokens
        stated = json.loads(tokenizer.to_str())
        stated["added_tokens"] = [
            one for one in stated["added_tokens"] if not one["content"].startswith("<0x")
        ]
        tokenizer = Tokenizer.from_str(json.dumps(stated))
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def byte_level(use_regex: bool = True, *before: Any) -> dict[str, Any]:
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    return {
        "pre_tokenizer": pre_tokenizers.Sequence([*before, own]) if before else own,
        "decoder": decoders.ByteLevel(),
    }


def split(digits: str) -> Any:
    from tokenizers import Regex

    return pre_tokenizers.Split(Regex(_LLAMA3.replace("%", digits)), "isolated")


REPLACE = normalizers.Replace(" ", "▁")
TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "gpt-2": lambda: trained(**byte_level()),
    "smollm": lambda: trained(**byte_level(True, pre_tokenizers.Digits(individual_digits=True))),
    "qwen2": lambda: trained(normalizer=normalizers.NFC(), **byte_level(False, split(r"\p{N}"))),
    "smaug-bpe": lambda: trained(**byte_level(False, split(r"\p{N}{1,3}"))),
    "llama-bpe": lambda: trained(
        ignore_merges=True,
        post_processor=processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]),
        **byte_level(False, split(r"\p{N}{1,3}")),
    ),
    "llama 2": lambda: trained(True, normalizer=normalizers.Sequence([normalizers.Prepend("▁"), REPLACE])),
    "gemma": lambda: trained(True, normalizer=REPLACE),
    "metaspace": lambda: trained(
        True, pre_tokenizer=pre_tokenizers.Metaspace("▁", prepend_scheme="never", split=False)
    ),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SHAPE, **CHANGES.get(name, {})})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[-1] ** 0.5)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def quantized(folder: Path, model: Any, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> Path:
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(2)
    ids = [{"input_ids": torch.randint(3, VOCABULARY, (1, 48), generator=generator)} for _ in range(4)]
    config = fewbit.QuantConfig(**{"bits": 4, "group_size": 32, "dtype": "float32", "fast": True, **settings})
    fewbit.quantize(folder / "model", config, dataset=ids, output=folder / "in")
    return folder / "in"


def expected(folder: Path) -> torch.Tensor:
    model = fewbit.load(folder, device="cpu", dtype="float32", kernel="reference")
    with torch.no_grad():
        return model(input_ids=torch.tensor([TOKENS])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("name", KINDS)
def test_llama_cpp_computes_the_same(name: str, python_of: PythonOf, tmp_path: Path) -> None:
    python = python_of("llama.cpp")
    folder = quantized(tmp_path, build(name), trained(**byte_level()))
    fewbit.export(folder, tmp_path / "out.gguf", "gguf")
    files = [tmp_path / "out.gguf", as_float32(tmp_path / "out.gguf", tmp_path / "float32.gguf")]
    _, answers = ask("llama.cpp", python, files, tmp_path, TOKENS)
    rounded, exact = (torch.tensor(answer["logits"]).log_softmax(-1) for answer in answers)
    truth = expected(folder)
    gelu = "gelu_pytorch_tanh" in KINDS[name].activations  # ggml looks it up in a table of float16 numbers
    assert float((exact - truth).abs().max()) < (2e-2 if gelu else 5e-4)
    # Inputs of the quantized products have 8 bits in llama.cpp.
    assert float((truth.exp() * (truth - rounded)).sum(-1).mean()) < 0.02


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_splits_text_the_same_way(name: str, python_of: PythonOf, tmp_path: Path) -> None:
    python = python_of("llama.cpp")
    folder = quantized(tmp_path, build("llama"), TOKENIZERS[name](), method="rtn", group_size=-1)
    fewbit.export(folder, tmp_path / "out.gguf", "gguf")
    texts = [*demo.calibration_text().read_text(encoding="utf-8")[30_000:60_000].split("\n\n"), *ODD]
    _, (answer,) = ask("llama.cpp", python, [tmp_path / "out.gguf"], tmp_path, texts, ["--tokenize"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text, found in zip(texts, answer["logits"], strict=True):
        assert found == tokenizer(text)["input_ids"], text


ODD = [
    "  two spaces,  and a tab\tand\n\n\nlines   ",
    "don't WE'LL 1234567 3.14 x2y 10,000 naïve café ßöü",
    "日本語 текст עברית 🙂🙂 \u200d\u00a0 end",
    "for (int i = 0; i < n; ++i) { a[i] += b[i]; }  // sum",
    "before <tool> after</s>",
]


@pytest.mark.parametrize(("bits", "group_size", "sym", "kind"), CASES)
def test_ggml_decodes_the_same_weight(
    bits: int, group_size: int, sym: bool, kind: str, python_of: PythonOf
) -> None:
    where = [python_of("llama.cpp"), "-c", "import llama_cpp; print(llama_cpp.__path__[0])"]
    folder = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())
    library = ctypes.CDLL(str(folder / "lib" / "libggml-base.so"))
    codes = matrix(bits, group_size, sym)
    blocks = blocks_of(codes, kind)
    found = torch.empty(codes.shape)
    decode = getattr(library, f"dequantize_row_{kind.lower()}")
    decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    decode(blocks.data_ptr(), found.data_ptr(), found.numel())
    assert torch.equal(found, codes.dequantize())
