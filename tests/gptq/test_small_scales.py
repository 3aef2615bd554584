"""Weights of small and large magnitude: subnormal float16 scales, and a count of the scales that were clamped."""

import pytest
import torch

from fewbit.checkpoint import layout
from fewbit.config import LayerSettings
from fewbit.gptq import Hessian, InputGroup, backends, quantize_weight
from fewbit.gptq.cholesky import SCALES_CLAMPED
from fewbit.gptq.grid import candidates, fit_grid, search
from fewbit.kernels.linear import QuantLinear
from fewbit.kernels.spec import KernelSpec


def settings(bits, **changes):
    options = {"group_size": 32, "sym": True, "act_order": "group", "damp": 0.01, "method": "gptq"}
    return LayerSettings(bits=bits, **options | changes)


def relative_error(W, codes):
    return float((W.double() - codes.dequantize(torch.float64)).norm() / W.double().norm())


def hessian(n):
    H = Hessian(n)
    H.add(torch.randn(8 * n, n, generator=torch.Generator().manual_seed(1)))
    return H


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_small_weights_are_as_exact_as_large_ones(bits, sym):
    W = torch.randn(48, 96, generator=torch.Generator().manual_seed(bits))
    group = InputGroup(hessian(96))
    for given in (None, group):
        large = quantize_weight(W, given, settings(bits, sym=sym))
        small = quantize_weight(W * 2e-4, given, settings(bits, sym=sym))
        assert not small.fallbacks
        assert relative_error(W * 2e-4, small.codes) < 1.15 * relative_error(W, large.codes)


@pytest.mark.parametrize("std", [2e-4, 3e-6, 1e-8])
@pytest.mark.parametrize("sym", [True, False])
def test_every_backend_finds_the_same_scales(std, sym):
    W = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)) * std
    starts = torch.tensor([0, 32, 64])
    expected, _ = search(W, torch.ones(64), starts, candidates(8, sym), 8, sym)
    found, _ = backends.select(W.device).search(W, torch.ones(64), starts, candidates(8, sym), 8, sym)
    assert torch.equal(found, found.half().float())
    assert (found - expected).abs().max() <= 2.0**-24


@pytest.mark.parametrize("std", [1e-8, 1e6])
def test_clamped_scales_are_a_fallback(std):
    W = torch.randn(8, 64) * std
    assert quantize_weight(W, None, settings(2)).fallbacks == (SCALES_CLAMPED,)
    assert SCALES_CLAMPED in quantize_weight(W, InputGroup(hessian(64)), settings(2)).fallbacks


def test_weights_of_zero_are_no_fallback():
    assert quantize_weight(torch.zeros(8, 64), None, settings(4)).fallbacks == ()
    grid = fit_grid(torch.zeros(8, 64), torch.ones(64), torch.zeros(64), 4, sym=True)
    assert (grid.scales == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_products_with_subnormal_scales(bits, dtype):
    W = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 1e-5
    codes = quantize_weight(W, None, settings(bits, group_size=64)).codes
    assert (codes.scales.abs() < 2.0**-14).all()
    x = torch.randn(40, 128, dtype=dtype, generator=torch.Generator().manual_seed(1))
    expected = x.double() @ codes.dequantize(torch.float64).t()
    spec = KernelSpec(bits=bits, group_size=64, sym=True, act_order=False, out_features=64, in_features=128)
    for kernel in ("cpu", "cpu_a16", "reference"):
        layer = QuantLinear(spec, layout.pack(codes, "gptq"), None, dtype)
        layer.prepare(kernel)
        for rows in (1, 40):
            error = (layer(x[:rows]).double() - expected[:rows]).norm() / expected[:rows].norm()
            assert error < (0.02 if dtype is torch.bfloat16 else 0.01), (kernel, rows)
