import copy
import pickle
from dataclasses import replace

import pytest
import torch

from fewbit.kernels.cpu.packed import Rounding
from fewbit.kernels.linear import QuantLinear
from tiny_gptq import random_codes

BITS = (2, 3, 4, 8)


def relative(found, truth):
    return ((found.double() - truth).norm() / truth.norm()).item()


def layer_of(codes, dtype, kernel="reference", bias=None, fmt="gptq"):
    layer = QuantLinear.from_codes(codes, bias, fmt, compute_dtype=dtype)
    layer.prepare(kernel)
    return layer


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("fmt", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(
    ("shape", "group_size", "order"),
    [((5, 70), 32, False), ((1, 33), -1, False), ((48, 96), 64, True), ((33, 1), 128, False)],
)
def test_reference_against_float64_with_odd_shapes(bits, fmt, shape, group_size, order):
    codes = random_codes(*shape, bits, group_size, order=order)
    bias = torch.randn(shape[0])
    layer = layer_of(codes, torch.float32, bias=bias, fmt=fmt)
    x = torch.randn(3, 2, shape[1])
    truth = x.double() @ codes.dequantize(torch.float64).t() + bias.double()
    assert relative(layer(x), truth) < 1e-6
    assert torch.equal(layer.dequantize(torch.float32), codes.dequantize())


def test_reference_gradient_is_that_of_a_dense_layer():
    codes = random_codes(24, 70, 3, 32, order=True)
    layer = layer_of(codes, torch.float64)
    x = torch.randn(4, 70, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("out_features", [16, 80, 192])
@pytest.mark.parametrize("kernel", ["cpu"])
def test_repacking_is_undone_bit_for_bit(bits, order, out_features, kernel):
    layer = QuantLinear.from_codes(
        random_codes(out_features, 128, bits, 64, order=order), compute_dtype=torch.bfloat16
    )
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.prepare(kernel)
    assert layer.kernel.name == kernel
    assert "qweight" not in dict(layer.named_buffers())
    during = layer.state_dict()
    assert torch.equal(layer.qweight, before["qweight"])
    layer.restore()
    for after in (during, layer.state_dict()):
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("kernel", ["cpu", "cpu_a8"])
@pytest.mark.parametrize("out_features", [1, 37, 48])
@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_are_stored_once_and_restored_exactly(kernel, out_features, scales):
    for group_size in (-1, 24):
        codes = random_codes(out_features, 100, 4, group_size)
        layer = QuantLinear.from_codes(replace(codes, scales=codes.scales.to(scales)))
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        expected = layer.dequantize()
        layer.prepare(kernel)
        assert "scales" not in dict(layer.named_buffers())
        assert layer.block_scales.numel() == -(-out_features // 16) * 16 * before["scales"].shape[0]
        for same in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(same.scales, before["scales"])
            assert torch.equal(same.dequantize(), expected)
            assert all(torch.equal(tensor, before[name]) for name, tensor in same.state_dict().items())
        other = QuantLinear.from_codes(random_codes(out_features, 100, 4, group_size, seed=1))
        other.prepare(kernel)
        other.load_state_dict(layer.state_dict())
        x = torch.randn(3, 100)
        assert (other(x) - layer(x)).norm() <= 5e-3 * layer(x).norm()
        layer.restore()
        assert layer.state_dict().keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
def test_operators_are_well_formed(kernel):
    layer = layer_of(random_codes(32, 64, 4, 32, order=True), torch.bfloat16, kernel)
    x = torch.randn(3, 64).bfloat16().requires_grad_()
    if kernel == "reference":
        op = torch.ops.fewbit.linear_reference.default
        args = (x, layer.qweight, layer.qzeros, layer.scales, layer.g_idx, 4, "gptq")
    else:
        op = torch.ops.fewbit.linear_packed.default
        args = (
            x,
            layer.tiles,
            layer.block_scales,
            layer.zeros,
            layer.order,
            layer.starts,
            4,
            64,
            32,
            torch.randn(32),
            int(Rounding.NONE),
        )
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("kernel", ["reference", "cpu", "cpu_a16", "cpu_a8"])
def test_compiles_to_one_graph(kernel):
    layer = layer_of(random_codes(32, 64, 4, 32), torch.bfloat16, kernel, bias=torch.randn(32))
    torch.compiler.reset()  # it counts the kernels of earlier tests, and gives up after eight
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 64).bfloat16()
    y = x.clone().requires_grad_()
    assert torch.equal(compiled(x), layer(x))
    compiled(y).sum().backward()
    assert y.grad is not None
