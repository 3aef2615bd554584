import pytest
import torch

import oracle
from fewbit import native
from fewbit.gptq.gptq import factor, factor_all, order, solve, solve_each
from fewbit.gptq.grid import Grid, fit_grid, storable

BACKENDS = [
    "torch",
    pytest.param(
        "native", marks=pytest.mark.skipif(not native.available(), reason=native.unsupported_reason())
    ),
]


def problem(m, n, tokens=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens or 3 * n, n, generator=generator)
    X = X @ torch.randn(n, n, generator=generator) * (torch.rand(n, generator=generator) * 2 + 0.1)
    return torch.randn(m, n, generator=generator) * 0.05, oracle.hessian(X).float()


def expanded(grid):
    groups = grid.g_idx.long()
    return grid.scales.double()[:, groups], grid.zeros.double()[:, groups]


@pytest.mark.parametrize("backend", BACKENDS)
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
    grid = fit_grid(W, H.diagonal(), g_idx, bits, sym=bits != 3, backend=backend)
    found = factor(H, perm, 0.01)
    sweep = solve(W, found, grid, bits, backend=backend)
    s, z = expanded(grid)
    damped = oracle.damped(H, 0.01)[perm][:, perm]
    assert oracle.excess(W[:, perm], damped, s[:, perm], z[:, perm], sweep.codes[:, perm], bits) < 0.02
    W_hat = s * (sweep.codes.double() - z)
    assert sweep.loss == pytest.approx(oracle.loss(W, W_hat, H), rel=2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_grids_at_once_are_solved_as_one_after_the_other(backend):
    W, H = problem(9, 100)
    perm, g_idx = order(H.diagonal(), 32, "full")
    grid = fit_grid(W, H.diagonal(), g_idx, 3, sym=False, backend=backend)
    wider = Grid(storable(grid.scales.float() * 1.3).half(), grid.zeros, grid.g_idx)
    found = factor(H, perm, 0.01)
    together = solve_each(W, found, [grid, wider], 3, backend=backend)
    for sweep, alone in zip(
        together, (solve(W, found, g, 3, backend=backend) for g in (grid, wider)), strict=True
    ):
        assert torch.equal(sweep.codes, alone.codes)
        torch.testing.assert_close(sweep.losses, alone.losses, rtol=1e-5, atol=0)
    assert not torch.equal(together[0].codes, together[1].codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_of_the_paper_and_of_this_form_are_the_same(bits):
    W, H = problem(12, 100)
    grid = fit_grid(W, H.diagonal(), torch.zeros(100), bits, sym=True, backend="torch")
    s, z = expanded(grid)
    damped = oracle.damped(H, 0.01)
    codes = oracle.ldlq(W, damped, s, z, bits)
    assert torch.equal(codes, oracle.gptq(W, damped, s, z, bits))
    sweep = solve(W, factor(H, torch.arange(100), 0.01), grid, bits, backend="torch")
    assert (sweep.codes == codes).float().mean() > 0.99


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


def test_a_batch_is_factored_like_each_alone():
    H = [problem(1, 60, seed=seed)[1] for seed in range(3)]
    H.insert(1, -torch.eye(60))
    H.append(torch.full((60, 60), float("nan")))
    perms = [torch.randperm(60) for _ in H]
    for found, h, perm in zip(factor_all(H, perms, 0.02), H, perms, strict=True):
        alone = factor(h, perm, 0.02)
        assert (found is None) == (alone is None)
        if found is not None:
            assert torch.equal(found.perm, alone.perm)
            torch.testing.assert_close(found.F, alone.F, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found.d, alone.d, rtol=1e-5, atol=0)
            assert found.added == pytest.approx(alone.added)


def test_solving_beats_rounding():
    W, H = problem(32, 130)
    perm, g_idx = order(H.diagonal(), 64, "group")
    grid = fit_grid(W, H.diagonal(), g_idx, 3, sym=True)
    s, z = expanded(grid)
    rounded = s * (oracle.quantize(W.double(), s, z, 3) - z)
    assert solve(W, factor(H, perm, 0.01), grid, 3).loss < 0.7 * oracle.loss(W, rounded, H)


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
