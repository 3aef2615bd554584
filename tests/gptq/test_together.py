"""Many layers at once: what each would have got alone, and what one bad Hessian does to the others."""

import dataclasses

import pytest
import torch

from fewbit.config import LayerSettings
from fewbit.errors import SolverError
from fewbit.gptq import (
    Accuracy,
    FactorCache,
    Hessian,
    Holdout,
    InputGroup,
    quantize_together,
    quantize_weight,
)
from fewbit.gptq import cholesky as fallback
from fewbit.gptq.cholesky import prepare, prepare_all
from fewbit.gptq.correction import whole

SETTINGS = LayerSettings(bits=4, group_size=16, sym=True, act_order="group", damp=0.01, method="gptq")


def family(rows, n=48, tokens=200, seed=0, full=True):
    """Weights with so many rows each, and their input."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator)
    X_full = torch.randn(tokens + 50, n, generator=generator) @ mix
    X = X_full + 0.2 * torch.randn(tokens + 50, n, generator=generator) @ mix
    H = Hessian(n)
    H.add(X[:tokens], full=X_full[:tokens] if full else None)
    weights = [torch.randn(m, n, generator=generator) for m in rows]
    probe = Holdout(X[tokens:], X_full[tokens:]) if full else None
    return InputGroup(weights, H, FactorCache(), probe, [whole] * len(rows))


def alone(one, settings, accuracy):
    return [
        quantize_weight(W, one.hessian, settings, accuracy=accuracy, probe=one.probe, backend="torch")
        for W in one.weights
    ]


def assert_same(solution, other):
    for part in ("codes", "scales", "zeros", "g_idx"):
        assert torch.equal(getattr(solution.codes, part), getattr(other.codes, part)), part
    assert solution.loss == pytest.approx(other.loss, rel=1e-4)
    assert solution.true_error == pytest.approx(other.true_error, rel=1e-4)
    assert solution.alpha == pytest.approx(other.alpha, rel=1e-3)
    for fact in ("fallbacks", "damp", "tokens", "dropped", "dead", "refit"):
        assert getattr(solution, fact) == getattr(other, fact), fact


CASES = {
    "plain": (SETTINGS, Accuracy()),
    "corrected": (dataclasses.replace(SETTINGS, bits=3, act_order="full"), Accuracy("auto")),
    "refitted": (dataclasses.replace(SETTINGS, bits=2, sym=False), Accuracy(0.5, refit=True)),
    "8 bits": (dataclasses.replace(SETTINGS, bits=8, group_size=-1), Accuracy()),
}


@pytest.mark.parametrize("case", CASES)
def test_siblings_and_experts_get_what_they_would_get_alone(case):
    settings, accuracy = CASES[case]
    # Two experts of one shape with other numbers of tokens, and a family of another shape.
    families = [family((40, 33), seed=1), family((40, 33), tokens=120, seed=2), family((1, 64), n=50, seed=3)]
    together = quantize_together(families, settings, accuracy=accuracy, backend="torch")
    for one, solutions in zip(families, together, strict=True):
        for solution, other in zip(solutions, alone(one, settings, accuracy), strict=True):
            assert_same(solution, other)


def test_one_bad_hessian_goes_down_the_ladder_alone():
    families = [family((32,), seed=seed, full=False) for seed in range(4)]
    families[1].hessian.matrix().fill_(float("nan"))
    # Small integers of low rank: exact in float64, and λ disappears in float32.
    tiny = dataclasses.replace(SETTINGS, damp=1e-10)
    X = torch.randint(-3, 4, (8, 48), generator=torch.Generator().manual_seed(0)).float()
    low = Hessian(48)
    low.add(X)
    families[2] = dataclasses.replace(families[2], hessian=low)
    solutions = [one for [one] in quantize_together(families, tiny, backend="torch")]
    assert [one.fallbacks for one in solutions] == [
        (),
        (fallback.ROUND_TO_NEAREST,),
        (fallback.FLOAT64,),
        (),
    ]
    for one, solution in zip(families, solutions, strict=True):
        [expected] = alone(one, tiny, Accuracy())
        assert torch.equal(solution.codes.codes, expected.codes.codes)


def test_an_expert_without_tokens_is_rounded_to_nearest():
    families = [
        family((32,), seed=1, full=False),
        InputGroup([torch.randn(32, 48)], Hessian(48), FactorCache(), None, [whole]),
    ]
    [[first], [second]] = quantize_together(families, SETTINGS, backend="torch")
    assert first.fallbacks == ()
    assert second.fallbacks == (fallback.NO_TOKENS, fallback.ROUND_TO_NEAREST)


def test_a_batch_of_hessians_is_prepared_like_each_alone():
    hessians = [
        family((1,), n=n, tokens=tokens, seed=n).hessian for n, tokens in ((48, 100), (50, 90), (48, 70))
    ]
    hessians[2].dropped = 3
    for found, hessian in zip(prepare_all(hessians, 16, "full", 0.01), hessians, strict=True):
        expected = prepare(hessian, 16, "full", 0.01)
        for part in ("D", "g_idx"):
            assert torch.equal(getattr(found, part), getattr(expected, part))
        assert (found.damp, found.dead, found.fallbacks) == (expected.damp, expected.dead, expected.fallbacks)
        torch.testing.assert_close(found.factor.F, expected.factor.F, rtol=1e-5, atol=1e-6)


def test_factorizations_that_are_there_are_used():
    families = [family((4,), seed=seed) for seed in range(2)]
    first = families[0].cache.get(families[0].hessian, SETTINGS)
    quantize_together(families, SETTINGS, backend="torch")
    assert families[0].cache.get(families[0].hessian, SETTINGS) is first
    assert families[1].cache.has(SETTINGS)
    with pytest.raises(SolverError, match="another Hessian"):
        families[1].cache.put(families[0].hessian, SETTINGS, first)


def test_a_weight_that_does_not_fit_is_refused_before_anything_is_done():
    wrong = family((4,))
    wrong.weights[0] = torch.zeros(4, 47)
    with pytest.raises(SolverError, match="47 input features, but its Hessian has 48"):
        quantize_together([family((4,)), wrong], SETTINGS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", ["plain", "8 bits"])
def test_on_a_gpu_the_codes_are_those_of_the_cpu(case):
    settings, accuracy = CASES[case]
    families = [family((40, 33), n=300, tokens=900 + seed, seed=seed, full=False) for seed in range(3)]
    on_gpu = []
    for one in families:
        H = Hessian(300, device="cuda")
        H.matrix().copy_(one.hessian.matrix())
        H.tokens = one.hessian.tokens
        on_gpu.append(InputGroup([W.cuda() for W in one.weights], H, FactorCache(), None, one.totals))
    for one, solutions in zip(families, quantize_together(on_gpu, settings), strict=True):
        for solution, other in zip(solutions, alone(one, settings, accuracy), strict=True):
            same = (solution.codes.codes.cpu() == other.codes.codes).float().mean()
            assert same > 0.9  # where a tie is broken the other way, the rest of the row may differ
            assert solution.loss == pytest.approx(other.loss, rel=0.02)
            assert solution.fallbacks == other.fallbacks
