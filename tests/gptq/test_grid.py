import pytest
import torch

import oracle
from fewbit.gptq.grid import SMALLEST_SCALE, fit_grid, nearest
from fewbit.quantized_matrix import sequential_groups


def weights(m, n, heavy_tails=False):
    generator = torch.Generator().manual_seed(m * 1000 + n)
    W = torch.randn(m, n, generator=generator) * 0.03
    if heavy_tails:
        W /= torch.rand(m, n, generator=generator).clamp(0.05).sqrt()
    return W, torch.rand(n, generator=generator) ** 2 + 0.05


@pytest.mark.parametrize("heavy_tails", [False, True])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_as_good_as_a_dense_search_in_float64(bits, sym, heavy_tails, backend):
    W, D = weights(24, 64, heavy_tails)
    grid = fit_grid(W, D, torch.zeros(64), bits, sym=sym, search=backend.search)
    error = oracle.grid_error(W, D, grid.scales[:, 0], grid.zeros[:, 0], bits)
    best = oracle.best_grid_error(W, D, bits, sym, steps=1000)
    assert error.sum() < 1.01 * best.sum()
    assert (error < 1.1 * best).all()


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("m", "n"), [(1, 128), (33, 3), (40, 32)])
def test_never_worse_than_the_min_max_grid(m, n, bits, sym, backend):
    W, D = weights(m, n, heavy_tails=True)
    grid = fit_grid(W, D, torch.zeros(n), bits, sym=sym, search=backend.search)
    error = oracle.grid_error(W, D, grid.scales[:, 0], grid.zeros[:, 0], bits)
    assert (error <= 1.001 * oracle.minmax_error(W, D, bits, sym)).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_are_those_that_every_reader_takes(bits, backend):
    W, D = weights(40, 64)
    W[:10] = W[:10].abs() + 0.1
    W[10:20] = -W[10:20].abs() - 0.1
    W[20:30] *= torch.logspace(0, 3, 64)
    grid = fit_grid(W, D, sequential_groups(64, 16), bits, sym=False, search=backend.search)
    assert grid.zeros.min() >= 1
    assert grid.zeros.max() <= 2**bits - 1
    symmetric = fit_grid(W, D, sequential_groups(64, 16), bits, sym=True, search=backend.search)
    assert (symmetric.zeros == 2 ** (bits - 1)).all()


def test_a_negative_scale_gives_the_positive_side_one_level_more(backend):
    W = torch.tensor([[2.0, 1.0, 0.0, -1.0], [-2.0, -1.0, 0.0, 1.0]])
    grid = fit_grid(W, torch.ones(4), torch.zeros(4), 2, sym=True, search=backend.search)
    assert grid.scales[:, 0].tolist() == [-1.0, 1.0]
    q = nearest(W, grid, 2)
    assert torch.equal(grid.scales.float() * (q.float() - 2), W)


@pytest.mark.parametrize("sym", [True, False])
def test_groups_of_zeros_and_extreme_weights_get_usable_scales(sym, backend):
    W = torch.zeros(6, 40)
    W[1] = 1e-7
    W[2] = 3e38
    W[3, 0] = -1e-30
    W[4, ::2] = 5e4
    W[5, 20:] = torch.randn(20)
    grid = fit_grid(W, torch.ones(40), sequential_groups(40, 20), 4, sym=sym, search=backend.search)
    assert torch.isfinite(grid.scales).all()
    assert (grid.scales.abs() >= SMALLEST_SCALE).all()
    assert torch.isfinite(grid.scales.float() * (nearest(W, grid, 4).float()[:, ::20] - grid.zeros)).all()
    assert grid.scales[0].tolist() == [1, 1]
    assert (nearest(W, grid, 4)[0] == 8).all()
    assert grid.scales[5, 0] == 1


@pytest.mark.parametrize("group_size", [-1, 32, 128])
@pytest.mark.parametrize("n", [1, 100, 130])
def test_groups_are_fitted_each_for_itself(n, group_size, backend):
    W, D = weights(5, n)
    g_idx = sequential_groups(n, group_size)
    grid = fit_grid(W, D, g_idx, 4, sym=False, search=backend.search)
    assert grid.scales.shape == (5, int(g_idx.max()) + 1)
    for g in range(grid.scales.shape[1]):
        inside = g_idx == g
        alone = fit_grid(
            W[:, inside], D[inside], torch.zeros(int(inside.sum())), 4, sym=False, search=backend.search
        )
        assert torch.equal(grid.scales[:, g], alone.scales[:, 0])
        assert torch.equal(grid.zeros[:, g], alone.zeros[:, 0])


def test_scattered_groups_give_the_grid_of_the_gathered_columns(backend):
    W, D = weights(9, 100)
    perm = torch.randperm(100)
    groups = sequential_groups(100, 32)
    scattered = torch.empty_like(groups)
    scattered[perm] = groups
    grid = fit_grid(W, D, scattered, 4, sym=True, search=backend.search)
    order = torch.cat([perm[groups == g].sort().values for g in range(4)])
    gathered = fit_grid(W[:, order], D[order], groups, 4, sym=True, search=backend.search)
    assert torch.equal(grid.scales, gathered.scales)


def test_a_group_that_never_was_active_is_fitted_with_equal_weights(backend):
    W, D = weights(8, 64)
    D[32:] = 0
    grid = fit_grid(W, D, sequential_groups(64, 32), 4, sym=True, search=backend.search)
    equal = fit_grid(W[:, 32:], torch.ones(32), torch.zeros(32), 4, sym=True, search=backend.search)
    assert torch.equal(grid.scales[:, 1], equal.scales[:, 0])
