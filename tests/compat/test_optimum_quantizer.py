"""optimum's scripts with another import line; each argument means what it meant there, or the log says why not."""

import copy
import json
import logging

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import fewbit
from fewbit.compat.optimum import GPTQQuantizer, load_quantized_model
from fewbit.compat.optimum.utils import get_layers
from fewbit.errors import CalibrationError, CheckpointError, ConfigError, KernelError, ModelError
from fewbit.kernels import registry
from fewbit.kernels.linear import QuantizedLayer, QuantLinear
from fewbit.verification import verify
from models import TEXT, random_sequences, save_tiny, tiny_model, tiny_tokenizer
from moe_models import tiny_moe

TEXTS = [TEXT[start : start + 90] for start in range(0, 200, 50)]
IDS = torch.arange(5, 25)[None]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def close(found, truth):
    """Loaded models have an 8-bit output layer and fused operations."""
    return (found.float() - truth.float()).norm() < 0.02 * truth.float().norm()


def quantized_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def saved(source, tmp_path_factory):
    """The script of optimum's usage guide: quantizer, model and folder."""
    model_name, save_folder = str(source), str(tmp_path_factory.mktemp("saved") / "out")
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float16)
    quantizer = GPTQQuantizer(
        bits=4, dataset=TEXTS, group_size=16, block_name_to_quantize="model.layers", model_seqlen=64
    )
    quantized_model = quantizer.quantize_model(model, tokenizer)
    quantizer.save(quantized_model, save_folder)
    return quantizer, quantized_model, save_folder


def test_the_guides_script_loads_what_it_saved(source, saved):
    _, quantized_model, save_folder = saved
    with init_empty_weights():
        empty_model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
    empty_model.tie_weights()
    loaded = load_quantized_model(empty_model, save_folder=save_folder, device_map="auto")
    assert loaded.dtype == torch.float16
    assert torch.equal(logits(loaded), logits(fewbit.load(save_folder, dtype="float16")))
    assert close(logits(loaded), logits(quantized_model))


def test_the_same_bytes_as_fewbit(source, saved):
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
    config = fewbit.QuantConfig(bits=4, group_size=16, damp=0.1, seq_len=64, num_samples=len(TEXTS))
    fewbit.quantize(model, config, dataset=TEXTS, tokenizer=str(source))
    ours, theirs = model.state_dict(), saved[1].state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_saved_folder_is_a_checkpoint_like_any_other(saved):
    _, model, folder = saved
    assert not verify(folder).problems
    assert torch.equal(logits(fewbit.load(folder, fuse=False, lm_head_runtime=16)), logits(model))


def test_all_blocks_need_no_pattern(saved):
    head = next(item for item in saved[1].fewbit_report.to_dict()["skipped"] if item["name"] == "lm_head")
    assert head["reason"].startswith("output embedding")


def test_no_calibration_text_is_written(saved):
    quantizer, _, folder = saved
    assert quantizer.to_dict()["dataset"] == TEXTS
    for name in ("config.json", "quantize_config.json"):
        with open(f"{folder}/{name}") as file:
            assert TEXTS[0][:20] not in file.read()


def test_layers_carry_what_clients_look_for(saved):
    layer = saved[1].model.layers[0].mlp.up_proj
    assert layer.QUANT_TYPE == "fewbit"
    assert (layer.bits, layer.group_size, layer.sym, layer.desc_act) == (4, 16, True, False)
    assert (layer.in_features, layer.out_features) == (layer.infeatures, layer.outfeatures) == (48, 80)
    assert layer.qweight.shape == (6, 80)
    assert layer.qzeros.shape == (3, 10)
    assert layer.scales.shape == (3, 80)
    assert layer.g_idx.shape == (48,)
    assert layer.bias is None


def test_a_folder_instead_of_a_model(source):
    quantizer = GPTQQuantizer(bits=8, dataset=TEXTS, group_size=16, model_seqlen=32)
    assert quantizer.quantize_model(source).model.layers[1].mlp.down_proj.bits == 8


# Constructor.
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 5}, r"bits must be one of 2, 3, 4, 8; got 5"),
        ({"group_size": 0}, r"group_size must be positive, or -1"),
        ({"group_size": -2}, r"group_size must be positive, or -1"),
        ({"damp_percent": 0}, r"damp must lie between 0 and 1"),
        ({"damp_percent": 1.0}, r"damp must lie between 0 and 1"),
        ({"format": "marlin"}, r"format must be one of gptq, gptq_v2"),
        ({"format": "gptq", "checkpoint_format": "gptq_v2"}, r"checkpoint_format is its older name"),
        ({"quant_method": "awq"}, r"quant_method must be 'gptq'; got 'awq'"),
        ({"exllama_config": {}}, r"exllama_config needs a version key"),
        ({"exllama_config": {"version": 3}}, r"version key that is 1 or 2"),
        ({"backend": 7}, r"backend must be the name of a kernel"),
    ],
)
def test_constructor_refuses(arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        GPTQQuantizer(**{"bits": 4, **arguments})
    assert isinstance(caught.value, ValueError)  # what optimum raised


def test_desc_act_switches_the_other_order_off(caplog):
    quantizer = GPTQQuantizer(bits=4, desc_act=True, act_group_aware=True)
    assert not quantizer.act_group_aware
    assert "act_group_aware: switched off" in caplog.text


def test_true_sequential_is_noted(caplog):
    GPTQQuantizer(bits=4, true_sequential=False)
    assert "true_sequential=False: every layer sees" in caplog.text


def test_round_trip_keeps_unknown_keys():
    given = {
        "bits": 3,
        "group_size": 32,
        "desc_act": True,
        "format": "gptq_v2",
        "dataset": "c4",
        "dynamic": {"a": 1},
    }
    quantizer = GPTQQuantizer.from_dict({**given, "meta": {"note": "mine"}, "lm_head": False})
    values = quantizer.to_dict()
    assert values.items() >= {**given, "lm_head": False, "quant_method": "gptq", "damp_percent": 0.1}.items()
    assert values["meta"] == {"note": "mine", "quantizer": [f"fewbit:{fewbit.__version__}"]}
    assert GPTQQuantizer.from_dict(values).to_dict() == values
    assert set(quantizer.serialization_keys) <= set(values)
    json.dumps(values)


def test_from_dict_reads_what_save_wrote(saved):
    with open(f"{saved[2]}/quantize_config.json") as file:
        quantizer = GPTQQuantizer.from_dict(json.load(file))
    assert (quantizer.bits, quantizer.group_size, quantizer.damp_percent) == (4, 16, 0.1)


# Data.
@pytest.mark.parametrize(
    ("dataset", "tokenizer", "kind", "message"),
    [
        (None, None, CalibrationError, r"no dataset was given"),
        ("wikitext3", None, CalibrationError, r"there is no dataset 'wikitext3'.*wikitext2, c4, c4-new"),
        ("ptb", None, RuntimeError, r"'ptb' is no longer supported"),
        ("ptb-new", None, ValueError, r"'ptb-new' is no longer supported"),
        (3, None, CalibrationError, r"cannot read a dataset of type int"),
        (TEXTS, None, CalibrationError, r"a tokenizer is needed"),
        (TEXTS, ".", ValueError, r"no tokenizer can be loaded from \..*pass the tokenizer itself"),
    ],
)
def test_data_that_cannot_be_used(dataset, tokenizer, kind, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quantizer = GPTQQuantizer(bits=4, dataset=dataset, group_size=16)
    with pytest.raises(kind, match=message):
        quantizer.quantize_model(tiny_model("llama"), tokenizer)


def test_sequences_are_capped_as_optimum_does():
    model = tiny_model("llama", max_position_embeddings=5000)
    quantizer = GPTQQuantizer(bits=4, dataset=random_sequences(2), group_size=16)
    quantizer.quantize_model(model)
    assert quantizer.model_seqlen == 4028


def test_model_seqlen_beyond_the_model_is_capped(caplog):
    quantizer = GPTQQuantizer(bits=4, dataset=random_sequences(2), group_size=16, model_seqlen=9999)
    quantizer.quantize_model(tiny_model("llama"))
    assert "seq_len 9999 is more than the model's 128 positions: 128 used" in caplog.text


def test_batches_need_a_pad_token():
    quantizer = GPTQQuantizer(bits=4, dataset=TEXTS, group_size=16, batch_size=2)
    with pytest.raises(
        CalibrationError, match=r"batch_size 2 needs a pad token: pass pad_token_id"
    ) as caught:
        quantizer.quantize_model(tiny_model("llama"), tiny_tokenizer())
    assert isinstance(caught.value, ValueError)


def test_batches_with_a_pad_token_of_our_own():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    texts = [TEXT[:30], TEXT[:50], TEXT[50:90]]
    quantizer = GPTQQuantizer(bits=4, dataset=texts, group_size=16, batch_size=2, pad_token_id=2)
    model = quantizer.quantize_model(tiny_model("llama"), tokenizer)
    config = fewbit.QuantConfig(group_size=16, damp=0.1, batch_size=2, num_samples=3, seq_len=128)
    same = fewbit.quantize(tiny_model("llama"), config, dataset=texts, tokenizer=tiny_tokenizer())
    assert torch.equal(logits(model), logits(same))


# Which layers.
def test_only_modules_in_block(tmp_path):
    listed = [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.down_proj"]]
    quantizer = GPTQQuantizer(
        bits=4, dataset=random_sequences(), group_size=16, modules_in_block_to_quantize=listed, meta={"a": 1}
    )
    model = quantizer.quantize_model(tiny_model("llama"))
    expected = {f"model.layers.{i}.{name}" for i in (0, 1) for names in listed for name in names}
    assert quantized_names(model) == expected
    quantizer.save(model, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["modules_in_block_to_quantize"] == listed
    assert written["meta"]["a"] == 1
    assert not verify(tmp_path).problems
    assert torch.equal(logits(fewbit.load(tmp_path, fuse=False, lm_head_runtime=16)), logits(model))


def test_only_the_named_blocks():
    quantizer = GPTQQuantizer(bits=4, group_size=16, block_name_to_quantize="encoder.block")
    names = quantized_names(quantizer.convert_model(tiny_model("t5")))
    assert names
    assert all(name.startswith("encoder.block.") for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"block_name_to_quantize": "encoder.layer"},
            r"'encoder.layer' is no list of blocks.*model.layers.0",
        ),
        ({"modules_in_block_to_quantize": [["mlp.fc"]]}, r"has a linear layer 'mlp.fc'; they have self_attn"),
        ({"module_name_preceding_first_block": ["embed"]}, r"Module embed was not found.*model.embed_tokens"),
    ],
)
def test_names_that_are_not_in_the_model(arguments, message):
    quantizer = GPTQQuantizer(bits=4, dataset=random_sequences(), group_size=16, **arguments)
    with pytest.raises(ConfigError, match=message):
        quantizer.quantize_model(tiny_model("llama"))


def test_a_model_with_two_stacks_needs_no_block_name():
    model = tiny_model("t5")
    quantizer = GPTQQuantizer(bits=4, dataset=random_sequences(2), group_size=16)
    quantizer.quantize_model(model)
    assert {name.partition(".")[0] for name in quantized_names(model)} == {"encoder", "decoder"}


def test_a_router_that_is_listed_stays_and_is_said(caplog):
    block = nn.ModuleDict({"gate": nn.Linear(16, 2), "up": nn.Linear(16, 16)})
    model = nn.ModuleDict({"layers": nn.ModuleList([block])})
    quantizer = GPTQQuantizer(bits=4, group_size=16, modules_in_block_to_quantize=[["gate", "up"]])
    assert quantized_names(quantizer.convert_model(model)) == {"layers.0.up"}
    assert "layers.0.gate: stays as it is: router of a mixture of experts" in caplog.text


def test_experts_are_named_one_by_one(tmp_path):
    model = tiny_moe("mixtral")
    listed = [[f"mlp.experts.{i}.down_proj" for i in range(4)]]
    quantizer = GPTQQuantizer(
        bits=4, dataset=random_sequences(4), group_size=16, modules_in_block_to_quantize=listed
    )
    quantizer.save(quantizer.quantize_model(model), tmp_path)
    assert {name.rpartition(".")[2] for name in quantized_names(model)} == {"down_proj"}
    assert torch.equal(logits(fewbit.load(tmp_path, fuse=False, lm_head_runtime=16)), logits(model))


# What is no longer needed is said, and changes nothing.
def test_arguments_without_effect_are_said(caplog):
    model, same = tiny_model("llama"), tiny_model("llama")
    GPTQQuantizer(bits=4, dataset=random_sequences(2), group_size=16).quantize_model(same)
    caplog.clear()
    GPTQQuantizer(
        bits=4,
        dataset=random_sequences(2),
        group_size=16,
        cache_block_outputs=False,
        max_input_length=4096,
        module_name_preceding_first_block=["model.embed_tokens"],
        use_cuda_fp16=True,
        disable_exllama=True,
        exllama_config={"version": 2},
        w_clip=True,
    ).quantize_model(model)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    for name in (
        "cache_block_outputs",
        "max_input_length",
        "module_name_preceding_first_block",
        "use_cuda_fp16",
        "disable_exllama",
        "exllama_config",
    ):
        assert sum(line.startswith(f"{name}: not needed: ") for line in said) == 1
    assert any(line.startswith("w_clip: kept for to_dict") for line in said)
    assert torch.equal(logits(model), logits(same))


def test_an_offloaded_model_is_refused():
    model = tiny_model("llama")
    model.hf_device_map = {"model": "cpu", "lm_head": "disk"}
    quantizer = GPTQQuantizer(bits=4, dataset=random_sequences(), group_size=16)
    with pytest.raises(
        ConfigError, match=r"device_map keeps lm_head offloaded.*streams the weights"
    ) as caught:
        quantizer.quantize_model(model)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(ConfigError, match=r"device_map keeps model.embed_tokens.weight offloaded"):
        quantizer.quantize_model(tiny_model("llama").to("meta"))


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("marlin", r"kernel 'marlin' cannot run a layer of 4 bits.*device is cpu, not cuda"),
        ("exllama_v2", r"kernel 'exllamav2' cannot run.*device is cpu"),
        ("bitblas", r"there is no kernel 'bitblas'; use auto or one of"),
    ],
)
def test_a_backend_that_cannot_run_is_refused_before_the_work(backend, message):
    model = tiny_model("llama")
    quantizer = GPTQQuantizer(bits=4, dataset=random_sequences(), group_size=16, backend=backend)
    with pytest.raises(KernelError, match=message):
        quantizer.quantize_model(model)
    assert not quantized_names(model)


@pytest.mark.parametrize("backend", ["torch", "AUTO", "auto_trainable"])
def test_backends_that_can(backend):
    quantizer = GPTQQuantizer(bits=4, dataset=random_sequences(2), group_size=16, backend=backend)
    model = quantizer.quantize_model(tiny_model("llama"))
    found = {layer.kernel.name for layer in model.modules() if isinstance(layer, QuantizedLayer)}
    own = {kernel.name for kernel in registry.KERNELS}
    assert found == {"reference"} if backend == "torch" else found <= own


# The steps one by one.
def test_convert_then_load_a_state_dict(saved, source):
    quantizer, quantized_model, _ = saved
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
    converted = GPTQQuantizer.from_dict(quantizer.to_dict()).convert_model(model)
    converted.load_state_dict(quantized_model.state_dict())
    assert torch.equal(logits(quantizer.post_init_model(converted)), logits(quantized_model))
    assert converted.config.quantization_config.bits == 4


def test_convert_without_memory(saved):
    model = tiny_model("llama").to("meta")
    converted = saved[0].convert_model(model, device_map="auto")
    assert quantized_names(converted) == quantized_names(saved[1])
    assert all(buffer.is_meta for buffer in converted.model.layers[0].mlp.up_proj.buffers())


@pytest.mark.parametrize("fmt", ["gptq", "gptq_v2"])
def test_pack_model_keeps_rounded_weights(fmt, tmp_path):
    rounded = fewbit.quantize(
        tiny_model("llama"), fewbit.QuantConfig(method="rtn", group_size=16, sym=False, format=fmt)
    )
    model, quantizers = tiny_model("llama"), {}
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    for name in names:
        codes = rounded.get_submodule(name).codes()
        model.get_submodule(name).weight.data = codes.dequantize()
        quantizers[name] = (None, codes.scales, codes.zeros, codes.g_idx)
    expected = logits(model)
    quantizer = GPTQQuantizer(bits=4, group_size=16, sym=False, format=fmt, backend="torch")
    quantizer.pack_model(model, quantizers)
    assert quantized_names(quantizer.post_init_model(model)) == set(names)
    assert torch.allclose(logits(model), expected, atol=1e-6)
    quantizer.save(model, tmp_path)
    assert torch.equal(logits(fewbit.load(tmp_path, kernel="torch")), logits(model))


def test_pack_model_names_the_layer_it_does_not_know():
    with pytest.raises(ConfigError, match=r"pack_model: 'model.norm' is no layer of LlamaForCausalLM"):
        GPTQQuantizer(bits=4, group_size=16).pack_model(tiny_model("llama"), {"model.norm": (None,) * 4})


def test_small_questions(saved):
    quantizer, model, _ = saved
    quantizer.select_quant_linear(device_map="auto")
    assert quantizer.quant_linear is QuantLinear
    assert quantizer.get_no_split_module_classes(model) == ["LlamaDecoderLayer"]
    assert len(get_layers(model, [quantizer.quant_linear])) == 14


# Saving and loading.
def test_save_shards_and_notes_pickles(saved, tmp_path, caplog):
    quantizer, model, _ = saved
    quantizer.save(model, tmp_path, max_shard_size="20KB", safe_serialization=False)
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert not list(tmp_path.glob("*.bin"))
    assert "safe_serialization=False: safetensors files are written" in caplog.text


def test_save_refuses_what_is_not_quantized(tmp_path):
    quantizer = GPTQQuantizer(bits=4)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM is not quantized: call quantize_model first"):
        quantizer.save(tiny_model("llama"), tmp_path)
    with pytest.raises(ModelError, match=r"Linear has no save_pretrained"):
        quantizer.save(nn.Linear(2, 2), tmp_path)


def test_load_says_what_it_does_not_need(saved, source, caplog):
    empty = copy.deepcopy(saved[1])
    load_quantized_model(
        empty,
        saved[2],
        backend="torch",
        state_dict_name="model.safetensors",
        device_map={"": "cpu"},
        no_split_module_classes=["LlamaDecoderLayer"],
        offload_folder="away",
        offload_buffers=True,
        offload_state_dict=True,
        max_input_length=4096,
        disable_exllama=True,
        exllama_config={"version": 1},
    )
    for name in ("no_split_module_classes", "offload_folder", "offload_buffers", "offload_state_dict"):
        assert f"{name}: not needed: " in caplog.text


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"device_map": {"model": "cpu", "lm_head": "disk"}}, ConfigError, r"cannot run from disk"),
        ({"max_memory": {"disk": "1GB"}}, ConfigError, r"cannot run from disk"),
        (
            {"state_dict_name": "other.safetensors"},
            CheckpointError,
            r"are model.safetensors, not other.safetensors",
        ),
        ({"backend": "marlin"}, KernelError, r"'marlin' cannot run"),
        ({"device_map": "tpu"}, ConfigError, r"'tpu' cannot be used here"),
    ],
)
def test_load_refuses(saved, arguments, kind, message):
    with pytest.raises(kind, match=message):
        load_quantized_model(saved[1], saved[2], **arguments)


def test_load_refuses_other_models(saved, source):
    with pytest.raises(
        CheckpointError, match=r"holds a LlamaForCausalLM, but the empty model is a GPT2LMHead"
    ):
        load_quantized_model(tiny_model("gpt2"), saved[2])
    with pytest.raises(ConfigError, match=r"builds transformers models, not a Linear"):
        load_quantized_model(nn.Linear(2, 2), saved[2])
    with pytest.raises(CheckpointError, match=r"is not a quantized checkpoint"):
        load_quantized_model(tiny_model("llama"), source)


def test_a_configuration_of_another_name(saved, source, tmp_path):
    """An old folder whose config.json says nothing of quantization."""
    quantizer, model, _ = saved
    quantizer.save(model, tmp_path)
    (tmp_path / "quantize_config.json").rename(tmp_path / "mine.json")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    loaded = load_quantized_model(model, tmp_path, quant_config_name="mine.json")
    assert close(logits(loaded), logits(model))


def test_a_device_map_without_accelerate(saved, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install accelerate"):
        load_quantized_model(saved[1], saved[2], device_map="auto")
