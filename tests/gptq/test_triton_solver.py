"""The solver's Triton kernels against float64 and torch: on a GPU if there is one, otherwise in Triton's interpreter.

The interpreter needs a second for a block of columns, so shapes are small and few.
"""

import pytest
import torch

import oracle
from fewbit.gptq.gptq import Problem, factor, order, solve, solve_all
from fewbit.gptq.grid import SEARCHES, Grid, candidates, fit_grid, storable
from fewbit.quantized_matrix import sequential_groups

pytest.importorskip("triton", reason="pip install triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(m, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(3 * n, n, generator=generator) @ torch.randn(n, n, generator=generator)
    X *= torch.rand(n, generator=generator) * 2 + 0.1
    return torch.randn(m, n, generator=generator) * 0.05, oracle.hessian(X).float()


def prepared(m, n, group_size, bits, act_order, seed=0):
    """W, H, the factor and a grid, on the device."""
    W, H = problem(m, n, seed)
    perm, g_idx = order(H.diagonal(), group_size, act_order)
    grid = fit_grid(W, H.diagonal(), g_idx, bits, sym=bits != 3, backend="torch")
    found = factor(H.to(DEVICE), perm.to(DEVICE), 0.01)
    on_device = Grid(grid.scales.to(DEVICE), grid.zeros.to(DEVICE), grid.g_idx.to(DEVICE))
    return W.to(DEVICE), H, found, on_device


def check(W, H, found, grid, sweep, bits):
    """Every code is the rounded target, and the losses are those of the codes."""
    W, perm, groups = W.cpu(), found.perm.cpu(), grid.g_idx.long().cpu()
    s, z = grid.scales.double().cpu()[:, groups], grid.zeros.double().cpu()[:, groups]
    codes, damped = sweep.codes.cpu(), oracle.damped(H, 0.01)[perm][:, perm]
    assert oracle.excess(W[:, perm], damped, s[:, perm], z[:, perm], codes[:, perm], bits) < 0.02
    assert sweep.loss == pytest.approx(oracle.loss(W, s * (codes.double() - z), H), rel=2e-3)


@pytest.mark.parametrize(
    ("m", "n", "group_size", "bits", "act_order"),
    [(1, 1, -1, 4, "none"), (20, 50, 16, 3, "full"), (33, 18, -1, 2, "group"), (3, 130, 128, 8, "full")],
)
def test_every_code_is_the_rounded_target(m, n, group_size, bits, act_order):
    W, H, found, grid = prepared(m, n, group_size, bits, act_order)
    check(W, H, found, grid, solve(W, found, grid, bits, backend="triton"), bits)


def test_a_batch_gives_every_problem_its_own_codes():
    made = [prepared(5, 130, 64, 4, "full", seed) for seed in range(2)]
    # Another shape on its own, in between.
    made.insert(1, prepared(2, 20, 16, 4, "group", 3))
    problems = []
    for W, _, found, grid in made:
        wider = Grid(storable(grid.scales.float() * 1.3).half(), grid.zeros, grid.g_idx)
        problems.append(Problem(W, found, [grid, wider]))
    swept = solve_all(problems, 4, backend="triton")
    for (W, H, found, _), one, sweeps in zip(made, problems, swept, strict=True):
        assert len(sweeps) == 2
        for grid, sweep in zip(one.grids, sweeps, strict=True):
            check(W, H, found, grid, sweep, 4)


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
    some = type(every)(every.coarse[::11], every.fine[::5], every.offsets[::3])
    scales, zeros = SEARCHES["torch"](W, D, starts, some, bits, sym)
    ours = SEARCHES["triton"](W.to(DEVICE), D.to(DEVICE), starts, some, bits, sym)
    assert torch.equal(ours[0].cpu(), scales)
    assert torch.equal(ours[1].cpu(), zeros)


def test_grids_are_as_good_as_a_dense_search_in_float64():
    generator = torch.Generator().manual_seed(1)
    W, D = torch.randn(7, 24, generator=generator), torch.rand(24, generator=generator) + 0.05
    grid = fit_grid(W.to(DEVICE), D.to(DEVICE), torch.zeros(24), 3, sym=True, backend="triton")
    error = oracle.grid_error(W, D, grid.scales[:, 0].cpu(), grid.zeros[:, 0].cpu(), 3)
    assert error.sum() < 1.01 * oracle.best_grid_error(W, D, 3, sym=True, steps=1000).sum()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_on_a_gpu_shapes_of_real_layers(bits):
    W, H, found, grid = prepared(300, 1100, 128, bits, "full")
    check(W, H, found, grid, solve(W, found, grid, bits, backend="triton"), bits)
    wide = fit_grid(W, torch.ones(1100, device="cuda"), torch.zeros(1100), bits, sym=True, backend="triton")
    torch_grid = fit_grid(
        W, torch.ones(1100, device="cuda"), torch.zeros(1100), bits, sym=True, backend="torch"
    )
    assert (wide.scales == torch_grid.scales).float().mean() > 0.95
