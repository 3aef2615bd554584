import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fewbit
from fewbit.errors import CheckpointError, ConfigError, DependencyError, KernelError
from fewbit.hf.load import kernels
from fewbit.kernels.linear import QuantizedLayer
from tiny_gptq import FAMILIES, alike, llama, logits, write_checkpoint


def distance(model, truth):
    return (logits(model) - logits(truth)).norm().item()


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}


def repacked_with_padding(name, tensors):
    """As some writers do: both packed axes as for a multiple of 32 values, filled with ones."""
    qweight, qzeros = tensors["qweight"], tensors["qzeros"]
    rows, columns = -qweight.shape[0] % 4, -qzeros.shape[1] % 4
    return tensors | {
        "qweight": nn.functional.pad(qweight, (0, 0, 0, rows), value=-1),
        "qzeros": nn.functional.pad(qzeros, (0, columns), value=-1),
    }


ODD = {"hidden_size": 88, "intermediate_size": 184}
STYLES = {
    "v1": {},
    "v2": {"fmt": "gptq_v2"},
    "no g_idx": {"without": ("g_idx",)},
    "act-order": {"order": True},
    "padded": {"change": repacked_with_padding},
    "padded, no g_idx": {"change": repacked_with_padding, "without": ("g_idx",), "group_size": -1},
    "bfloat16 scales": {"change": lambda n, t: t | {"scales": (t["scales"] * 0 + 0.01).bfloat16()}},
    "int64 g_idx": {"change": lambda n, t: t | {"g_idx": t["g_idx"].long()}},
    "sym absent": {"quantization": {"sym": None, "desc_act": None, "checkpoint_format": None}},
    "2 bits": {"bits": 2, "group_size": 32},
    "3 bits, one group": {"bits": 3, "group_size": -1},
    "8 bits": {"bits": 8, "group_size": 96},
    "AutoGPTQ": {"legacy": True},
    "AutoGPTQ, sharded": {"legacy": True, "shards": 2},
    "sharded": {"shards": 3},
    "lm_head": {"lm_head": True},
    "per layer": {
        "override": {"down_proj": (8, 64), "o_proj": (3, 32)},
        "quantization": {
            "dynamic": {
                r"+:model\.layers\.\d+\.mlp\.down_proj$": {"bits": 8, "group_size": 64},
                r".*\.o_proj$": {"bits": 3},
            }
        },
    },
}


@pytest.mark.parametrize("style", STYLES)
def test_logits_are_those_of_the_dequantized_model(tmp_path, style):
    truth = llama(**(ODD if "padded" in style else {}))
    written = write_checkpoint(tmp_path / "a", truth, **STYLES[style])
    model = fewbit.load(tmp_path / "a", kernel="reference")
    assert len(layers(model)) == 14 + (style == "lm_head")
    assert not model.training
    if style == "bfloat16 scales":
        for name, layer in layers(model).items():
            truth.get_submodule(name).weight = nn.Parameter(layer.codes().dequantize())
    assert torch.equal(logits(model), logits(truth))
    assert alike(fewbit.load(tmp_path / "a"), truth)

    fast = fewbit.load(tmp_path / "a", dtype="bfloat16")
    dense = copy.deepcopy(truth).bfloat16()
    assert distance(fast, truth) < 3 * distance(dense, truth)  # random layers amplify rounding
    fast.config.quantization_config.format = next(iter(layers(fast).values())).spec.format  # not always v1
    fast.save_pretrained(tmp_path / "b")
    saved = load_file(tmp_path / "b" / "model.safetensors")
    assert saved.keys() == written.keys()
    for name, tensor in saved.items():
        if name.rpartition(".")[2] in ("qweight", "qzeros", "scales", "g_idx"):
            assert tensor.dtype == written[name].dtype
            assert torch.equal(tensor, written[name]), name
    again = fewbit.load(tmp_path / "b", dtype="bfloat16")
    assert torch.equal(logits(again), logits(fast))


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path, family):
    truth = FAMILIES[family]()
    write_checkpoint(tmp_path, truth, bits=4, group_size=32)
    model = fewbit.load(tmp_path, dtype="float32")
    assert type(model) is type(truth)
    assert torch.allclose(logits(model), logits(truth), atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(fewbit.load(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("lm_head", [False, True])
def test_tied_embeddings(tmp_path, lm_head):
    truth = llama(tie=True)
    if lm_head:  # a quantized head next to a dense embedding: the tie is only in the configuration
        truth.lm_head.weight = nn.Parameter(truth.lm_head.weight.detach().clone())
        truth.all_tied_weights_keys = {}
    write_checkpoint(tmp_path, truth, lm_head=lm_head)
    model = fewbit.load(tmp_path, kernel="reference")
    assert isinstance(model.lm_head, QuantizedLayer) == lm_head
    assert torch.equal(logits(model), logits(truth))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(fewbit.load(tmp_path / "again", kernel="reference")), logits(model))


def test_a_bias_that_only_the_checkpoint_has(tmp_path):
    def zero_bias(name, tensors):
        return tensors | {"bias": torch.full((tensors["scales"].shape[1],), 0.5)}

    truth = llama()
    write_checkpoint(tmp_path, truth, change=zero_bias)
    for module in truth.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.bias = nn.Parameter(torch.full((module.out_features,), 0.5))
    assert torch.equal(logits(fewbit.load(tmp_path, kernel="reference")), logits(truth))


def test_casting_does_not_change_what_is_saved(tmp_path):
    written = write_checkpoint(tmp_path / "a", llama())
    model = fewbit.load(tmp_path / "a")
    with pytest.raises(ValueError, match=r"cannot cast a GPTQ model"):
        model.to(torch.bfloat16)  # transformers' own rule; its parts can be cast
    nn.Module.to(model, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert kernels(model) == ["14 layers: cpu"]
    model.save_pretrained(tmp_path / "b")
    saved = load_file(tmp_path / "b" / "model.safetensors")
    quantized = [name for name in written if name.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))]
    assert len(quantized) == 56
    for name in quantized:
        assert saved[name].dtype == written[name].dtype
        assert torch.equal(saved[name], written[name])


def test_unknown_keys_survive_and_v1_is_written(tmp_path):
    extra = {"dynamic": {}, "meta": {"quantizer": ["other:1"]}, "pack_dtype": "int32", "damp_percent": 0.05}
    write_checkpoint(tmp_path / "a", llama(), fmt="gptq_v2", quantization=extra)
    before = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    fewbit.load(tmp_path / "a", kernel="reference").save_pretrained(tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["quantization_config"] == before | {"checkpoint_format": "gptq"}
    assert "transformers_weights" not in config


def test_memory_is_the_packed_size(tmp_path):
    model = fewbit.load(write(tmp_path, hidden_size=256, intermediate_size=512), dtype="bfloat16")
    dense = sum(2 * layer.in_features * layer.out_features for layer in layers(model).values())
    held = sum(b.nbytes for layer in layers(model).values() for b in layer.buffers())
    assert held < 0.45 * dense
    assert model.get_memory_footprint() < dense


def write(folder, **changes):
    write_checkpoint(folder, llama(**changes))
    return folder


def test_kernels_are_explained(tmp_path):
    write(tmp_path)
    (line,) = kernels(fewbit.load(tmp_path, dtype=torch.float64))
    assert line.startswith("14 layers: reference (cpu: activations are float64")
    model = fewbit.load(tmp_path, dtype=torch.bfloat16, kernel="reference")
    assert kernels(model) == ["14 layers: reference"]


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        ("triton", "kernel 'triton' cannot run a layer of 4 bits.*device is cpu, not cuda or xpu"),
        ("marlin", "kernel 'marlin' cannot run.*device is cpu, not cuda"),
        ("fast", "there is no kernel 'fast'"),
    ],
)
def test_a_kernel_that_cannot_run(tmp_path, kernel, words):
    with pytest.raises(KernelError, match=words):
        fewbit.load(write(tmp_path), kernel=kernel)


def test_unknown_dtype(tmp_path):
    with pytest.raises(ConfigError, match=r"dtype must be auto, float32, bfloat16, float16.*'int4'"):
        fewbit.load(write(tmp_path), dtype="int4")


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization_config": None}, "is not a quantized checkpoint"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quant_method 'awq'"),
        ({"quantization_config": {"bits": 4}}, "has no quant_method"),
        ({"architectures": ["NoSuchModel"]}, "has no model class NoSuchModel"),
        (
            {"architectures": ["NoSuchModel"], "auto_map": {"AutoModelForCausalLM": "m.NoSuchModel"}},
            "needs its own code for NoSuchModel; if you trust it, pass trust_remote_code=True",
        ),
        ({"model_type": "no_such"}, r"transformers \S+ does not know model_type 'no_such'"),
        (
            {"model_type": "no_such", "auto_map": {"AutoConfig": "m.NoSuchConfig"}},
            "needs its own code for model_type 'no_such'; if you trust it, pass trust_remote_code=True",
        ),
        ({"hidden_size": "wide"}, "cannot read the configuration in .*hidden_size"),
        ({"intermediate_size": 160}, "is 96 x 192 .* but the model has 96 x 160"),
    ],
)
def test_checkpoints_that_cannot_be_loaded(tmp_path, changes, words):
    write(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=words):
        fewbit.load(tmp_path)


def test_no_model_type(tmp_path):
    write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"no config.json that names a model_type"):
        fewbit.load(tmp_path)


def test_neither_folder_nor_repository(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        CheckpointError,
        match=r"someone/some-model is no local folder and cannot be downloaded from the Hub: no network",
    ):
        fewbit.load("someone/some-model")


def test_quantized_tensors_of_a_non_linear_layer(tmp_path):
    from safetensors.torch import save_file

    tensors = dict(write_checkpoint(tmp_path, llama()))
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        tensors[f"model.embed_tokens.{part}"] = tensors[f"model.layers.0.mlp.up_proj.{part}"]
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens, which is a Embedding"):
        fewbit.load(tmp_path)


def test_loading_changes_one_name_in_transformers(tmp_path):
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    before = {name: AUTO_QUANTIZER_MAPPING[name] for name in AUTO_QUANTIZER_MAPPING if name != "fewbit"}
    configs = {n: c for n, c in AUTO_QUANTIZATION_CONFIG_MAPPING.items() if n != "fewbit"}
    fewbit.load(write(tmp_path))
    fewbit.load(tmp_path)
    assert {n: c for n, c in AUTO_QUANTIZER_MAPPING.items() if n != "fewbit"} == before
    assert {n: c for n, c in AUTO_QUANTIZATION_CONFIG_MAPPING.items() if n != "fewbit"} == configs


def test_8_bits_are_not_read_as_padded_4_bits(tmp_path):
    write_checkpoint(tmp_path, llama(), bits=8, quantization={"bits": 4})
    with pytest.raises(CheckpointError, match=r"does not fit its configuration \(bits 4"):
        fewbit.load(tmp_path)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_a_device_map(tmp_path, device_map):
    truth = llama()
    write_checkpoint(tmp_path, truth)
    model = fewbit.load(tmp_path, device_map=device_map, max_memory={"cpu": "1GB"})
    assert alike(model, truth)


def test_a_device_map_needs_accelerate(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, llama())
    monkeypatch.setattr("fewbit.hf.load.importlib.util.find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"a device_map needs the package accelerate: pip install"):
        fewbit.load(tmp_path, device_map="auto")


def test_quantization_config_argument(tmp_path):
    truth = llama()
    write_checkpoint(tmp_path, truth)
    config = json.loads((tmp_path / "config.json").read_text())
    quantization = config.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"is not a quantized checkpoint"):
        fewbit.load(tmp_path)
    model = fewbit.load(tmp_path, quantization_config=quantization)
    assert alike(model, truth)
    assert model.config.quantization_config.to_dict() == quantization
