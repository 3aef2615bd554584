import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from fewbit.checkpoint import layout
from fewbit.errors import CheckpointError, KernelError
from fewbit.kernels.conv import QuantConv2d
from fewbit.kernels.linear import QuantizedWeight, QuantLinear
from fewbit.kernels.spec import KernelSpec
from tiny_gptq import random_codes


def layer_of(bits=4, dtype=torch.bfloat16, order=False, bias=True):
    codes = random_codes(48, 96, bits, 32, order=order)
    return QuantLinear.from_codes(codes, torch.randn(48) if bias else None, compute_dtype=dtype)


def saved(layer):
    return {name: tensor.clone() for name, tensor in layer.state_dict().items() if name != "bias"}


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a
    )


def test_is_a_linear_layer_without_a_dense_weight():
    layer = layer_of()
    assert isinstance(layer, nn.Linear)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert set(saved(layer)) == set(layout.PARTS)
    assert (layer.QUANT_TYPE, layer.bits, layer.group_size, layer.sym, layer.desc_act) == (
        "fewbit",
        4,
        32,
        False,
        False,
    )
    assert layer.checkpoint_format == "gptq"
    assert "kernel='reference'" in repr(layer)


def test_codes_come_back():
    codes = random_codes(48, 96, 3, 32, order=True)
    layer = QuantLinear.from_codes(codes, fmt="gptq_v2", compute_dtype=torch.bfloat16)
    layer.prepare()
    found = layer.codes()
    for name in ("codes", "scales", "zeros", "g_idx"):
        assert torch.equal(getattr(found, name), getattr(codes, name)), name
    assert found.dequantize().equal(codes.dequantize())


def test_weight_dequantizes_only_for_its_numbers(monkeypatch):
    layer = layer_of()
    calls = []
    original = type(layer).dequantize
    monkeypatch.setattr(type(layer), "dequantize", lambda self, *a: calls.append(1) or original(self, *a))
    weight = layer.weight
    assert (weight.shape, weight.dtype, weight.device.type) == ((48, 96), torch.bfloat16, "cpu")
    assert "48, 96" in repr(weight)
    assert not calls
    assert torch.equal(weight + 0, layer.codes().dequantize(torch.bfloat16))
    assert torch.equal(weight.data.float(), layer.dequantize(torch.bfloat16).float())
    assert torch.equal(functional.linear(torch.eye(96).bfloat16(), weight).t(), original(layer))
    assert calls


def test_weight_cannot_be_changed():
    weight = layer_of().weight
    with pytest.raises(KernelError, match=r"cannot be changed in place"):
        weight.add_(1)
    assert isinstance(weight, QuantizedWeight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_casting_never_touches_the_stored_tensors(bits):
    layer = layer_of(bits, torch.float32)
    before = saved(layer)
    layer.prepare()
    for dtype, kernel in (
        (torch.bfloat16, "cpu"),
        (torch.float16, "cpu"),
        (torch.float64, "reference"),
        (torch.bfloat16, "cpu"),
    ):
        layer.to(dtype)
        assert (layer.compute_dtype, layer.weight.dtype, layer.bias.dtype) == (dtype,) * 3
        assert layer.kernel.name == kernel
        assert same(saved(layer), before)
    assert same(saved(layer.half()), before)


def test_a_named_kernel_is_not_replaced_silently():
    layer = layer_of()
    layer.prepare("cpu_a16")
    before = saved(layer)
    with pytest.raises(KernelError, match=r"activations are float64"):
        layer.to(torch.float64)
    assert layer.kernel.name == "cpu_a16"
    assert same(saved(layer), before)


def test_kernel_is_forgotten_on_the_meta_device():
    layer = layer_of()
    layer.prepare()
    layer.to("meta")
    assert layer.kernel.name == "reference"
    assert layer.weight.is_meta


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(duplicate):
    layer = layer_of(order=True)
    layer.prepare()
    other = duplicate(layer)
    x = torch.randn(3, 96).bfloat16()
    assert torch.equal(other(x), layer(x))
    assert same(saved(other), saved(layer))


def test_load_state_dict_into_a_prepared_layer():
    layer, other = layer_of(order=True), QuantLinear.from_codes(random_codes(48, 96, 4, 32, seed=9))
    layer.prepare()
    layer.load_state_dict(other.state_dict() | {"bias": torch.zeros(48)})
    assert layer.kernel.name == "cpu"
    assert same(saved(layer), saved(other))
    x = torch.eye(96).bfloat16()
    assert (layer(x).t() - other.dequantize(torch.float32)).abs().max() < 0.02


def test_tensors_that_do_not_fit_are_refused():
    spec = KernelSpec(bits=4, group_size=32, sym=True, act_order=False, in_features=96, out_features=40)
    with pytest.raises(CheckpointError, match=r"not the tensors of a quantized layer.*qweight has shape"):
        QuantLinear(spec, layout.pack(random_codes(48, 96), "gptq"))


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_convolution(padding_mode):
    dense = nn.Conv2d(3, 8, (2, 3), stride=2, padding=1, padding_mode=padding_mode)
    codes = random_codes(8, 18, 4, 8)
    dense.weight = nn.Parameter(codes.dequantize().view(8, 3, 2, 3))
    spec = KernelSpec(4, 8, False, False, 18, 8, kind="conv2d")
    layer = QuantConv2d(spec, layout.pack(codes, "gptq"), dense, dense.bias.detach())
    layer.prepare()
    x = torch.randn(2, 3, 9, 9, requires_grad=True)
    assert isinstance(layer, nn.Conv2d)
    assert layer.weight.shape == (8, 3, 2, 3)
    assert torch.equal(layer(x), dense(x))
    layer(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_grouped_convolution_is_refused():
    spec = KernelSpec(4, -1, False, False, 9, 4, kind="conv2d")
    with pytest.raises(CheckpointError, match=r"4 groups cannot be quantized"):
        QuantConv2d(spec, layout.pack(random_codes(4, 9, 4, -1), "gptq"), nn.Conv2d(4, 4, 3, groups=4))
