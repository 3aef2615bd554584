"""GPTQModel's kernels behind fewbit's interface: reasons, and the life of a layer with a stand-in for the package."""

import copy
import dataclasses
import importlib.util
import sys
import types

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPTQConfig

import fewbit
from fewbit.checkpoint import layout
from fewbit.errors import KernelError
from fewbit.hf.quantized_layers import quantized_layers
from fewbit.kernels import registry
from fewbit.kernels.linear import QuantLinear
from fewbit.kernels.providers import PROVIDERS
from fewbit.kernels.spec import KernelSpec
from tiny_gptq import llama, random_codes, write_checkpoint

SPEC = KernelSpec(bits=4, group_size=64, sym=True, act_order=False, in_features=256, out_features=128)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BY_NAME = {provider.name: provider for provider in PROVIDERS}
AVAILABLE = [provider for provider in PROVIDERS if provider.layer_class]


def unsupported_reason(name, change=None, device=CUDA, dtype=torch.bfloat16):
    return BY_NAME[name].unsupported_reason(dataclasses.replace(SPEC, **change or {}), device, dtype, False)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("marlin", {"kind": "conv2d"}, "the layer is a conv2d, not a linear layer"),
        ("marlin", {"bits": 3}, "bits 3 is not 4 or 8"),
        ("marlin", {"group_size": 256}, "group_size 256 is not one of -1, 32, 64, 128"),
        ("marlin", {"sym": False}, "asymmetric"),
        ("marlin", {"act_order": True, "even_groups": False}, "g_idx gives some groups more or fewer"),
        ("marlin", {"out_features": 24}, "shape 24 x 256 (out x in) is not a multiple of 32 x 64"),
        ("marlin", {"in_features": 160}, "shape 128 x 160 (out x in) is not a multiple of 32 x 64"),
        ("machete", {"group_size": 32}, "group_size 32 is not one of -1, 64, 128"),
        ("machete", {"out_features": 64}, "shape 64 x 256"),
        ("exllamav2", {"bits": 8}, "bits 8 is not 4"),
        ("exllama", {}, "no current package has it (superseded by exllama_v2)"),
        ("tritonv2", {"bits": 3}, "bits 3 is not one of 2, 4, 8"),
    ],
)
def test_the_first_condition_that_fails(name, change, words):
    assert words in unsupported_reason(name, change)


@pytest.mark.parametrize("provider", AVAILABLE, ids=lambda provider: provider.name)
def test_device_dtype_and_package_are_conditions(provider, monkeypatch):
    other = CPU if provider.device == "cuda" else CUDA
    right = torch.device(provider.device)
    assert unsupported_reason(provider.name, device=other) == f"device is {other}, not {right}"
    assert "activations are float32, not " in unsupported_reason(
        provider.name, device=right, dtype=torch.float32
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    missing = "the package gptqmodel is not installed (pip install gptqmodel)"
    assert unsupported_reason(provider.name, device=right) == missing
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: object())
    assert unsupported_reason(provider.name, device=right) is None


def test_refusal_names_the_kernels_that_can_run():
    words = r"kernel 'marlin' cannot run a layer of 4 bits.*: device is cpu, not cuda\. Kernels that can: \w+"
    with pytest.raises(KernelError, match=words):
        registry.choose(SPEC, CPU, torch.bfloat16, "marlin")


class StandIn(nn.Module):
    """Takes, prepares and computes as GPTQModel's classes do; its own qweight is gone after `post_init`."""

    REQUIRES_FORMAT_V2 = True

    def __init__(self, *, bits, group_size, desc_act, sym, in_features, out_features, bias, dtype, **kwargs):
        super().__init__()
        assert kwargs == {"pack_dtype": torch.int32, "register_buffers": True}
        assert not bias
        groups = 1 if group_size == -1 else in_features // group_size
        self.args = (bits, group_size, in_features, out_features)
        self.register_buffer(
            "qweight", torch.zeros(in_features * bits // 32, out_features, dtype=torch.int32)
        )
        self.register_buffer("qzeros", torch.zeros(groups, out_features * bits // 32, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(groups, out_features, dtype=torch.float16))
        self.register_buffer("g_idx", torch.zeros(in_features, dtype=torch.int32))
        self.format, self.dense, self.scratch = 1, None, None

    @classmethod
    def validate(cls, **asked):
        assert asked["pack_dtype"] == torch.int32
        return True, None

    def qzero_format(self, format):
        self.format = format

    def temp_dq_size(self):
        return 1024

    def post_init(self, scratch_space=None):
        assert not self.training
        self.scratch = scratch_space
        tensors = {name: getattr(self, name) for name in layout.PARTS}
        bits, group_size, n, m = self.args
        fmt = "gptq_v2" if self.format == 2 else "gptq"
        self.dense = layout.unpack(tensors, bits, group_size, fmt, n, m).dequantize(torch.float32)
        self.qweight = torch.empty(0)

    def forward(self, x):
        assert x.dtype in (torch.float16, torch.bfloat16)
        return (x.float() @ self.dense.t()).to(x.dtype)


class ScratchSpace:
    def __init__(self, scratch_bytes, dev):
        self.scratch_bytes = scratch_bytes


@pytest.fixture
def package(monkeypatch):
    """A `gptqmodel` with a class of its own for every provider."""
    classes = {}
    for provider in AVAILABLE:
        module, _, name = provider.layer_class.partition(":")
        classes[provider.name] = type(name, (StandIn,), {"REQUIRES_FORMAT_V2": provider.name != "marlin"})
        stand_in = types.ModuleType(f"gptqmodel.nn_modules.qlinear.{module}")
        setattr(stand_in, name, classes[provider.name])
        monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    exllama = types.ModuleType("gptqmodel.utils.exllamav2")
    exllama.ScratchSpace = ScratchSpace
    monkeypatch.setitem(sys.modules, exllama.__name__, exllama)
    for name in ("gptqmodel", "gptqmodel.utils", "gptqmodel.nn_modules", "gptqmodel.nn_modules.qlinear"):
        parent = types.ModuleType(name)
        parent.__path__ = []
        parent.__spec__ = importlib.util.spec_from_loader(name, None)
        monkeypatch.setitem(sys.modules, name, parent)
    return classes


def opened(name, codes, monkeypatch, sym=False):
    """A layer on that kernel, as if the CPU were the device that it runs on."""
    device = dataclasses.replace(BY_NAME[name], device="cpu")
    entries = tuple(device if entry.name == name else entry for entry in registry._ENTRIES)
    monkeypatch.setattr(registry, "_ENTRIES", entries)
    layer = QuantLinear.from_codes(codes, torch.randn(codes.shape[0]), sym=sym, compute_dtype=torch.bfloat16)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    layer.prepare(name)
    assert layer.kernel.name == name
    return layer, before


@pytest.mark.parametrize("provider", AVAILABLE, ids=lambda provider: provider.name)
@pytest.mark.parametrize("order", [False, True])
def test_a_layer_on_a_wrapped_kernel(provider, order, package, monkeypatch):
    codes = random_codes(128, 128, 4, 64, order=order, sym=provider.needs_symmetry)
    layer, before = opened(provider.name, codes, monkeypatch, sym=provider.needs_symmetry)
    x = torch.randn(3, 5, 128)
    truth = x.bfloat16().float() @ codes.dequantize().t() + layer.bias.detach()
    assert torch.allclose(layer(x.bfloat16()).float(), truth, rtol=0.02, atol=0.05)
    assert layer(x).dtype == torch.float32  # computed in the layer's dtype, given back in x's
    assert layer(x[:0]).shape == (0, 5, 128)
    after = layer.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    twin = copy.deepcopy(layer)
    assert twin.kernel._layer is not layer.kernel._layer
    assert torch.equal(twin(x), layer(x))
    layer.restore()
    assert torch.equal(layer.qweight, before["qweight"])


def test_gradients_are_those_of_the_dequantized_weight(package, monkeypatch):
    codes = random_codes(128, 128, 4, 64)
    layer, _ = opened("torch_aten", codes, monkeypatch)
    x = torch.randn(2, 3, 128, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    truth = torch.ones(2, 3, 128, dtype=torch.bfloat16) @ codes.dequantize(torch.bfloat16)
    assert torch.equal(x.grad, truth)


def test_layers_of_one_size_share_scratch_memory(package, monkeypatch):
    codes = random_codes(128, 128, 4, 64)
    first, second = (opened("exllamav2", codes, monkeypatch)[0] for _ in range(2))
    assert first.kernel._layer.scratch is second.kernel._layer.scratch
    assert opened("tritonv2", codes, monkeypatch)[0].kernel._layer.scratch is None


def test_a_layer_returns_to_fewbits_kernel(package, monkeypatch):
    layer, before = opened("torch_aten", random_codes(128, 128, 4, 64), monkeypatch)
    with pytest.raises(KernelError, match=r"activations are float32, not float16 or bfloat16"):
        layer.float()
    layer.prepare("auto")
    assert layer.kernel in registry.KERNELS
    assert torch.equal(layer.state_dict()["qweight"], before["qweight"])


def test_ignored_zero_points_are_refused(package, monkeypatch):
    with pytest.raises(KernelError, match=r"kernel 'marlin' ignores zero points, .* that are not 8 although"):
        opened("marlin", random_codes(128, 128, 4, 64, sym=False), monkeypatch, sym=True)


def test_scales_outside_float16_are_refused(package, monkeypatch):
    codes = random_codes(128, 128, 4, 64)
    codes = dataclasses.replace(codes, scales=torch.full_like(codes.scales, 1e-9, dtype=torch.bfloat16))
    with pytest.raises(KernelError, match=r"kernel 'torch_aten' keeps scales in float16"):
        opened("torch_aten", codes, monkeypatch)


def refuse(**asked):
    return False, NotImplementedError("only on machines with AVX512\nand more")


def fail(self, **kwargs):
    raise RuntimeError("nvcc was not found\nlong log")


def other_tensors(self, *args, **kwargs):
    return types.SimpleNamespace(missing_keys=["qweight"], unexpected_keys=[])


@pytest.mark.parametrize(
    ("change", "value", "words"),
    [
        ("validate", staticmethod(refuse), r"'torch_aten': gptqmodel refuses the layer: only on .* AVX512$"),
        ("post_init", fail, r"'torch_aten': gptqmodel cannot prepare its layer: nvcc was not found$"),
        ("load_state_dict", other_tensors, r"this version of gptqmodel keeps other tensors than qweight"),
    ],
)
def test_errors_quote_the_package(change, value, words, package, monkeypatch):
    setattr(package["torch_aten"], change, value)
    with pytest.raises(KernelError, match=words):
        opened("torch_aten", random_codes(128, 128, 4, 64), monkeypatch)


def test_another_version_or_a_broken_install(package, monkeypatch):
    name = "gptqmodel.nn_modules.qlinear.torch_aten_kernel"
    delattr(sys.modules[name], "TorchAtenLinear")
    with pytest.raises(
        KernelError, match=r"this version of gptqmodel has no TorchAtenLinear; fewbit knows .* 7\.7"
    ):
        BY_NAME["torch_aten"].open(SPEC, CPU, torch.bfloat16)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(KernelError, match=r"gptqmodel is installed but does not import: import of .* halted"):
        BY_NAME["torch_aten"].open(SPEC, CPU, torch.bfloat16)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, llama(hidden_size=128))
    return folder


def test_loading_takes_every_name(checkpoint):
    layers = dict(quantized_layers(fewbit.load(checkpoint, dtype=torch.bfloat16, kernel="torch")))
    assert {layer.kernel.name for layer in layers.values()} == {"reference"}
    layers = dict(quantized_layers(fewbit.load(checkpoint, kernel="auto_trainable")))
    assert all(layer.trainable for layer in layers.values())
    for name, words in (
        ("exllama_v2", "kernel 'exllamav2' cannot run .*: device is cpu, not cuda"),
        ("GPTQ_TRITON", "kernel 'triton' cannot run .*: device is cpu, not cuda"),
        ("exllama", "no current package has it"),
        ("sglang", "sglang is an engine, not a kernel"),
    ):
        with pytest.raises(KernelError, match=words):
            fewbit.load(checkpoint, kernel=name)


def test_transformers_takes_every_name(checkpoint):
    fewbit.register()
    try:
        config = GPTQConfig(bits=4, backend="torch")
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, quantization_config=config, dtype=torch.bfloat16
        )
        assert {layer.kernel.name for _, layer in quantized_layers(model)} == {"reference"}
        with pytest.raises(KernelError, match=r"'machete' cannot run .*: device is cpu, not cuda"):
            AutoModelForCausalLM.from_pretrained(
                checkpoint, quantization_config=GPTQConfig(bits=4, backend="machete")
            )
    finally:
        fewbit.unregister()


def test_a_whole_model_on_a_wrapped_kernel(checkpoint, package):
    truth = fewbit.load(checkpoint, dtype=torch.bfloat16, kernel="reference")
    model = fewbit.load(checkpoint, dtype=torch.bfloat16, kernel="torch_aten")
    assert {layer.kernel.name for _, layer in quantized_layers(model)} == {"torch_aten"}
    ids = torch.arange(20)[None]
    with torch.no_grad():
        found, wanted = model(ids).logits.float(), truth(ids).logits.float()
    assert (found - wanted).norm() / wanted.norm() < 0.05
    saved, original = model.state_dict(), truth.state_dict()
    assert all(torch.equal(saved[name], original[name]) for name in original)
