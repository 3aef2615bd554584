"""The correction: move a layer's target towards the outputs of the full-precision model.

Earlier layers are quantized already, so the layer receives X instead of X̃. With C = (X̃ − X) Xᵀ and H = X Xᵀ,

    ‖W X̃ − Ŵ X‖² = ‖Ŵ − T‖²_H + const,   T = W + W C H⁻¹.

The exact T follows the calibration tokens too closely. Therefore H is strongly damped, and only a part α of the step is
taken: T = W + α W C (H + ρI)⁻¹. GPTAQ (arXiv:2504.02692), QEP (arXiv:2504.09629) and Qronos (arXiv:2505.11695) are
special cases.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .gptq import cholesky_
from .hessian import Hessian

# Sums the statistics of rows, float64 (rows, …), over all rows of a layer. If W holds only some of them, the other
# processes contribute theirs, always in the same order.
RowReduce = Callable[[Tensor], Tensor]

# ρ of the correction, as a fraction of mean(diag H). Chosen by measurement: docs/accuracy.md.
RIDGE = 0.1

# Share of the best α on the held-out tokens: input errors on other text resemble those on the calibration text less
# than the held-out part of it does.
ALPHA_SHRINKAGE = 0.6

# Rows of the weight that are corrected at a time, which bounds the memory.
CORRECTED_ROWS = 1024


@dataclass(frozen=True)
class Holdout:
    """Held-out tokens of a layer, which enter no Hessian and measure the result.

    Attributes:
        X: (tokens, n), inputs on the quantized path.
        X_full: (tokens, n), inputs on the full-precision path.
    """

    X: Tensor
    X_full: Tensor

    @property
    def tokens(self) -> int:
        return self.X.shape[0]


@dataclass(frozen=True)
class InputErrorCovariance:
    """What the correction needs of a layer's inputs.

    Attributes:
        C: float32 (n, n), (X̃ − X) Xᵀ.
        L: float32 (n, n), the Cholesky factor of H + ρI; None where it cannot be factored.
    """

    C: Tensor
    L: Tensor | None


def input_error_covariance(hessian: Hessian) -> InputErrorCovariance:
    """Factor H + ρI for the correction; the Hessian has full-precision inputs."""
    A = hessian.matrix().clone()
    A.diagonal().add_(RIDGE * A.diagonal().mean())
    C = hessian.input_error()
    assert C is not None
    return InputErrorCovariance(C, A.mT if cholesky_(A) else None)


def correction_step(W: Tensor, error: InputErrorCovariance) -> Tensor:
    """W C (H + ρI)⁻¹, float32 (m, n)."""
    L = error.L
    assert L is not None
    step = torch.empty_like(W)
    for a in range(0, len(W), CORRECTED_ROWS):
        rows = slice(a, a + CORRECTED_ROWS)
        product = W[rows] @ error.C
        half = torch.linalg.solve_triangular(L.mT, product, upper=True, left=False)  # W C L⁻ᵀ
        step[rows] = torch.linalg.solve_triangular(L, half, upper=False, left=False)
    return step


def local_sum(stats: Tensor) -> Tensor:
    """The `RowReduce` of a W with all rows."""
    return stats.sum(0)


def best_alpha(W: Tensor, step: Tensor, holdout: Holdout, reduce: RowReduce) -> float:
    """The α in 0 … 1 that minimizes ‖W X̃ − (W + α step) X‖² on the held-out tokens."""
    A = W @ (holdout.X_full - holdout.X).T
    B = step @ holdout.X.T
    # ‖A − αB‖² is smallest at α = ⟨A, B⟩ / ‖B‖².
    inner, norm = reduce(torch.stack([torch.linalg.vecdot(A, B).double(), _squares(B)], dim=-1)).tolist()
    return min(1.0, max(0.0, inner / norm)) if norm > 0 else 0.0


def true_error(W: Tensor, W_hat: Tensor, holdout: Holdout, reduce: RowReduce) -> float | None:
    """‖W X̃ − Ŵ X‖ / ‖W X̃‖ on the held-out tokens; None where W X̃ carries no signal."""
    Y = W @ holdout.X_full.T
    norms = _squares(Y)
    error, norm = reduce(torch.stack([_squares(Y.sub_(W_hat @ holdout.X.T)), norms], dim=-1)).tolist()
    return math.sqrt(error / norm) if norm > 0 else None


def _squares(Y: Tensor) -> Tensor:
    """Σ y² of every row, float64."""
    norms: Tensor = torch.linalg.vector_norm(Y, dim=-1)
    return norms.double().square()
