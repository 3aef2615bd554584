"""Order, factor, round the columns: each step against float64."""

import pytest
import torch

import oracle
from fewbit.gptq.gptq import factor, order, round_columns
from fewbit.gptq.grid import Grid, fit_grid, storable


def problem(m, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(3 * n, n, generator=generator)
    X = X @ torch.randn(n, n, generator=generator) * (torch.rand(n, generator=generator) * 2 + 0.1)
    return torch.randn(m, n, generator=generator) * 0.05, oracle.hessian(X).float()


def candidate_grids(grid, *multipliers):
    scales = torch.stack([storable(grid.scales.float() * by).half() for by in multipliers])
    return Grid(scales, grid.zeros.expand(scales.shape), grid.g_idx)


def expanded(grid):
    groups = grid.g_idx.long()
    return grid.scales.double()[..., groups], grid.zeros.double()[..., groups]


@pytest.mark.parametrize("act_order", ["none", "group", "full"])
@pytest.mark.parametrize(
    ("m", "n", "group_size", "bits"),
    [
        (1, 1, -1, 4),
        (1, 130, 32, 4),
        (20, 100, 32, 3),
        (33, 100, -1, 2),
        (17, 130, 128, 8),
        (8, 576, 128, 4),
    ],
)
def test_every_code_is_the_rounded_target(m, n, group_size, bits, act_order, backend):
    W, H = problem(m, n)
    perm, g_idx = order(H.diagonal(), group_size, act_order)
    grid = fit_grid(W, H.diagonal(), g_idx, bits, sym=bits != 3, search=backend.search)
    grids = candidate_grids(grid, 1.0, 1.3)
    codes, losses = round_columns(W, factor(H, perm, 0.01), grids, bits, backend.round_block)
    damped = oracle.damped(H, 0.01)[perm][:, perm]
    for q, loss, s, z in zip(codes, losses, *expanded(grids), strict=True):
        assert oracle.excess(W[:, perm], damped, s[:, perm], z[:, perm], q[:, perm], bits) < 0.02
        assert float(loss.sum()) == pytest.approx(oracle.loss(W, s * (q.double() - z), H), rel=2e-3)


def test_a_grid_gets_the_same_codes_beside_others(backend):
    W, H = problem(9, 300)
    perm, g_idx = order(H.diagonal(), 32, "full")
    grid = fit_grid(W, H.diagonal(), g_idx, 3, sym=False, search=backend.search)
    found, grids = factor(H, perm, 0.01), candidate_grids(grid, 1.0, 1.3)
    codes, losses = round_columns(W, found, grids, 3, backend.round_block)
    assert not torch.equal(codes[0], codes[1])
    for b in range(2):
        single = Grid(grids.scales[b : b + 1], grids.zeros[b : b + 1], g_idx)
        alone, loss = round_columns(W, found, single, 3, backend.round_block)
        assert torch.equal(codes[b], alone[0])
        assert torch.equal(losses[b], loss[0])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_of_the_paper_and_of_this_form_are_the_same(bits):
    W, H = problem(12, 100)
    grid = fit_grid(W, H.diagonal(), torch.zeros(100), bits, sym=True)
    s, z = expanded(grid)
    damped = oracle.damped(H, 0.01)
    codes = oracle.ldlq(W, damped, s, z, bits)
    assert torch.equal(codes, oracle.gptq(W, damped, s, z, bits))
    found, _ = round_columns(W, factor(H, torch.arange(100), 0.01), candidate_grids(grid, 1.0), bits)
    assert (found[0] == codes).float().mean() > 0.99


def test_factor_is_the_factorization_in_processing_order():
    _, H = problem(1, 100)
    perm = torch.randperm(100)
    found = factor(H, perm, 0.05)
    F, d = found.F.double(), found.d.double()
    expected = oracle.damped(H, 0.05)[perm][:, perm]
    torch.testing.assert_close(F @ torch.diag(d) @ F.T, expected, rtol=1e-4, atol=1e-3 * float(d.max()))
    assert torch.equal(found.F, found.F.triu())
    assert found.added == pytest.approx(0.05 * float(H.diagonal().mean()))


def test_factor_says_when_the_matrix_is_not_positive_definite():
    assert factor(-torch.eye(4), torch.arange(4), 0.01) is None
    assert factor(torch.full((4, 4), float("nan")), torch.arange(4), 0.01) is None


def test_the_loss_is_below_that_of_rounding_to_nearest(backend):
    W, H = problem(32, 130)
    perm, g_idx = order(H.diagonal(), 64, "group")
    grid = fit_grid(W, H.diagonal(), g_idx, 3, sym=True, search=backend.search)
    s, z = expanded(grid)
    rounded = s * (oracle.quantize(W.double(), s, z, 3) - z)
    _, losses = round_columns(W, factor(H, perm, 0.01), candidate_grids(grid, 1.0), 3, backend.round_block)
    assert float(losses.sum()) < 0.7 * oracle.loss(W, rounded, H)


def test_order_none_keeps_the_columns():
    perm, g_idx = order(torch.tensor([1.0, 5.0, 3.0]), 2, "none")
    assert perm.tolist() == [0, 1, 2]
    assert g_idx.tolist() == [0, 0, 1]


def test_order_group_sorts_inside_groups_and_groups_by_their_largest():
    diag = torch.tensor([1.0, 2.0, 9.0, 3.0, 5.0])
    perm, g_idx = order(diag, 2, "group")
    assert perm.tolist() == [2, 3, 4, 1, 0]
    assert g_idx.tolist() == [0, 0, 1, 1, 2]


def test_order_full_makes_groups_of_neighbours_in_processing_order():
    perm, g_idx = order(torch.tensor([1.0, 2.0, 9.0, 3.0, 5.0]), 2, "full")
    assert perm.tolist() == [2, 4, 3, 1, 0]
    assert g_idx[perm].tolist() == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("act_order", ["group", "full"])
def test_equal_columns_keep_their_order(act_order):
    perm, _ = order(torch.ones(70), 32, act_order)
    assert perm.tolist() == list(range(70))
