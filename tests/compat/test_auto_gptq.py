"""AutoGPTQ's scripts with another import line; each argument means what it meant there, or the log says why not."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from huggingface_hub import HfApi
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, TextGenerationPipeline
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import fewbit
from fewbit.compat.auto_gptq import (
    AutoGPTQForCausalLM,
    BaseQuantizeConfig,
    exllama_set_max_input_length,
    get_gptq_peft_model,
)
from fewbit.compat.auto_gptq.modeling import BaseGPTQForCausalLM
from fewbit.errors import CalibrationError, CheckpointError, ConfigError, KernelError, ModelError, OutputError
from fewbit.kernels.linear import QuantizedLayer
from fewbit.verification import verify
from models import TEXT, random_sequences, save_tiny, tiny_model, tiny_tokenizer

IDS = torch.arange(5, 25)[None]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def close(found, truth):
    """Loaded models have an 8-bit output layer and fused operations."""
    return (found.float() - truth.float()).norm() < 0.02 * truth.float().norm()


def of(model, **settings):
    """A model to be quantized, as from_pretrained gives it."""
    return BaseGPTQForCausalLM(
        model, False, BaseQuantizeConfig(**{"group_size": 16, "desc_act": False, **settings})
    )


def quantized(model):
    return [module for module in model.modules() if isinstance(module, QuantizedLayer)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("source"), max_position_embeddings=256)
    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def readme(source, tmp_path_factory):
    """The script of AutoGPTQ's README up to the saved folder: model, examples, folder."""
    pretrained_model_dir = str(source)
    quantized_model_dir = str(tmp_path_factory.mktemp("quantized") / "opt-125m-4bit")
    tokenizer = AutoTokenizer.from_pretrained(pretrained_model_dir, use_fast=True)
    examples = [tokenizer(TEXT[start : start + 120]) for start in range(0, 200, 50)]
    quantize_config = BaseQuantizeConfig(bits=4, group_size=16, desc_act=False)
    model = AutoGPTQForCausalLM.from_pretrained(pretrained_model_dir, quantize_config)
    assert model.quantize(examples) is None
    model.save_quantized(quantized_model_dir)
    model.save_quantized(quantized_model_dir, use_safetensors=True)
    return model, examples, quantized_model_dir


@pytest.fixture
def model(readme):
    """The quantized model, in a wrapper whose settings a test may change."""
    return BaseGPTQForCausalLM(readme[0].model, True, BaseQuantizeConfig(4, 16, desc_act=False))


def test_the_readme_goes_on(source, readme):
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoGPTQForCausalLM.from_quantized(readme[2], device="cpu")
    inputs = tokenizer("auto_gptq is", return_tensors="pt").to(model.device)
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=5, do_sample=False)[0])
    assert text.replace(" ", "").startswith("auto")
    pipeline = TextGenerationPipeline(model=model, tokenizer=tokenizer)
    assert pipeline("auto-gptq is", max_new_tokens=3)[0]["generated_text"].startswith("auto-gptq is")


def test_the_same_bytes_as_fewbit(source, readme):
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
    config = fewbit.QuantConfig(bits=4, group_size=16, damp=0.01, seq_len=256, num_samples=4)
    fewbit.quantize(model, config, dataset=[dict(example) for example in readme[1]])
    ours, theirs = model.state_dict(), readme[0].model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_saved_folder_is_a_checkpoint_like_any_other(readme):
    model, _, folder = readme
    assert not verify(folder).problems
    assert torch.equal(logits(fewbit.load(folder, fuse=False, lm_head_runtime=16)), logits(model))
    fewbit.register()
    try:
        assert close(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model))
    finally:
        fewbit.unregister()


def test_no_path_is_written(readme):
    model, _, folder = readme
    assert model.quantize_config.model_name_or_path == folder
    with open(f"{folder}/quantize_config.json") as file:
        written = json.load(file)
    assert written["model_name_or_path"] is None
    assert written["checkpoint_format"] == "gptq"


def test_attributes(readme):
    model = readme[0]
    assert model.quantized
    assert model.model_type == "llama"
    assert model.config is model.model.config
    assert model.device == torch.device("cpu")
    assert model.hf_device_map is None
    assert model.seqlen == 256
    assert model.quantize_config.bits == 4
    assert model.lm_head is model.model.lm_head  # forwarded
    assert model.get_input_embeddings() is model.model.model.embed_tokens
    assert model.to("cpu") is model
    assert "input_ids" in model.prepare_inputs_for_generation(IDS)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        model.nonsense  # noqa: B018


def test_the_factory_is_only_a_name():
    with pytest.raises(EnvironmentError, match=r"from_pretrained loads a model to be quantized"):
        AutoGPTQForCausalLM()


# Quantizing.
def test_columns_in_order_of_activation():
    model = of(tiny_model("llama"), desc_act=True)
    model.quantize(random_sequences(3))
    layer = model.model.model.layers[0].mlp.up_proj
    assert layer.desc_act
    assert not torch.equal(layer.g_idx, torch.arange(48, dtype=torch.int32) // 16)


def test_static_groups_need_no_g_idx(caplog):
    model, same = of(tiny_model("llama"), desc_act=True, static_groups=True), of(tiny_model("llama"))
    model.quantize(random_sequences(3))
    same.quantize(random_sequences(3))
    assert "static_groups: groups are always static here" in caplog.text
    assert torch.equal(logits(model), logits(same))


@pytest.mark.parametrize("form", ["lists", "one dimension", "two dimensions", "with labels"])
def test_forms_of_examples(form):
    rows = [s["input_ids"] for s in random_sequences(3)]
    examples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows]
    if form in ("one dimension", "two dimensions"):
        more = () if form == "one dimension" else (None,)
        examples = [{key: torch.tensor(value)[more] for key, value in e.items()} for e in examples]
    if form == "with labels":
        examples = [{**e, "labels": [-100] * 24, "token_type_ids": [0] * 24} for e in examples]
    model, same = of(tiny_model("llama")), of(tiny_model("llama"))
    model.quantize(examples)
    same.quantize([{"input_ids": row} for row in rows])
    assert torch.equal(logits(model), logits(same))


@pytest.mark.parametrize("pad_token_id", [0, None])
def test_batches_are_padded(pad_token_id):
    examples = [
        {"input_ids": s["input_ids"][:n]} for s, n in zip(random_sequences(3), (24, 9, 15), strict=True)
    ]
    wrapped = of(tiny_model("llama", pad_token_id=pad_token_id))
    wrapped.quantize(examples, batch_size=3)
    config = fewbit.QuantConfig(group_size=16, batch_size=3, num_samples=3, seq_len=128)
    same = fewbit.quantize(tiny_model("llama"), config, dataset=examples, tokenizer=tiny_tokenizer())
    assert torch.equal(logits(wrapped), logits(same))


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], r"no examples were given"),
        (None, r"no examples were given"),
        (["some text"], r"example 0 must be a dict with input_ids and attention_mask.*not str"),
        ([{"input_ids": [5, 6]}, {"text": "a"}], r"example 1 must be a dict with input_ids"),
        ([{"input_ids": [999]}], r"token id 999, outside the model's vocabulary of 120"),
    ],
)
def test_examples_that_cannot_be_used(examples, message):
    with pytest.raises(CalibrationError, match=message):
        of(tiny_model("llama")).quantize(examples)


def test_states(readme, tmp_path):
    with pytest.raises(EnvironmentError, match=r"quantized already: load the original") as caught:
        readme[0].quantize(readme[1])
    assert isinstance(caught.value, ModelError)
    with pytest.raises(EnvironmentError, match=r"not quantized yet: call quantize first"):
        of(tiny_model("llama")).save_quantized(tmp_path)


def test_what_cannot_be_quantized():
    with pytest.raises(
        ConfigError, match=r"is_marlin_format: fewbit writes the format that every engine reads"
    ):
        of(tiny_model("llama"), is_marlin_format=True).quantize(random_sequences())
    with pytest.raises(ConfigError, match=r"device_map keeps model.embed_tokens.weight offloaded"):
        of(tiny_model("llama").to("meta")).quantize(random_sequences())


def test_a_model_on_the_cpu_beside_a_gpu(monkeypatch, caplog):
    monkeypatch.setattr("fewbit.gptq_arguments.resolve_device", lambda name: torch.device("cuda"))
    of(tiny_model("llama")).quantize(random_sequences(2))
    assert (
        "device: the model is on the CPU and is quantized there. Move it first (model.to('cuda'))"
        in caplog.text
    )


def test_float16_on_the_cpu_is_noted(caplog):
    of(tiny_model("llama").half()).quantize(random_sequences(2))
    assert "torch_dtype: float16 is slow on CPUs: load the model in bfloat16" in caplog.text


def test_a_subclass_names_blocks_and_layers():
    class OurModel(BaseGPTQForCausalLM):
        layers_block_name = "model.layers"
        outside_layer_modules = ("model.embed_tokens",)
        inside_layer_modules = (("self_attn.q_proj",), ("mlp.down_proj",))

    model = OurModel(tiny_model("llama"), False, BaseQuantizeConfig(group_size=16, desc_act=False))
    model.quantize(random_sequences(3))
    names = {name for name, module in model.model.named_modules() if isinstance(module, QuantizedLayer)}
    assert names == {f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.down_proj")}


def test_quantizing_says_what_it_does_not_need(caplog):
    model, same = of(tiny_model("llama")), of(tiny_model("llama"))
    same.quantize(random_sequences(2))
    caplog.clear()
    model.quantize(
        random_sequences(2),
        use_triton=True,
        use_cuda_fp16=False,
        autotune_warmup_after_quantized=True,
        cache_examples_on_gpu=False,
    )
    model.warmup_triton()
    assert exllama_set_max_input_length(model, 4096) is model
    for name in ("use_triton", "use_cuda_fp16", "autotune_warmup_after_quantized", "cache_examples_on_gpu",
                 "warmup_triton", "exllama_set_max_input_length"):  # fmt: skip
        assert caplog.text.count(f" {name}: not needed: ") == 1
    assert torch.equal(logits(model), logits(same))


# Loading the original.
def test_from_pretrained_takes_transformers_arguments(source):
    model = AutoGPTQForCausalLM.from_pretrained(
        source,
        BaseQuantizeConfig(),
        torch_dtype=torch.float32,
        max_memory={"cpu": "1GB"},
        low_cpu_mem_usage=True,
        attn_implementation="eager",
        use_auth_token=None,
        resume_download=False,
    )
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "eager"
    assert not model.quantized
    assert not model.model.training


@pytest.mark.parametrize(
    "where", [{"max_memory": {"cpu": "1GB", "disk": "9GB"}}, {"device_map": {"model": "disk"}}]
)
def test_from_pretrained_refuses_the_disk(source, where):
    with pytest.raises(ConfigError, match=r"leave the disk entries out.*which streams it"):
        AutoGPTQForCausalLM.from_pretrained(source, BaseQuantizeConfig(), **where)


def test_from_pretrained_refuses_a_checkpoint(readme):
    with pytest.raises(EnvironmentError, match=r"is quantized already: load it with .*from_quantized"):
        AutoGPTQForCausalLM.from_pretrained(readme[2], BaseQuantizeConfig())


# Loading a checkpoint.
def test_from_quantized_has_the_settings(readme):
    model = AutoGPTQForCausalLM.from_quantized(readme[2], torch_dtype=torch.float16)
    assert model.quantize_config.to_dict() == readme[0].quantize_config.to_dict()
    assert torch.equal(logits(model), logits(fewbit.load(readme[2], dtype="float16")))
    assert close(logits(model), logits(readme[0]))


def test_the_fast_dtype_on_the_cpu(readme):
    assert AutoGPTQForCausalLM.from_quantized(readme[2], device="cpu").dtype == torch.bfloat16


def test_from_quantized_says_what_it_does_not_need(readme, caplog):
    given = {
        "low_cpu_mem_usage": True,
        "use_triton": True,
        "use_qigen": True,
        "inject_fused_attention": True,
        "inject_fused_mlp": True,
        "use_cuda_fp16": False,
        "warmup_triton": True,
        "disable_exllama": False,
        "disable_exllamav2": True,
    }
    model = AutoGPTQForCausalLM.from_quantized(
        readme[2], device_map="auto", use_safetensors=False, some_option=1, torch_dtype=torch.float16, **given
    )
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    for name in given:
        assert sum(line.startswith(f"{name}: not needed: ") for line in said) == 1
    assert "use_safetensors=False: safetensors files are read; opening pickles can run code" in said
    assert "some_option: unknown to from_quantized and without effect" in said
    assert torch.equal(logits(model), logits(fewbit.load(readme[2], dtype="float16")))
    assert close(logits(model), logits(readme[0]))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"use_marlin": True}, KernelError, r"kernel 'marlin' cannot run.*device is cpu"),
        ({"device": "cuda:7"}, ConfigError, r"'cuda:7' cannot be used here"),
        ({"device": 7}, ConfigError, r"'cuda:7' cannot be used here"),
        ({"device_map": "everywhere"}, ConfigError, r"'everywhere' cannot be used here"),
        ({"device_map": {"model": "cpu", "lm_head": "disk"}}, ConfigError, r"cannot run from disk"),
        (
            {"model_basename": "gptq_model-8bit-16g"},
            CheckpointError,
            r"are model.safetensors, not gptq_model-8bit",
        ),
        (
            {"quantize_config": BaseQuantizeConfig(8, 16)},
            ConfigError,
            r"says bits 8, but the checkpoint .* has 4",
        ),
        ({"quantize_config": BaseQuantizeConfig(4, 32)}, ConfigError, r"says group_size 32, but .* has 16"),
    ],
)
def test_from_quantized_refuses(readme, arguments, kind, message):
    with pytest.raises(kind, match=message):
        AutoGPTQForCausalLM.from_quantized(readme[2], **arguments)


def test_what_is_no_checkpoint(source, tmp_path, monkeypatch):
    with pytest.raises(
        CheckpointError, match=r"config.json has no quantization_config: quantize the model first"
    ):
        AutoGPTQForCausalLM.from_quantized(source)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match=r"is neither a folder|cannot be downloaded"):
        AutoGPTQForCausalLM.from_quantized("nobody/nothing", revision="main", use_auth_token="x")


@pytest.mark.parametrize("name", ["gptq_model-4bit-16g", "model", "model.safetensors"])
def test_names_of_the_weights(readme, name):
    assert AutoGPTQForCausalLM.from_quantized(readme[2], model_basename=name).quantized


@pytest.mark.parametrize("given", [False, True])
def test_folders_of_old(model, source, tmp_path, given):
    """Another weight file name; the quantization in quantize_config.json, or said by the caller."""
    model.save_quantized(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-16g.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    old = {"bits": 4, "group_size": 16, "damp_percent": 0.01, "desc_act": False, "sym": True}
    (tmp_path / "quantize_config.json").write_text(json.dumps(old))
    arguments = {}
    if given:
        (tmp_path / "quantize_config.json").unlink()
        arguments["quantize_config"] = BaseQuantizeConfig(**old)
    loaded = AutoGPTQForCausalLM.from_quantized(
        tmp_path, model_basename="gptq_model-4bit-16g", torch_dtype=torch.float16, **arguments
    )
    assert close(logits(loaded), logits(model))
    assert loaded.quantize_config.model_file_base_name == "gptq_model-4bit-16g"
    loaded.save_quantized(tmp_path / "again")
    assert (tmp_path / "again" / "gptq_model-4bit-16g.safetensors").exists()
    assert torch.equal(logits(fewbit.load(tmp_path / "again", fuse=False, lm_head_runtime=16)), logits(model))


def test_a_bare_number_of_a_device_without_accelerate(readme, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert AutoGPTQForCausalLM.from_quantized(readme[2], device_map={"": "cpu"}).quantized
    with pytest.raises(ImportError, match=r"needs the package accelerate: pip install accelerate"):
        AutoGPTQForCausalLM.from_quantized(readme[2], device_map="auto")


# Saving.
def test_metadata(model, tmp_path):
    model.save_pretrained(tmp_path, safetensors_metadata={"trained by": "us", 3: 4})
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "trained by": "us", "3": "4"}
    assert torch.equal(logits(fewbit.load(tmp_path, fuse=False, lm_head_runtime=16)), logits(model))


@pytest.mark.parametrize(
    ("metadata", "message"), [("text", "must be a dictionary"), ({1: 1, "1": 2}, "two keys")]
)
def test_metadata_that_is_refused(model, tmp_path, metadata, message):
    with pytest.raises(ConfigError, match=message):
        model.save_quantized(tmp_path / "out", safetensors_metadata=metadata)
    assert not (tmp_path / "out").exists()


def test_pickles_are_not_written(model, tmp_path, caplog):
    model.save_quantized(tmp_path, use_safetensors=False)
    assert "use_safetensors=False: safetensors files are written" in caplog.text
    assert (tmp_path / "model.safetensors").exists()


def test_push_to_hub(model, tmp_path, monkeypatch):
    uploads = []

    def create_repo(self, repo_id, **kwargs):
        uploads.append(("create", repo_id, kwargs["private"], kwargs["token"]))
        return type("Url", (), {"repo_id": f"me/{repo_id}"})

    def upload_folder(self, *, repo_id, folder_path, commit_message, token, create_pr):
        uploads.append(
            ("upload", repo_id, sorted(p.name for p in folder_path.iterdir()), commit_message, create_pr)
        )
        return "commit"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    assert model.push_to_hub("ours", save_dir=tmp_path, use_auth_token="hf_x", private=True) == "commit"
    assert uploads[0] == ("create", "ours", True, "hf_x")
    assert uploads[1][1] == "me/ours"
    assert {"config.json", "model.safetensors", "quantize_config.json"} <= set(uploads[1][2])
    model.push_to_hub("ours", commit_message="again", create_pr=True)
    assert uploads[-1][3:] == ("again", True)


def test_push_to_hub_says_what_went_wrong(model, tmp_path):
    with pytest.raises(ModelError, match=r"was not saved yet: call save_quantized first, or pass save_dir"):
        model.push_to_hub("ours")
    with pytest.raises(OutputError, match=r"is complete, but could not be uploaded to a b: .*hf auth login"):
        model.push_to_hub("a b", save_dir=tmp_path)


# Training.
def test_trainable_mode_lets_gradients_through(readme):
    model = AutoGPTQForCausalLM.from_quantized(readme[2], trainable=True)
    assert model.trainable
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits.float().sum().backward()
    assert embeddings.grad.abs().sum() > 0
    model.disable_trainable_mode()
    assert not model.trainable


def test_adapters(readme, tmp_path):
    from peft import LoraConfig

    base = AutoGPTQForCausalLM.from_quantized(readme[2], torch_dtype=torch.float32)
    model = get_gptq_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM"), train_mode=True)
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    optimizer.step()
    with torch.no_grad():
        assert model(IDS, labels=IDS).loss < loss
    model.save_pretrained(tmp_path)
    again = AutoGPTQForCausalLM.from_quantized(readme[2], torch_dtype=torch.float32)
    again = get_gptq_peft_model(again, model_id=str(tmp_path))
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


@pytest.mark.parametrize(
    ("train_mode", "message"), [(True, "pass its peft_config"), (False, "pass model_id")]
)
def test_adapters_need_to_be_named(readme, train_mode, message):
    with pytest.raises(ConfigError, match=message):
        get_gptq_peft_model(readme[0], train_mode=train_mode)


def test_importing_changes_nothing():
    code = "import sys, fewbit.compat; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "fewbit" not in AUTO_QUANTIZER_MAPPING["gptq"].__module__
    assert "fewbit" not in AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"].__module__
