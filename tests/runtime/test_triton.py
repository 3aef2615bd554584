"""The Triton kernel, in Triton's interpreter where there is no GPU."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fewbit.checkpoint import layout
from fewbit.runtime.linear import QuantLinear
from fewbit.runtime.reference import Reference
from fewbit.runtime.triton import TritonKernel
from tiny_gptq import random_codes

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="pip install triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def layer_of(codes, fmt="gptq", dtype=torch.float32, bias=None):
    layer = QuantLinear.from_codes(codes, bias, fmt, compute_dtype=dtype).to(DEVICE)
    layer.prepare("reference")  # finds out about the groups
    return layer


def relative(found, truth):
    return ((found.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("fmt", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(
    ("shape", "group_size", "order"),
    [
        ((48, 128), 32, False),
        ((37, 100), 32, True),
        ((64, 192), 64, False),
        ((16, 64), -1, False),
        ((20, 33), 7, False),
        ((1, 1), -1, False),
        ((150, 700), 32, False),
    ],
)
def test_products_against_float64(bits, fmt, shape, group_size, order):
    codes = random_codes(*shape, bits, group_size, order=order)
    for tokens, dtype in ((1, torch.float32), (5, torch.float16), (33, torch.bfloat16)):
        layer = layer_of(codes, fmt, dtype, bias=torch.randn(shape[0]))
        x = torch.randn(1, tokens, shape[1]).to(DEVICE, dtype)
        found = TritonKernel().linear(x, layer)
        truth = x.double() @ codes.dequantize(torch.float64).t().to(DEVICE) + layer.bias.to(dtype).double()
        assert found.shape == (1, tokens, shape[0])
        assert found.dtype == dtype
        assert relative(found, truth) < TOLERANCE[dtype]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_point_0_in_v1_is_read_as_it_was_meant(bits):
    codes = random_codes(48, 64, bits, 32)
    tensors = layout.pack(codes, "gptq")
    one = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits]
    zeros = codes.zeros.clone()
    zeros[::5] = 0
    # What GPTQModel writes: the packed zeros of v2 less one in every field, borrowing across fields.
    tensors["qzeros"] = layout.pack_zeros(zeros, bits, "gptq_v2") - one
    layer = layer_of(codes)
    layer.load_state_dict(tensors)
    x = torch.eye(64, device=DEVICE)
    torch.testing.assert_close(TritonKernel().linear(x, layer), Reference().linear(x, layer))


def test_gradient_and_operator():
    layer = layer_of(random_codes(24, 70, 3, 32, order=True))
    x = torch.randn(2, 5, 70, device=DEVICE, requires_grad=True)
    TritonKernel().linear(x, layer).backward(torch.ones(2, 5, 24, device=DEVICE))
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand_as(x))
    args = (x.detach().requires_grad_(), *(layer.get_buffer(name) for name in layout.PARTS), 3, "gptq", 0)
    torch.library.opcheck(torch.ops.fewbit.linear_triton.default, args)
    assert TritonKernel().linear(x[:, :0], layer).shape == (2, 0, 24)


@pytest.mark.parametrize(
    ("device", "dtype", "words"),
    [
        ("cpu", torch.float16, "device is cpu, not cuda or xpu"),
        ("cuda", torch.float64, "activations are float64"),
        ("cuda", torch.bfloat16, None),
        ("xpu", torch.float32, None),
    ],
)
def test_why_not(device, dtype, words):
    reason = TritonKernel().why_not(layer_of(random_codes(16, 32)).spec, torch.device(device), dtype, False)
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
    assert result.stdout.count("bytes") == 9
