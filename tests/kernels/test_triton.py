"""The Triton kernel, in Triton's interpreter where there is no GPU."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fewbit.checkpoint import layout
from fewbit.kernels.linear import QuantLinear
from fewbit.kernels.reference import Reference
from fewbit.kernels.spec import KernelSpec
from fewbit.kernels.triton import fragments
from fewbit.kernels.triton.fragments import Fragments
from fewbit.kernels.triton.kernel import TritonKernel
from tiny_gptq import random_codes

pytest.importorskip("triton", reason="pip install triton")

from fewbit.kernels.triton.kernels import multiply
from fewbit.kernels.triton.tile_config import TileConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
GEMV = TileConfig("gemv", tokens=2, depth=64, warps=2)
SPLIT = TileConfig("gemv", tiles=2, depth=256, warps=1, split=2)
GEMM, DENSE = TileConfig("gemm", tiles=2, depth=64, split=2), TileConfig("dense")


def layer_of(codes, fmt="gptq", dtype=torch.float32, bias=None):
    """With the kernel's tensors; by hand, because the kernel itself refuses to be chosen for a CPU."""
    layer = QuantLinear.from_codes(codes, bias, fmt, compute_dtype=dtype).to(DEVICE)
    layer.prepare("reference")  # finds out about the groups
    for name, tensor in TritonKernel().repack(layer).items():
        layer.register_buffer(name, tensor, persistent=False)
    return layer


def fragments_of(layer):
    group = fragments.group_of(layer.order, layer.scales.shape[0], layer.group_size)
    return Fragments(layer.words, layer.zeros, layer.order, group)


def relative(found, truth):
    return ((found.double() - truth).norm() / truth.norm().clamp_min(1e-9)).item()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("shape", "group_size", "order"),
    [
        ((48, 128), 32, False),
        ((37, 100), 32, True),
        ((16, 64), -1, False),
        ((20, 33), 7, False),
        ((1, 1), -1, False),
        ((33, 192), 96, True),
        ((33, 512), 256, False),
    ],
)
def test_every_config_against_float64(bits, shape, group_size, order):
    layer = layer_of(random_codes(*shape, bits, group_size, order=order))
    weight, exact = fragments_of(layer), layer.codes().dequantize(torch.float64).t()
    configs = (
        (1, torch.float16, GEMV),
        (17, torch.bfloat16, SPLIT),
        (3, torch.float32, SPLIT),
        (17, torch.float16, GEMM),
        (2, torch.bfloat16, GEMM),
        (3, torch.bfloat16, DENSE),
    )
    # The interpreter is slow: each layer takes a third of the configs.
    for tokens, dtype, config in configs[(bits + shape[1]) % 3 :: 3]:
        x = (torch.randn(tokens, shape[1]) + 0.5).to(DEVICE, dtype)
        found = multiply(x, weight, layer.scales, bits, config)
        assert found.dtype == dtype
        assert relative(found, x.double() @ exact) < TOLERANCE[dtype], (tokens, dtype, config)


def test_x_with_a_large_mean_costs_no_accuracy():
    # Sums of x times bare codes are far larger than the result.
    layer = layer_of(random_codes(32, 512, 4, 128))
    for dtype, allowed in ((torch.float16, 1e-3), (torch.bfloat16, 5e-3)):
        x = (torch.randn(4, 512) + 20).to(DEVICE, dtype)
        found = multiply(x, fragments_of(layer), layer.scales, 4, GEMV)
        assert relative(found, x.double() @ layer.codes().dequantize(torch.float64).t()) < allowed


def test_padding_does_not_reach_results():
    # Padding and masked loads must not let an infinity in one token, or memory behind x, reach other results.
    layer = layer_of(random_codes(20, 33, 4, 7, order=True))
    rows = torch.full((4, 33), float("inf"), device=DEVICE)
    rows[1] = torch.randn(33)
    for config in (GEMV, SPLIT, GEMM, DENSE):
        found = multiply(rows, fragments_of(layer), layer.scales, 4, config)
        assert relative(found[1], rows[1].double() @ layer.codes().dequantize(torch.float64).t()) < 1e-5
        alone = multiply(rows[1:2], fragments_of(layer), layer.scales, 4, config)
        torch.testing.assert_close(alone[0], found[1])


@pytest.mark.parametrize("config", [SPLIT, GEMM, DENSE])
def test_reads_stay_inside_the_weight(config, monkeypatch):
    # 65 outputs are three tiles of 32, and these programs take two or four: the words that follow are not the weight's.
    layer = layer_of(random_codes(65, 128, 4, 64))
    found = []
    for garbage in (0, -1):
        memory = torch.full((4 * layer.words.numel(),), garbage, dtype=torch.int32, device=DEVICE)
        words = memory[: layer.words.numel()].view_as(layer.words).copy_(layer.words)
        weight = fragments_of(layer)._replace(words=words)
        x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.float16)
        addresses = []
        if DEVICE == "cpu":
            from triton.runtime import interpreter

            load = interpreter._interpreter.load

            def watched(pointers, mask, *rest, load=load, addresses=addresses):
                addresses.append(pointers[mask])
                return load(pointers, mask, *rest)

            monkeypatch.setattr(interpreter, "_interpreter", Watched(interpreter._interpreter, watched))
        found.append(multiply(x, weight, layer.scales, 4, config))
        monkeypatch.undo()
        after = memory.data_ptr() + 4 * layer.words.numel(), memory.data_ptr() + 4 * memory.numel()
        for read in addresses:
            assert not ((read >= after[0]) & (read < after[1])).any()
    assert torch.equal(*found)


class Watched:
    """Triton's interpreter with another `load`."""

    def __init__(self, interpreter, load):
        self._interpreter, self.load = interpreter, load

    def __getattr__(self, name):
        return getattr(self._interpreter, name)


@pytest.mark.parametrize("config", [GEMV, SPLIT, GEMM])
def test_the_same_config_gives_the_same_bytes(config):
    layer = layer_of(random_codes(33, 256, 4, 64))
    x = torch.randn(3, 256).to(DEVICE, torch.float16)
    found = [multiply(x, fragments_of(layer), layer.scales, 4, config) for _ in range(2)]
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dequantized_weights_are_the_reference_kernels(dtype):
    for bits in (2, 3, 4, 8):
        layer = layer_of(random_codes(37, 100, bits, 32, order=True))
        found = torch.ops.fewbit.dequantize_fragments(*fragments_of(layer)[:2], layer.scales, layer.order, bits,
                                                      fragments_of(layer).group, 100, dtype)  # fmt: skip
        # Triton's interpreter cuts bfloat16 off where a GPU rounds.
        allowed = (
            {"rtol": 2**-7, "atol": 0}
            if DEVICE == "cpu" and dtype == torch.bfloat16
            else {"rtol": 0, "atol": 0}
        )
        torch.testing.assert_close(found.t(), layer.dequantize(dtype), **allowed)


@pytest.mark.parametrize("fmt", ["gptq", "gptq_v2"])
def test_bias_and_shape(fmt):
    codes = random_codes(24, 70, 4, 32)
    layer = layer_of(codes, fmt, torch.float16, bias=torch.randn(24))
    x = torch.randn(2, 3, 70).to(DEVICE, torch.float16)
    found = TritonKernel().linear(x, layer)
    assert found.shape == (2, 3, 24)
    assert (
        relative(found, x.double() @ codes.dequantize(torch.float64).t().to(DEVICE) + layer.bias.double())
        < 2e-3
    )
    assert TritonKernel().linear(x[:, :0], layer).shape == (2, 0, 24)


@pytest.mark.parametrize("order", [False, True])
def test_prepare_copy_cast_and_save(monkeypatch, order):
    monkeypatch.setattr("fewbit.kernels.triton.kernel._DEVICES", (DEVICE,))
    codes = random_codes(20, 70, 3, 32, order=order)
    layer = QuantLinear.from_codes(codes, torch.randn(20), compute_dtype=torch.float16).to(DEVICE)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.prepare("triton")
    assert layer.kernel.name == "triton"
    assert "qweight" not in dict(layer.named_buffers())
    x = torch.randn(3, 70).to(DEVICE, torch.float16)
    truth = x.double() @ codes.dequantize(torch.float64).t().to(DEVICE) + layer.bias.double()
    assert relative(layer(x), truth) < 2e-3
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    twin.to(torch.bfloat16)
    assert twin.kernel.name == "triton"
    assert relative(twin(x.bfloat16()), truth) < 2e-2
    for saved in (layer.state_dict(), twin.state_dict()):
        assert saved.keys() == before.keys()
        assert all(torch.equal(saved[name], before[name]) for name in before if name != "bias")
    assert torch.equal(layer.codes().codes, codes.codes.to(DEVICE))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_point_0_in_v1(bits):
    codes = random_codes(48, 64, bits, 32)
    tensors = layout.pack(codes, "gptq")
    one = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits]
    zeros = codes.zeros.clone()
    zeros[::5] = 0
    # What GPTQModel writes: the packed zeros of v2 less one in every field, borrowing across fields.
    tensors["qzeros"] = layout.pack_zeros(zeros, bits, "gptq_v2") - one
    plain = QuantLinear.from_codes(codes).to(DEVICE)
    plain.load_state_dict(tensors)
    found = layer_of(plain.codes(), "gptq_v2")
    x = torch.eye(64, device=DEVICE)
    torch.testing.assert_close(TritonKernel().linear(x, found), Reference().linear(x, plain))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", [False, True])
def test_repacking_is_undone_bit_for_bit(bits, order):
    for shape, group_size in (((37, 100), 32), ((20, 33), 7), ((64, 512), 128), ((1, 1), -1)):
        layer = layer_of(random_codes(*shape, bits, group_size, order=order))
        assert torch.equal(TritonKernel().restore(layer), layer.qweight)


def test_groups_of_different_sizes_and_empty_ones():
    g_idx = torch.tensor([0] * 40 + [2] * 3 + [0] * 21)
    order = fragments.positions(g_idx, 32, 3)
    assert order.numel() == 3 * 64  # all padded to the largest, 61, which is 64 positions
    codes = torch.randint(0, 8, (5, 64), dtype=torch.uint8)
    assert torch.equal(fragments.unpack(fragments.pack(codes, 3, order), 3, order, 5, 64), codes)
    assert (
        fragments.positions(torch.zeros(64), 32, 2).numel() == 128
    )  # in order, but not what group_size says


def test_gradient_operators_and_one_graph():
    layer = layer_of(random_codes(24, 40, 4, 32, order=True))
    layer.kernel = TritonKernel()
    x = torch.randn(2, 3, 40, device=DEVICE, requires_grad=True)
    layer(x).backward(torch.ones(2, 3, 24, device=DEVICE))
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand_as(x))
    weight = (layer.words, layer.zeros, layer.scales, layer.order, 4, fragments_of(layer).group)
    torch.library.opcheck(torch.ops.fewbit.linear_fragments.default, (x.detach().requires_grad_(), *weight))
    torch.library.opcheck(torch.ops.fewbit.dequantize_fragments.default, (*weight, 40, torch.float16))
    torch._dynamo.reset()  # other tests have compiled layers of this class
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = x.detach().clone().requires_grad_()
    assert torch.equal(compiled(y), layer(x))
    compiled(y).sum().backward()
    torch.testing.assert_close(y.grad, x.grad)
    torch._dynamo.reset()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_in_a_cuda_graph(tokens):
    layer = QuantLinear.from_codes(random_codes(256, 1024, 4, 128), compute_dtype=torch.float16).to(DEVICE)
    layer.prepare("triton")
    x = torch.randn(tokens, 1024, device=DEVICE, dtype=torch.float16)
    expected = layer(x)  # compiles and tunes: a graph must not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    x.copy_(torch.randn_like(x))
    expected = layer(x)
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_auto_takes_it_on_this_gpu():
    layer = QuantLinear.from_codes(random_codes(256, 1024, 4, 128), compute_dtype=torch.bfloat16).to(DEVICE)
    layer.prepare("auto")
    assert layer.kernel.name == "triton", layer.kernel_reasons


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_a_device_that_is_not_the_current_one():
    layer = QuantLinear.from_codes(random_codes(64, 256, 4, 128), compute_dtype=torch.float16).to("cuda:1")
    layer.prepare("triton")
    x = torch.randn(2, 256, device="cuda:1", dtype=torch.float16)
    assert relative(layer(x), x.double() @ layer.dequantize(torch.float64).t()) < 2e-3


@pytest.mark.parametrize(
    ("device", "dtype", "words"),
    [
        ("cpu", torch.float16, "device is cpu, not cuda or xpu"),
        ("cuda", torch.float64, "activations are float64"),
        ("cuda", torch.bfloat16, None),
        ("xpu", torch.float32, None),
    ],
)
def test_unsupported_reason(device, dtype, words):
    spec = KernelSpec(4, 32, True, False, 32, 16)
    reason = TritonKernel().unsupported_reason(spec, torch.device(device), dtype, False)
    assert reason is None if words is None else words in reason


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "hip:gfx942"])
def test_compiles_for_gpus_that_are_not_here(target):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "compile_triton.py"
    result = subprocess.run(
        [sys.executable, str(script), target], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("bytes") >= 9
