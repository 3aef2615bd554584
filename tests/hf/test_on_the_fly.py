"""`from_pretrained` quantizes with fewbit; every argument of `GPTQConfig` has its meaning, or the log says why not."""

import json
import logging
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GPTQConfig, PreTrainedModel, pipeline

import fewbit
from fewbit.errors import CalibrationError, CheckpointError, ConfigError, KernelError
from fewbit.hf.quantized_layers import quantized_layers
from fewbit.verification import verify
from models import TEXT, save_tiny, tiny_tokenizer
from moe_models import save_tiny_moe

TEXTS = [TEXT[start : start + 90] for start in range(0, 200, 50)]
IDS = torch.arange(5, 25)[None]
USUAL = {"bits": 4, "group_size": 16, "model_seqlen": 64}


@pytest.fixture(autouse=True)
def registered():
    fewbit.register()
    yield
    fewbit.unregister()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("source"))


def quantized(source, device_map=None, **arguments):
    config = GPTQConfig(**{**USUAL, "dataset": TEXTS, **arguments})
    return AutoModelForCausalLM.from_pretrained(source, device_map=device_map, quantization_config=config)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def layers(model):
    return dict(quantized_layers(model))


def same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def reference(source):
    """What fewbit itself makes of it."""
    model = AutoModelForCausalLM.from_pretrained(source)
    config = fewbit.QuantConfig(bits=4, group_size=16, damp=0.1, seq_len=64, num_samples=len(TEXTS))
    return fewbit.quantize(model, config, dataset=TEXTS, tokenizer=str(source))


@pytest.mark.parametrize("device_map", [None, "auto"])
def test_the_same_bytes_as_fewbit(source, reference, device_map):
    model = quantized(source, device_map, tokenizer=tiny_tokenizer() if device_map else str(source))
    assert same(model, reference)
    assert model.hf_quantizer.pre_quantized
    assert model.hf_quantizer.quantization_config is model.config.quantization_config


def test_saving_loading_generating(source, tmp_path):
    model = quantized(source)  # the tokenizer is the one beside the model
    dense = AutoModelForCausalLM.from_pretrained(source)
    assert model.get_memory_footprint() < dense.get_memory_footprint()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    for folder in (tmp_path / "one", tmp_path / "many"):
        assert not verify(folder).problems
        assert same(AutoModelForCausalLM.from_pretrained(folder), model)
        assert same(fewbit.load(folder), model)
    assert model.generate(IDS, min_new_tokens=3, max_new_tokens=3).shape == (1, 23)
    generate = pipeline("text-generation", model=str(tmp_path / "one"), tokenizer=tiny_tokenizer())
    assert generate("It is", max_new_tokens=3)[0]["generated_text"].startswith("It is")
    with pytest.raises(ValueError, match=r"cannot cast a GPTQ model"):
        model.to(torch.bfloat16)
    assert torch.equal(logits(model.to("cpu")), logits(model))


@pytest.mark.parametrize("family", ["t5", "mixtral"])
def test_other_kinds_of_model(family, tmp_path):
    folder = save_tiny(tmp_path / "m", family) if family == "t5" else save_tiny_moe(tmp_path / "m", family)
    kind = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    config = GPTQConfig(**USUAL, dataset=TEXTS, sym=False, format="gptq_v2")
    model = kind.from_pretrained(folder, quantization_config=config)
    model.save_pretrained(tmp_path / "v2")
    kind.from_pretrained(tmp_path / "v2").save_pretrained(tmp_path / "v1")
    inputs = {"input_ids": IDS, **({"decoder_input_ids": IDS[:, :4]} if family == "t5" else {})}
    with torch.no_grad():
        for name in ("v1", "v2"):
            assert not verify(tmp_path / name).problems
            again = kind.from_pretrained(tmp_path / name)
            assert len(layers(again)) == len(layers(model)) > 30
            assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_a_dict_works_too(source, reference, tmp_path):
    (tmp_path / "notes.txt").write_text(TEXT)
    asked = {"quant_method": "gptq", **USUAL, "dataset": TEXTS}
    assert same(AutoModelForCausalLM.from_pretrained(source, quantization_config=asked), reference)
    asked = {"quant_method": "gptq", "bits": 2, "dataset": str(tmp_path / "notes.txt")}
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=asked)
    assert {(layer.bits, layer.group_size) for layer in layers(model).values()} == {(2, 128)}


def test_which_layers(source, tmp_path):
    names = [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.up_proj"]]
    model = quantized(source, modules_in_block_to_quantize=names, block_name_to_quantize="model.layers")
    assert {name.split(".", 3)[3] for name in layers(model)} == {name for group in names for name in group}
    assert model.config.quantization_config.to_dict()["modules_in_block_to_quantize"] == names
    model.save_pretrained(tmp_path)
    assert not verify(tmp_path).problems
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    with pytest.raises(ConfigError, match=r"no list of blocks.*its layers are called"):
        quantized(source, block_name_to_quantize="transformer.h")


def test_rules_per_layer(source, tmp_path):
    dynamic = {
        r"-:.*\.1\.mlp\.up_proj": {},
        r"+:.*\.up_proj": {"bits": 8, "desc_act": True, "damp_percent": 0.2},
    }
    model = quantized(source, dynamic=dynamic)
    found = layers(model)
    assert "model.layers.1.mlp.up_proj" not in found
    assert {name: layer.bits for name, layer in found.items() if layer.bits != 4} == {
        "model.layers.0.mlp.up_proj": 8
    }
    assert found["model.layers.0.mlp.up_proj"].desc_act
    model.save_pretrained(tmp_path)
    assert not verify(tmp_path).problems
    with pytest.raises(ConfigError, match=r"has no setting 'mse'"):
        quantized(source, dynamic={".*": {"mse": 2.4}})


@pytest.mark.parametrize("rule", [None, "skip", [4]])
def test_a_rule_that_holds_no_settings_is_refused(source, rule):
    with pytest.raises(ConfigError, match=r"dynamic '.\*q_proj' must hold settings"):
        quantized(source, dynamic={".*q_proj": rule})


def test_a_rule_for_the_output_embedding_asks_for_it(source):
    model = quantized(source, dynamic={"lm_head": {"bits": 8}})
    assert model.lm_head.spec.bits == 8


@pytest.mark.parametrize("tie", [False, True])
def test_the_output_embedding_too(tie, tmp_path):
    source = save_tiny(tmp_path / "source", tie_word_embeddings=tie)
    model = quantized(source, lm_head=True, dynamic={"lm_head": {"bits": 8}})
    found = layers(model)
    assert (found["lm_head"].bits, found["model.layers.0.mlp.up_proj"].bits) == (8, 4)
    assert model.config.quantization_config.to_dict()["lm_head"] is True
    model.save_pretrained(tmp_path / "out")
    assert not verify(tmp_path / "out").problems
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    only = quantized(source, lm_head=True, modules_in_block_to_quantize=[["mlp.up_proj"]])
    assert {name.rpartition(".")[2] for name in layers(only)} == {"up_proj", "lm_head"}


def test_quantize_config_beside_the_weights(source, tmp_path):
    model = quantized(source, sym=False, format="gptq_v2")
    model.save_pretrained(tmp_path / "out")
    second = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert second == config["quantization_config"]
    assert second["checkpoint_format"] == "gptq_v2"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]  # where transformers 4 looks
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "quantize_config.json").exists()
    fewbit.unregister()
    assert PreTrainedModel.save_pretrained.__module__ == "transformers.modeling_utils"
    assert not hasattr(PreTrainedModel.save_pretrained, "__wrapped__")
    model.save_pretrained(tmp_path / "after")
    assert not (tmp_path / "after" / "quantize_config.json").exists()


def test_how_layers_are_quantized(source, tmp_path):
    settings = {"sym": False, "desc_act": True, "damp_percent": 0.05, "bits": 3, "format": "gptq_v2"}
    model = quantized(source, **settings, meta={"made for": "a test"}, batch_size=2, pad_token_id=0)
    layer = next(iter(layers(model).values()))
    assert (layer.bits, layer.sym, layer.desc_act, layer.checkpoint_format) == (3, False, True, "gptq_v2")
    written = model.config.quantization_config.to_dict()
    assert {key: written[key] for key in settings} == settings
    assert written["meta"]["made for"] == "a test"
    assert not {"dataset", "tokenizer"} & written.keys()
    model.save_pretrained(tmp_path)
    assert torch.equal(
        load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.up_proj.qzeros"],
        model.state_dict()["model.layers.0.mlp.up_proj.qzeros"],
    )
    assert quantized(source, checkpoint_format="GPTQ_V2").config.quantization_config.format == "gptq_v2"


def test_kernels(source):
    model = quantized(source, backend="auto_trainable")
    assert all(layer.trainable for layer in layers(model).values())
    assert model.config.quantization_config.backend == "auto_trainable"
    with pytest.raises(KernelError, match=r"'marlin' cannot run"):
        quantized(source, backend="marlin")


def test_what_is_not_needed_is_said_once(source, reference, caplog):
    arguments = {
        "true_sequential": False,
        "module_name_preceding_first_block": ["model.embed_tokens"],
        "cache_block_outputs": False,
        "max_input_length": 4096,
        "use_exllama": False,
        "exllama_config": {"version": 2},
        "max_memory": {"cpu": "1GB"},
        "lm_head": False,
        "colour": "blue",
    }
    with caplog.at_level(logging.WARNING, "fewbit"):
        model = quantized(source, **arguments)
    assert same(model, reference)
    said = [record.getMessage() for record in caplog.records]
    for argument in arguments.keys() - {"true_sequential", "lm_head"}:
        assert sum(argument in message for message in said) == 1, argument
    assert any("colour: unknown to fewbit and without effect" in message for message in said)
    assert any("max_memory: belongs to from_pretrained" in message for message in said)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"dataset": None},
            CalibrationError,
            r"this model is not quantized.*GPTQConfig\(bits=4, dataset=…\)",
        ),
        ({"batch_size": 2}, CalibrationError, r"batch_size 2 needs a pad token"),
        ({"dataset": "no-such-set"}, ValueError, r"no-such-set"),
        ({"bits": 5}, ValueError, r"bits"),
        ({"tokenizer": "/no/such"}, CalibrationError, r"no/such"),
        ({"device_map": {"model": "cpu", "lm_head": "disk"}}, ConfigError, r"disk entries.*streams"),
    ],
)
def test_what_cannot_be(source, arguments, error, message):
    with pytest.raises(error, match=message):
        quantized(source, **arguments)


def test_a_dict_with_impossible_bits(source):
    with pytest.raises(CheckpointError, match=r"has bits 5"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config={"quant_method": "gptq", "bits": 5})


def test_transformers_own_configuration_is_as_it_was_without_fewbit():
    names = [["self_attn.q_proj"]]
    kept = GPTQConfig(bits=4, modules_in_block_to_quantize=names, dynamic={"-:x": {}}, lm_head=False)
    again = GPTQConfig.from_dict(kept.to_dict())
    assert (again.modules_in_block_to_quantize, again.dynamic, again.lm_head) == (names, {"-:x": {}}, False)
    fewbit.unregister()
    assert not hasattr(GPTQConfig(bits=4, dynamic={}), "dynamic")
    with pytest.raises(PackageNotFoundError, match="optimum"):
        GPTQConfig(bits=4, modules_in_block_to_quantize=names)


STUBS = """
import sys
from pathlib import Path

root = Path(sys.argv[2])
for package, version in (("optimum", "2.1.0"), ("gptqmodel", "7.7.0")):
    (root / package).mkdir()
    (root / package / "__init__.py").write_text("")
    info = root / f"{package}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {package}\\nVersion: {version}\\n")
(root / "optimum/gptq.py").write_text('''
class GPTQQuantizer:
    from_dict = classmethod(lambda cls, values: cls())

    def __getattr__(self, name):
        raise RuntimeError(f"optimum was asked to {name}")
''')
(root / "gptqmodel/nn_modules").mkdir()
(root / "gptqmodel/nn_modules/qlinear.py").write_text("class BaseQuantLinear: pass")
sys.path.insert(0, str(root))

import torch
from transformers import AutoModelForCausalLM, GPTQConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
import fewbit

def state():
    methods = dict(vars(GPTQConfig))
    methods.pop("__slotnames__", None)  # left by copy
    return AUTO_QUANTIZER_MAPPING["gptq"], methods

before = state()
def load():
    config = GPTQConfig(bits=4, group_size=16, dataset=["some words"], model_seqlen=64)
    return AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config)

fewbit.register()
model = load()
assert type(model.model.layers[0].mlp.up_proj).__module__.startswith("fewbit")
fewbit.unregister()
assert before == state()
try:
    load()
except RuntimeError as error:
    assert str(error) == "optimum was asked to quantize_model", error
else:
    raise SystemExit("unregister did not give back")
import peft
adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj"], r=2))
adapted(input_ids=torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
"""


@pytest.mark.slow
def test_where_optimum_and_gptqmodel_are_installed_too(source, tmp_path):
    environment = {"PYTHONPATH": str(Path(fewbit.__file__).parents[1]), "PATH": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STUBS, str(source), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
