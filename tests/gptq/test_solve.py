import dataclasses

import pytest
import torch

import oracle
from fewbit.config import LayerSettings
from fewbit.errors import SolverError
from fewbit.gptq import WIDER_GRIDS, Hessian, InputGroup, cholesky, quantize_weight
from fewbit.gptq.grid import fit_grid
from fewbit.quantized_matrix import sequential_groups

SETTINGS = LayerSettings(bits=4, group_size=32, sym=True, act_order="group", damp=0.01, method="gptq")


def settings(**changes):
    return dataclasses.replace(SETTINGS, **changes)


def layer(m=24, n=100, tokens=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, n, generator=generator) @ torch.randn(n, n, generator=generator)
    H = Hessian(n)
    H.add(X)
    return torch.randn(m, n, generator=generator) * 0.05, H, X


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("act_order", ["none", "group", "full"])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_all_settings(bits, sym, act_order):
    W, H, X = layer()
    chosen = settings(bits=bits, sym=sym, act_order=act_order)
    solution = quantize_weight(W.bfloat16(), InputGroup(H), chosen)
    codes, W = solution.codes, W.bfloat16().float()
    assert codes.shape == (24, 100)
    assert int(codes.codes.max()) < 2**bits
    assert codes.has_act_order == (act_order == "full")
    assert solution.loss == pytest.approx(oracle.loss(W, codes.dequantize(), oracle.hessian(X)), rel=5e-3)
    rounded = quantize_weight(W, None, dataclasses.replace(chosen, act_order="none"))
    assert solution.loss < 0.8 * oracle.loss(W, rounded.codes.dequantize(), oracle.hessian(X))
    assert (solution.fallbacks, solution.damp, solution.tokens) == ((), 0.01, 400)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_without_a_hessian_the_weight_is_rounded_on_the_same_grid_search(method):
    W, H, _ = layer()
    solution = quantize_weight(W, InputGroup(H) if method == "rtn" else None, settings(method=method))
    assert torch.equal(solution.codes.g_idx, sequential_groups(100, 32))
    s, z = solution.codes.scales.double().repeat_interleave(32, 1)[:, :100], 8.0
    assert torch.equal(solution.codes.codes.double(), (torch.round(W.double() / s) + z).clamp(0, 15))
    assert solution.loss == pytest.approx(float((W - solution.codes.dequantize()).square().sum()), rel=1e-4)
    assert solution.damp is None


@pytest.mark.parametrize("sym", [True, False])
def test_every_row_takes_the_grid_that_ends_with_the_lowest_error(sym, backend):
    # Few directions: rounding undoes almost every error, where columns are not clipped.
    generator = torch.Generator().manual_seed(3)
    X = torch.randn(400, 6, generator=generator) @ torch.randn(6, 96, generator=generator)
    X += 0.05 * torch.randn(400, 96, generator=generator)
    W = torch.randn(40, 96, generator=generator) * 0.05
    H, chosen = Hessian(96), settings(bits=2, sym=sym, act_order="none")
    H.add(X)
    group = InputGroup(H)
    codes = quantize_weight(W, group, chosen).codes
    shared = group.factored(chosen)
    fitted = fit_grid(W, shared.D, shared.g_idx, 2, sym=sym, search=backend.search)
    ratios = (codes.scales.float() / fitted.scales.float()).mean(1)
    nearest = (ratios[:, None] - torch.tensor((1.0, *WIDER_GRIDS))).abs().argmin(1)
    assert {0, 1, 2} >= set(nearest.tolist()) != {0}  # some rows are better off with a wider grid, all of it

    H_damped = oracle.damped(oracle.hessian(X), 0.01)
    losses = []
    for stretch in (1.0, *WIDER_GRIDS):
        s = (fitted.scales.float() * stretch).half().double().repeat_interleave(32, 1)
        z = fitted.zeros.double().repeat_interleave(32, 1)
        E = W.double() - s * (oracle.ldlq(W, H_damped, s, z, 2) - z)
        losses.append(((E @ oracle.hessian(X)) * E).sum(1))
    E = W.double() - codes.dequantize().double()
    loss = ((E @ oracle.hessian(X)) * E).sum(1)
    assert (loss <= 1.05 * torch.stack(losses).min(0).values).float().mean() > 0.9  # the others broke a tie
    assert float(loss.sum()) < 0.8 * float(losses[0].sum())


def test_no_tokens_means_rounding_with_a_record():
    W, _, _ = layer()
    solution = quantize_weight(W, InputGroup(Hessian(100)), settings())
    assert solution.fallbacks == (cholesky.NO_TOKENS, cholesky.ROUND_TO_NEAREST)
    assert torch.equal(solution.codes.codes, quantize_weight(W, None, settings()).codes.codes)


def test_a_broken_hessian_means_rounding_on_the_weighted_grid():
    W, H, _ = layer()
    H.matrix().fill_(float("inf"))  # the state itself: no batch that `add` lets in could do this
    solution = quantize_weight(W, InputGroup(H), settings())
    assert solution.fallbacks == (cholesky.ROUND_TO_NEAREST,)
    assert (W - solution.codes.dequantize()).norm() < 0.2 * W.norm()


@pytest.mark.usefixtures("backend")
def test_columns_that_never_were_active_are_rounded_to_nearest():
    W, _, X = layer()
    X[:, [0, 40, 99]] = 0
    H = Hessian(100)
    H.add(X)
    solution = quantize_weight(W, InputGroup(H), settings())
    codes = solution.codes
    s = codes.scales.float()[:, codes.g_idx.long()]
    rounded = s * (torch.round(W / s) + 8).clamp(0, 15).sub(8)
    assert solution.dead == 3
    assert torch.equal(codes.dequantize()[:, [0, 40, 99]], rounded[:, [0, 40, 99]])
    assert rounded[:, 40].abs().max() > 0


def test_layers_with_one_input_share_its_factorization():
    W, H, _ = layer()
    group = InputGroup(H)
    first = group.factored(settings())
    assert group.factored(settings(bits=3)) is first
    assert group.factored(settings(damp=0.1)) is not first
    shared = quantize_weight(W, group, settings())
    assert torch.equal(shared.codes.codes, quantize_weight(W, InputGroup(H), settings()).codes.codes)


@pytest.mark.usefixtures("backend")
def test_same_bytes_every_time():
    W, H, _ = layer(m=70, n=130)
    first, second = (quantize_weight(W, InputGroup(H), settings(sym=False)) for _ in range(2))
    assert torch.equal(first.codes.codes, second.codes.codes)
    assert first.loss == second.loss


def test_the_weight_is_not_changed():
    W, H, _ = layer()
    before = W.clone()
    quantize_weight(W, InputGroup(H), settings())
    assert torch.equal(W, before)


def test_errors_say_what_and_how_much():
    W, H, _ = layer()
    W[3, 7] = W[3, 8] = W[5, 7] = float("nan")
    with pytest.raises(SolverError, match="2 of 24 rows and 2 of 100 columns"):
        quantize_weight(W, InputGroup(H), settings())
    with pytest.raises(SolverError, match="99 input features, but its Hessian has 100"):
        quantize_weight(torch.zeros(3, 99), InputGroup(H), settings())
    with pytest.raises(SolverError, match=r"float matrix \(out, in\); got torch.int64"):
        quantize_weight(torch.zeros(3, 100, dtype=torch.long), InputGroup(H), settings())
