"""The correction against float64 and against its own definition."""

import pytest
import torch

import summing
from fewbit.config import LayerSettings
from fewbit.gptq import Hessian, Holdout, InputGroup, quantize_weight
from fewbit.gptq import cholesky as fallback
from fewbit.gptq.correction import (
    RIDGE,
    best_alpha,
    correction_step,
    input_error_covariance,
    local_sum,
    true_error,
)

SETTINGS = LayerSettings(bits=3, group_size=16, sym=True, act_order="group", damp=0.01, method="gptq")


def problem(n=40, m=24, tokens=600, drift=0.4, seed=0):
    """A weight, inputs of the original model and inputs that earlier layers have bent."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=g) / n**0.5
    X_full = torch.randn(tokens, n, generator=g) @ mix
    X = (
        X_full
        + drift * (X_full @ torch.randn(n, n, generator=g) / n**0.5)
        + 0.05 * torch.randn(tokens, n, generator=g)
    )
    return torch.randn(m, n, generator=g), X, X_full


def hessian_of(X, X_full):
    return summing.hessian_of(X.split(250), X_full.split(250))


def step_of(hessian, W):
    return correction_step(W, input_error_covariance(hessian))


def alpha_of(W, step, holdout):
    return best_alpha(W, step, holdout, local_sum)


def output_error(W, W_hat, holdout):
    return true_error(W, W_hat, holdout, local_sum)


def test_the_step_is_the_damped_least_squares_solution():
    W, X, X_full = problem()
    H = X.double().T @ X.double()
    ridge = RIDGE * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    C = (X_full - X).double().T @ X.double()
    want = W.double() @ C @ torch.linalg.inv(H + ridge)
    got = step_of(hessian_of(X, X_full), W)
    assert float((got - want).norm() / want.norm()) < 1e-4


def test_a_full_step_undoes_input_errors_that_are_linear():
    W, X, X_full = problem(tokens=4000)
    step = step_of(hessian_of(X, X_full), W)
    holdout = Holdout(X, X_full)
    assert output_error(W, W + step, holdout) < 0.2**0.5 * output_error(W, W, holdout)


def test_best_alpha_is_the_best_of_a_fine_list():
    W, X, X_full = problem()
    step = 3 * step_of(hessian_of(X[:300], X_full[:300]), W)  # too long on purpose
    holdout = Holdout(X[300:], X_full[300:])
    errors = {a / 100: output_error(W, W + a / 100 * step, holdout) for a in range(101)}
    best = min(errors, key=errors.get)
    assert 0 < best < 1
    assert alpha_of(W, step, holdout) == pytest.approx(best, abs=0.0051)


@pytest.mark.parametrize(("scale", "expected"), [(-1.0, 0.0), (0.01, 1.0), (0.0, 0.0)])
def test_alpha_stays_between_0_and_1(scale, expected):
    W, X, X_full = problem()
    step = step_of(hessian_of(X, X_full), W)
    assert alpha_of(W, scale * step, Holdout(X, X_full)) == expected


@pytest.mark.parametrize("correction", [0.5, 1.0, "auto"])
@pytest.mark.parametrize("sym", [True, False])
def test_the_correction_lowers_the_error_on_held_out_tokens(correction, sym):
    W, X, X_full = problem(tokens=2000)
    H, holdout = hessian_of(X[:1500], X_full[:1500]), Holdout(X[1500:], X_full[1500:])
    settings = LayerSettings(bits=4, group_size=16, sym=sym, act_order="group", damp=0.01, method="gptq")
    group = InputGroup(H, holdout)
    plain = quantize_weight(W, group, settings)
    corrected = quantize_weight(W, group, settings, correction=correction)
    assert plain.alpha == 0.0
    assert 0 < corrected.alpha <= 1
    assert corrected.true_error < 0.8 * plain.true_error
    norm = float((holdout.X_full @ W.T).norm())
    error = float((holdout.X_full @ W.T - holdout.X @ corrected.codes.dequantize().T).norm())
    assert corrected.true_error == pytest.approx(error / norm, rel=1e-4)


def test_auto_without_input_errors_or_a_holdout_changes_nothing():
    W, X, _ = problem()
    H = hessian_of(X, X)
    plain = quantize_weight(W, InputGroup(H), SETTINGS)
    without_errors = quantize_weight(W, InputGroup(H, Holdout(X, X)), SETTINGS, correction="auto")
    without_holdout = quantize_weight(W, InputGroup(H), SETTINGS, correction="auto")
    for other in (without_errors, without_holdout):
        assert other.alpha == 0.0
        assert torch.equal(other.codes.codes, plain.codes.codes)


def test_without_full_precision_inputs_there_is_no_alpha():
    W, X, _ = problem()
    H = Hessian(X.shape[1])
    H.add(X)
    assert quantize_weight(W, InputGroup(H), SETTINGS, correction=0.5).alpha is None


def test_layers_with_one_input_share_the_input_error():
    _, X, X_full = problem()
    group = InputGroup(hessian_of(X, X_full))
    assert group.input_error() is group.input_error()


def test_a_matrix_that_cannot_be_factored_is_a_fallback(monkeypatch):
    W, X, X_full = problem()
    H = hessian_of(X, X_full)
    monkeypatch.setattr("fewbit.gptq.correction.RIDGE", -2.0)  # no Hessian is positive definite after that
    solution = quantize_weight(W, InputGroup(H), SETTINGS, correction=0.5)
    assert solution.fallbacks == (fallback.NO_CORRECTION,)
    assert solution.alpha == 0.0
