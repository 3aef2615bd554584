"""Feedback between outputs: against elimination in float64, and what it gains."""

import dataclasses

import pytest
import torch

from fewbit.config import LayerSettings
from fewbit.gptq import Hessian, InputGroup, quantize_weight
from fewbit.gptq import output_feedback as feedback
from fewbit.gptq.grid import Grid
from fewbit.gptq.output_feedback import CHUNK, block_size, factor_outputs, output_blocks
from fewbit.gptq.round_rows import Rounded

SETTINGS = LayerSettings(bits=3, group_size=32, sym=True, act_order="group", damp=0.01, method="gptq")


def layer(m=192, n=96, tokens=600, seed=0):
    """A weight, the Hessian of its input, the inputs, and output gradients with strong correlations."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, n, generator=generator) @ torch.randn(n, n, generator=generator)
    g = torch.randn(tokens, m // 8 + 1, generator=generator) @ torch.randn(m // 8 + 1, m, generator=generator)
    H = Hessian(n)
    H.add(X)
    return torch.randn(m, n, generator=generator) * 0.05, H, X, g


def model_loss(E, G, X):
    """tr(G E H Eᵀ) in float64, G with all blocks but nothing between them."""
    E, H = E.double(), X.double().T @ X.double()
    whole = torch.block_diag(*G.double())[: len(E), : len(E)]
    return float((whole * (E @ H @ E.T)).sum())


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(feedback, "LARGEST_BLOCK", 96)


@pytest.mark.parametrize(
    ("outputs", "size"),
    [(1, 32), (32, 32), (576, 576), (1024, 1024), (1025, 544), (1536, 768), (14336, 1024)],
)
def test_blocks_are_equal_and_not_too_large(outputs, size, monkeypatch):
    monkeypatch.setattr(feedback, "LARGEST_BLOCK", 1024)
    assert block_size(outputs) == size


@pytest.mark.parametrize("outputs", [1, 40, 64, 100, 192])
def test_blocks_are_those_of_the_product(outputs):
    g = torch.randn(50, outputs)
    G, whole = output_blocks(g), g.double().T @ g.double()
    size = block_size(outputs)
    for block, a in zip(G, range(0, outputs, size), strict=True):
        b = min(a + size, outputs)
        torch.testing.assert_close(block[: b - a, : b - a].double(), whole[a:b, a:b], rtol=1e-5, atol=1e-4)
        assert block[b - a :].eq(0).all()
        assert block[:, b - a :].eq(0).all()


def test_the_factorization_gives_the_matrix_back():
    G = output_blocks(torch.randn(300, 100) * torch.rand(100))
    factor = factor_outputs(G)
    for block, (rows, L) in enumerate(zip(factor.rows, factor.L.double(), strict=True)):
        size = len(rows)
        order = rows - block * size
        assert sorted(order.tolist()) == list(range(size))
        A = G[block].double()[order][:, order]
        assert A.diagonal().diff().ge(0).all()
        diagonal = G[block].diagonal().double()
        A += feedback.DAMP * diagonal[diagonal > 0].mean() * torch.eye(size)
        inverse = torch.linalg.inv(L)
        D = inverse @ A @ inverse.T
        chunk = torch.arange(size) // CHUNK
        inside = chunk[:, None] == chunk
        torch.testing.assert_close(
            D[~inside], torch.zeros_like(D[~inside]), atol=1e-4 * float(A.max()), rtol=0
        )
        torch.testing.assert_close(L[inside], torch.eye(size).double()[inside])


def test_blocks_without_any_gradient_have_no_feedback():
    factor = factor_outputs(torch.zeros(2, 64, 64))
    assert torch.equal(factor.L, torch.eye(64).expand(2, -1, -1))


@pytest.mark.parametrize("outputs", [8, 100, 192])
def test_targets_are_shifted_by_the_errors_of_the_rows_before(outputs):
    generator = torch.Generator().manual_seed(1)
    T = torch.randn(outputs, 5, generator=generator, dtype=torch.float64).float()
    factor = factor_outputs(output_blocks(torch.randn(200, outputs, generator=generator)))
    numbers = torch.arange(outputs)[:, None]  # zero points that say which row it is
    given, E = {}, torch.zeros(outputs, 5, dtype=torch.float64)

    def round_rows(targets, grid):
        for target, row in zip(targets, grid.zeros[:, 0].tolist(), strict=True):
            given[row] = target.double()
            E[row] = torch.round(4 * target) / 4 - T[row].double()
        return Rounded(torch.round(4 * targets) + grid.zeros, grid.scales, grid.zeros[:, 0].double())

    grid = Grid(torch.full((outputs, 1), 0.25).half(), numbers, torch.zeros(5, dtype=torch.int32))
    rounded = feedback.round_with_feedback(T, grid, factor, round_rows)
    assert rounded.losses.tolist() == list(range(outputs))  # in the order of the rows
    torch.testing.assert_close((rounded.codes - numbers) / 4 - T, E, check_dtype=False)
    for rows, L in zip(factor.rows, factor.L.double(), strict=True):
        for k, row in enumerate(rows.tolist()):
            if row >= outputs:
                continue
            later = [i for i in range((k // CHUNK + 1) * CHUNK, len(rows)) if int(rows[i]) < outputs]
            expected = T[row].double() - sum((L[i, k] * E[rows[i]] for i in later), torch.zeros(5))
            torch.testing.assert_close(given[row], expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("outputs", [100, 192])
@pytest.mark.parametrize("act_order", ["group", "full"])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_loss_of_the_model_falls(bits, sym, act_order, outputs):
    W, H, X, g = layer(m=outputs)
    G, chosen = output_blocks(g), dataclasses.replace(SETTINGS, bits=bits, sym=sym, act_order=act_order)
    plain = quantize_weight(W, InputGroup(H), chosen)
    solution = quantize_weight(W, InputGroup(H), chosen, G=G)
    before, after = (model_loss(one.codes.dequantize() - W, G, X) for one in (plain, solution))
    assert after < 0.9 * before
    E = (solution.codes.dequantize() - W).double()
    assert solution.loss == pytest.approx(float((E @ (X.double().T @ X.double()) * E).sum()), rel=1e-3)
    assert solution.loss > plain.loss  # each output alone is worse


def test_uncorrelated_outputs_change_nothing():
    W, H, _, _ = layer()
    G = torch.diag_embed(torch.rand(2, 96))
    one, other = (quantize_weight(W, InputGroup(H), SETTINGS, G=given) for given in (None, G))
    assert torch.equal(one.codes.codes, other.codes.codes)
    assert torch.equal(one.codes.scales, other.codes.scales)
    assert one.loss == pytest.approx(other.loss, rel=1e-4)


def test_some_rows_get_the_bytes_of_the_whole():
    W, H, _, g = layer(m=384, n=128)
    G = output_blocks(g)
    whole = quantize_weight(W, InputGroup(H), SETTINGS, G=G)
    for a, b in ((0, 96), (96, 384), (192, 288)):
        part = quantize_weight(W[a:b], InputGroup(H), SETTINGS, G=G[a // 96 : b // 96])
        assert torch.equal(part.codes.codes, whole.codes.codes[a:b])
        assert torch.equal(part.codes.scales, whole.codes.scales[a:b])
