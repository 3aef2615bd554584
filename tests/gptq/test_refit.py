import pytest
import torch

from fewbit.config import LayerSettings
from fewbit.gptq import Accuracy, Hessian, Holdout, quantize_weight
from fewbit.gptq.grid import LARGEST_SCALE, SMALLEST_SCALE, fit_grid, nearest
from fewbit.gptq.refit import refit_scales
from fewbit.quantized_matrix import QuantizedMatrix, sequential_groups


def error(W, codes, scales, H):
    groups = codes.g_idx.long()
    E = W.double() - (codes.codes.double() - codes.zeros.double()[:, groups]) * scales.double()[:, groups]
    return float(((E @ H.double()) * E).sum())


def problem(n, group_size, bits, sym, m=17, act_order=False):
    g = torch.Generator().manual_seed(n + bits)
    X = torch.randn(500, n, generator=g) @ torch.randn(n, n, generator=g)
    W, H = torch.randn(m, n, generator=g), X.T @ X
    g_idx = sequential_groups(n, group_size)
    if act_order:
        g_idx = g_idx[torch.randperm(n, generator=g)]
    grid = fit_grid(W, H.diagonal(), g_idx, bits, sym=sym)
    codes = QuantizedMatrix(nearest(W, grid, bits), grid.scales, grid.zeros, grid.g_idx, bits, group_size)
    return W, H, codes


@pytest.mark.parametrize(("n", "group_size"), [(48, 16), (50, 16), (33, -1), (7, 32)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_sweeps_reach_the_least_squares_scales(n, group_size, bits, act_order):
    """With many sweeps the float32 scales are those of the G × G normal equations of every row."""
    W, H, codes = problem(n, group_size, bits, sym=False, act_order=act_order)
    fitted = refit_scales(W, codes, H, sweeps=200)
    G, groups = codes.scales.shape[1], codes.g_idx.long()
    Z = codes.codes.double() - codes.zeros.double()[:, groups]
    for row in range(W.shape[0]):
        blocks = torch.zeros(n, G, dtype=torch.float64)
        blocks[torch.arange(n), groups] = Z[row]
        A, b = blocks.T @ H.double() @ blocks, blocks.T @ H.double() @ W[row].double()
        best = torch.linalg.lstsq(A, b).solution
        if bool((best * codes.scales[row].double() <= SMALLEST_SCALE).any()):
            continue  # there the sign, which is kept, or the smallest scale decides
        s = fitted[row].double()

        def loss(s, A=A, b=b):
            return s @ A @ s - 2 * s @ b

        start, got, bound = (float(loss(x)) for x in (codes.scales[row].double(), s, best))
        assert got <= start + 1e-9 * abs(start)
        assert got - bound <= 0.05 * (start - bound) + 1e-4 * abs(bound)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_one_sweep_lowers_the_error_and_keeps_the_grid_valid(bits, sym):
    W, H, codes = problem(52, 16, bits, sym)
    fitted = refit_scales(W, codes, H)
    assert error(W, codes, fitted, H) < error(W, codes, codes.scales, H)
    assert fitted.dtype == torch.float16
    assert torch.equal(fitted.sign(), codes.scales.sign())
    assert bool((fitted.abs() >= SMALLEST_SCALE).all() and (fitted.abs() <= LARGEST_SCALE).all())


def test_groups_of_zeros_and_a_zero_hessian_keep_their_scales():
    q = torch.full((2, 8), 8, dtype=torch.uint8)
    zeros, groups = torch.full((2, 2), 8).short(), sequential_groups(8, 4)
    codes = QuantizedMatrix(q, torch.ones(2, 2).half(), zeros, groups, bits=4, group_size=4)
    assert torch.equal(refit_scales(torch.zeros(2, 8), codes, torch.eye(8)), codes.scales)
    q[:, 0] = 9
    assert torch.equal(refit_scales(torch.ones(2, 8), codes, torch.zeros(8, 8)), codes.scales)


def test_a_refit_is_kept_only_where_held_out_tokens_agree():
    settings = LayerSettings(bits=2, group_size=16, sym=False, act_order="group", damp=0.01, method="gptq")
    g = torch.Generator().manual_seed(0)
    mix, W = torch.randn(48, 48, generator=g), torch.randn(24, 48, generator=g)
    X, other = torch.randn(1000, 48, generator=g) @ mix, torch.randn(1000, 48, generator=g) @ mix
    H = Hessian(48)
    H.add(X)
    plain = quantize_weight(W, H, settings)
    kept = quantize_weight(W, H, settings, accuracy=Accuracy(refit=True), probe=Holdout(other, other))
    assert kept.refit
    assert torch.equal(kept.codes.codes, plain.codes.codes)
    assert not torch.equal(kept.codes.scales, plain.codes.scales)
    assert kept.loss < plain.loss
    # Held-out tokens for which the fitted scales are wrong: the full-precision layer gives what it gave before.
    before = plain.codes.dequantize()
    stubborn = Holdout(other, other @ before.T @ torch.linalg.pinv(W).T)
    assert not quantize_weight(W, H, settings, accuracy=Accuracy(refit=True), probe=stubborn).refit
