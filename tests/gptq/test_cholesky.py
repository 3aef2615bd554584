"""Every fallback, with the smallest Hessian that needs it."""

import pytest
import torch

from fewbit.gptq import Hessian, cholesky
from fewbit.gptq.cholesky import factor_hessian, factor_with_fallbacks

ORDER = torch.arange(64)


def with_lowest_eigenvalue(lowest):
    """Mean of the diagonal about 1, one eigenvalue as given."""
    Q, _ = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))
    values = torch.ones(64, dtype=torch.float64)
    values[0] = lowest
    return ((Q * values) @ Q.T).float()


def test_a_good_hessian_needs_no_fallback():
    found, damp, fallbacks = factor_with_fallbacks(with_lowest_eigenvalue(0.1), ORDER, 0.01)
    assert found is not None
    assert (damp, fallbacks) == (0.01, ())


def test_float64_where_float32_has_too_few_digits():
    # Small integers: the products are exact, the rank is 8, and λ disappears in float32.
    X = torch.randint(-3, 4, (8, 64)).float()
    found, damp, fallbacks = factor_with_fallbacks(X.T @ X, ORDER, 1e-10)
    assert found is not None
    assert (damp, fallbacks) == (1e-10, (cholesky.FLOAT64,))
    assert torch.isfinite(found.F).all()


def test_damping_is_raised_tenfold():
    found, damp, fallbacks = factor_with_fallbacks(with_lowest_eigenvalue(-0.05), ORDER, 0.01)
    assert found is not None
    assert damp == pytest.approx(0.1)
    assert fallbacks == (cholesky.FLOAT64, cholesky.DAMP_RAISED)


def test_damping_stops_at_one():
    found, damp, fallbacks = factor_with_fallbacks(with_lowest_eigenvalue(-0.7), ORDER, 0.03)
    assert found is not None
    assert damp == 1.0
    assert fallbacks[-1] == cholesky.DAMP_RAISED


def test_negative_eigenvalues_are_clamped():
    found, damp, fallbacks = factor_with_fallbacks(with_lowest_eigenvalue(-5.0), ORDER, 0.01)
    assert found is not None
    assert damp == 0.01
    assert fallbacks[-1] == cholesky.EIGENVALUES_CLAMPED
    values = torch.linalg.eigvalsh(cholesky.clamped(with_lowest_eigenvalue(-5.0)))
    assert values.min() > -1e-12
    assert values.max() == pytest.approx(1, rel=1e-4)


def test_rounding_is_the_last_fallback():
    found, _, fallbacks = factor_with_fallbacks(-torch.eye(64), ORDER, 0.01)
    assert found is None
    assert fallbacks[-2:] == (cholesky.EIGENVALUES_CLAMPED, cholesky.ROUND_TO_NEAREST)


def test_a_hessian_that_is_not_finite_goes_straight_to_rounding():
    H = torch.eye(64)
    H[3, 3] = float("inf")
    found, _, fallbacks = factor_with_fallbacks(H, ORDER, 0.01)
    assert found is None
    assert fallbacks == (cholesky.ROUND_TO_NEAREST,)
    assert torch.isfinite(cholesky.grid_weights(H.diagonal(), 0.01)).all()


def test_no_tokens():
    factored = factor_hessian(Hessian(64), 32, "group", 0.01)
    assert factored.factor is None
    assert factored.fallbacks == (cholesky.NO_TOKENS, cholesky.ROUND_TO_NEAREST)


def test_dropped_tokens_are_named_first():
    H = Hessian(8)
    X = torch.randn(100, 8)
    X[0, 0] = float("nan")
    H.add(X)
    factored = factor_hessian(H, -1, "none", 0.01)
    assert factored.factor is not None
    assert factored.fallbacks == (cholesky.TOKENS_DROPPED,)


def test_dead_columns_are_counted_and_stay_inside_the_grid_fit():
    H = Hessian(8)
    X = torch.randn(100, 8)
    X[:, [2, 5]] = 0
    H.add(X)
    factored = factor_hessian(H, -1, "group", 0.01)
    assert factored.dead == 2
    assert (factored.D > 0).all()
    assert factored.fallbacks == ()
