"""The correction: what a layer should compute, given that its inputs are no longer the original ones.

Contract: pure functions. Earlier layers are quantized already, so the layer gets X where it used to get X̃.
With C = (X̃ − X) Xᵀ and H = X Xᵀ,

    ‖W X̃ − Ŵ X‖² = ‖Ŵ − T‖²_H + const,   T = W + W C H⁻¹.

The exact T follows the calibration tokens too closely: H⁻¹ is replaced by a strongly damped one, and only
a part α of the step is taken, T = W + α W C (H + λI)⁻¹. GPTAQ (arXiv:2504.02692), QEP (arXiv:2504.09629)
and Qronos (arXiv:2505.11695) are special cases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .batching import product, stacked, worked
from .hessian import Hessian

# Sums figures of the rows of W, float64 (rows, …), over all rows of the layer, of which W may be a part: always in
# the same order, so that the sum does not depend on the parts.
RowReduce = Callable[[Tensor], Tensor]

# λ of the correction, as a fraction of mean(diag H). Chosen by measurement: docs/accuracy.md.
RIDGE = 0.1

# With α chosen freely on held-out tokens this share of it is used: other texts drift less like the
# calibration text than its own held-out part does.
ALPHA_SHRINKAGE = 0.6


@dataclass(frozen=True)
class Holdout:
    """Held-out tokens of a layer: they enter no Hessian, and judge what was made of it.

    Attributes:
        X: (tokens, n), inputs in the quantized model. X_full: the same tokens in the original one.
    """

    X: Tensor
    X_full: Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.X.shape[0]


@dataclass(frozen=True)
class Drift:
    """The direction of the correction, for the layers that share a Hessian.

    Attributes:
        C: float32 (n, n). L: the Cholesky factor of H + λI; None where it cannot be factored.
    """

    C: Tensor
    L: Tensor | None


def drifts_of(hessians: Sequence[Hessian]) -> list[Drift]:
    """Of Hessians of one size, all with full-precision inputs: factored as one batch."""
    means = torch.stack([hessian.matrix().diagonal().mean() for hessian in hessians])
    A = torch.stack([hessian.matrix() for hessian in hessians])
    A.diagonal(dim1=-2, dim2=-1).add_(RIDGE * means[:, None])
    L, info = torch.linalg.cholesky_ex(A)
    del A
    drifts = []
    for hessian, factor, is_factor in zip(hessians, L, worked(L, info).tolist(), strict=True):
        C = hessian.input_error()
        assert C is not None
        drifts.append(Drift(C, factor if is_factor else None))
    return drifts


def steps_of(weights: Sequence[Tensor], drifts: Sequence[Drift]) -> list[Tensor]:
    """W C (H + λI)⁻¹ for every W, float32 (B, m, n): batches, of which each matrix has a drift that has an L."""
    C = stacked([drift.C for drift in drifts])
    steps = [product(W, C) for W in weights]
    del C
    for step in steps:
        # One after the other: for many right-hand sides torch's batch is such a loop, too, and needs copies of every L.
        for part, drift in zip(step, drifts, strict=True):
            assert drift.L is not None
            part.copy_(torch.cholesky_solve(part.T, drift.L).T)
    return steps


def whole(figures: Tensor) -> Tensor:
    """The `RowReduce` of a W that has all rows."""
    return figures.sum(0)


# Figures are float64, for each row of a batch of weights (B, m, n). X and X̃ are those of the probes, (B, tokens, n):
# rows of zeros add nothing to any of them.


def alpha_figures(W: Tensor, step: Tensor, X: Tensor, X_full: Tensor) -> Tensor:
    """⟨A, B⟩ and ‖B‖² of every row, (B, m, 2), with A = W (X̃ − X) and B = step X."""
    A = product(W, (X_full - X).mT)
    B = product(step, X.mT)
    return torch.stack([_sums(A * B), _sums(B.square())], dim=-1)


def best_alpha(inner: float, norm: float) -> float:
    """The α in 0 … 1 that minimises ‖W X̃ − (W + α step) X‖² = ‖A − αB‖²: at ⟨A, B⟩ / ‖B‖².

    Args:
        inner, norm: sums of `alpha_figures` over the rows.
    """
    return min(1.0, max(0.0, inner / norm)) if norm > 0 else 0.0


def error_figures(W: Tensor, W_hat: Tensor, X: Tensor, X_full: Tensor) -> Tensor:
    """‖W X̃ − Ŵ X‖² of every row, (B, m)."""
    E = product(W, X_full.mT).sub_(product(W_hat, X.mT))
    return _sums(E.square_())


def relative_figures(W: Tensor, W_hat: Tensor, X: Tensor, X_full: Tensor) -> Tensor:
    """‖W X̃ − Ŵ X‖² and ‖W X̃‖² of every row, (B, m, 2)."""
    Y = product(W, X_full.mT)
    norms = _sums(Y.square())
    errors = _sums(Y.sub_(product(W_hat, X.mT)).square_())
    return torch.stack([errors, norms], dim=-1)


def relative_error(error: float, norm: float) -> float | None:
    """‖W X̃ − Ŵ X‖ / ‖W X̃‖; None where W X̃ carries no signal.

    Args:
        error, norm: sums of `relative_figures` over the rows.
    """
    return math.sqrt(error / norm) if norm > 0 else None


def _sums(Y: Tensor) -> Tensor:
    """The sum of every row, float64."""
    return Y.sum(dim=-1, dtype=torch.float64)
