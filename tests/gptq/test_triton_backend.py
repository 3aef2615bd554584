"""The solver's Triton kernels against torch and float64: on a GPU if there is one, otherwise in Triton's interpreter.

The interpreter needs a second for a block of columns, so shapes are small and few.
"""

import pytest
import torch

import oracle
from fewbit.gptq import gptq
from fewbit.gptq.gptq import factor, order, round_columns
from fewbit.gptq.grid import Candidates, Grid, candidates, fit_grid, search, storable
from fewbit.quantized_matrix import sequential_groups

triton = pytest.importorskip("fewbit.gptq.backends.triton", reason="pip install triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def problem(m, n, group_size, bits, act_order):
    """W, H, the factorization and two candidate grids, on the device."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(3 * n, n, generator=generator) @ torch.randn(n, n, generator=generator)
    X *= torch.rand(n, generator=generator) * 2 + 0.1
    W, H = torch.randn(m, n, generator=generator) * 0.05, oracle.hessian(X).float()
    perm, g_idx = order(H.diagonal(), group_size, act_order)
    grid = fit_grid(W, H.diagonal(), g_idx, bits, sym=bits != 3)
    scales = torch.stack([storable(grid.scales.float() * by).half() for by in (1.0, 1.3)])
    grids = Grid(scales.to(DEVICE), grid.zeros.expand(scales.shape).to(DEVICE), g_idx.to(DEVICE))
    return W.to(DEVICE), H, factor(H.to(DEVICE), perm.to(DEVICE), 0.01), grids


def check(W, H, found, grids, bits):
    """Every code is the rounded target, and the losses are those of the codes."""
    codes, losses = round_columns(W, found, grids, bits, triton.round_block)
    W, perm, groups = W.cpu(), found.perm.cpu(), grids.g_idx.long().cpu()
    damped = oracle.damped(H, 0.01)[perm][:, perm]
    for q, loss, s, z in zip(codes.cpu(), losses, grids.scales.cpu(), grids.zeros.cpu(), strict=True):
        s, z = s.double()[:, groups], z.double()[:, groups]
        assert oracle.excess(W[:, perm], damped, s[:, perm], z[:, perm], q[:, perm], bits) < 0.02
        assert float(loss.sum()) == pytest.approx(oracle.loss(W, s * (q.double() - z), H), rel=2e-3)


@pytest.mark.parametrize(
    ("m", "n", "group_size", "bits", "act_order"),
    [(1, 1, -1, 4, "none"), (20, 50, 16, 3, "full"), (33, 18, -1, 2, "group"), (3, 130, 128, 8, "full")],
)
def test_every_code_is_the_rounded_target(m, n, group_size, bits, act_order):
    check(*problem(m, n, group_size, bits, act_order), bits)


@pytest.mark.parametrize(("n", "group_size"), [(19, 8), (270, -1)])
@pytest.mark.parametrize(("bits", "sym"), [(2, False), (3, True), (4, False), (8, True)])
def test_grids_are_those_of_torch(n, group_size, bits, sym):
    generator = torch.Generator().manual_seed(n)
    W = torch.randn(3, n, generator=generator) * 0.03
    W[1, :8] = 0
    D = torch.rand(n, generator=generator) + 0.1
    counts = torch.bincount(sequential_groups(n, group_size).long())
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    every = candidates(bits, sym)
    some = Candidates(every.coarse[::11], every.fine[::5], every.offsets[::3])
    scales, zeros = search(W, D, starts, some, bits, sym)
    ours = triton.search(W.to(DEVICE), D.to(DEVICE), starts, some, bits, sym)
    assert torch.equal(ours[0].cpu(), scales)
    assert torch.equal(ours[1].cpu(), zeros)


def test_grids_are_as_good_as_a_dense_search_in_float64():
    generator = torch.Generator().manual_seed(1)
    W, D = torch.randn(7, 24, generator=generator), torch.rand(24, generator=generator) + 0.05
    found = fit_grid(W.to(DEVICE), D.to(DEVICE), torch.zeros(24), 3, sym=True, search=triton.search)
    error = oracle.grid_error(W, D, found.scales[:, 0].cpu(), found.zeros[:, 0].cpu(), 3)
    assert error.sum() < 1.01 * oracle.best_grid_error(W, D, 3, sym=True, steps=1000).sum()


@pytest.fixture
def kernels(monkeypatch):
    """The module with torch in place of the kernels, which the interpreter runs slowly; the check is not cached."""
    monkeypatch.setattr(triton, "round_block", gptq.round_block)
    monkeypatch.setattr(triton, "search", search)
    monkeypatch.setattr(triton, "self_check", triton.self_check.__wrapped__)
    return triton


def test_the_kernels_pass_their_own_check():
    assert triton.self_check(DEVICE) == ""


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_wrong_codes_errors_and_losses_are_found(kernels, monkeypatch, wrong):
    def broken(*inputs):
        found = gptq.round_block(*inputs)
        found[wrong][-1, -1] += 1
        return found

    assert kernels.self_check(DEVICE) == ""
    monkeypatch.setattr(kernels, "round_block", broken)
    bits = "2 bits, 3 bits, 4 bits, 8 bits"
    assert kernels.self_check(DEVICE) == f"on {DEVICE} they give wrong results for {bits}"


@pytest.mark.parametrize("which", [True, False])
def test_a_worse_grid_is_found(kernels, monkeypatch, which):
    def broken(W, D, starts, tried, bits, sym):
        scales, zeros = search(W, D, starts, tried, bits, sym)
        return scales * (1.25 if sym == which and bits == 3 else 1), zeros

    monkeypatch.setattr(kernels, "search", broken)
    assert kernels.self_check(DEVICE) == f"on {DEVICE} they give wrong results for 3 bits"


@pytest.mark.parametrize("error", [RuntimeError, OSError, triton.TritonError])
def test_kernels_that_do_not_run_are_a_reason(kernels, monkeypatch, error):
    def broken(*inputs):
        raise error("no such device\nat 7")

    monkeypatch.setattr(kernels, "round_block", broken)
    assert kernels.self_check(DEVICE) == f"on {DEVICE} they do not run (no such device)"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_on_a_gpu_shapes_of_real_layers(bits):
    W, H, found, grids = problem(300, 1100, 128, bits, "full")
    check(W, H, found, grids, bits)
    D, group = torch.ones(1100, device="cuda"), torch.zeros(1100)
    wide = fit_grid(W, D, group, bits, sym=True, search=triton.search)
    assert (wide.scales == fit_grid(W, D, group, bits, sym=True).scales).float().mean() > 0.95
