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
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .hessian import Hessian

# Sums figures of the rows of W, float64 (rows, …), over all rows of the layer, of which W may be a part: always in
# the same order, so that the sum does not depend on the parts.
Total = Callable[[Tensor], Tensor]

# λ of the correction, as a fraction of mean(diag H). Chosen by measurement: docs/accuracy.md.
RIDGE = 0.1

# With α chosen freely on held-out tokens this share of it is used: other texts drift less like the
# calibration text than its own held-out part does.
CAUTION = 0.6


@dataclass(frozen=True)
class Probe:
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


class Drift:
    """The direction of the correction, for the layers that share a Hessian.

    Args:
        hessian: with full-precision inputs.
    """

    def __init__(self, hessian: Hessian) -> None:
        C = hessian.drift()
        assert C is not None
        self.C = C
        H = hessian.matrix().clone()
        H.diagonal().add_(RIDGE * H.diagonal().mean())
        L, info = torch.linalg.cholesky_ex(H)
        self.L: Tensor | None = L if int(info) == 0 and bool(torch.isfinite(L.diagonal()).all()) else None

    def step(self, W: Tensor) -> Tensor | None:
        """W C (H + λI)⁻¹, float32 (m, n); None where H + λI cannot be factored."""
        if self.L is None:
            return None
        return torch.cholesky_solve((W @ self.C).T, self.L).T.contiguous()


def whole(figures: Tensor) -> Tensor:
    """The `Total` of a W that has all rows."""
    return figures.sum(0)


def best_alpha(W: Tensor, step: Tensor, probe: Probe, total: Total = whole) -> float:
    """The α in 0 … 1 that minimises ‖W X̃ − (W + α step) X‖² on the probe.

    In closed form: with A = W (X̃ − X) and B = step X the minimum of ‖A − αB‖² is at ⟨A, B⟩ / ‖B‖².
    """
    A = W @ (probe.X_full - probe.X).T
    B = step @ probe.X.T
    product, norm = total(torch.stack([_sums(A * B), _sums(B.square())], dim=1)).tolist()
    return min(1.0, max(0.0, product / norm)) if norm > 0 else 0.0


def output_error(W: Tensor, W_hat: Tensor, probe: Probe, total: Total = whole) -> float:
    """‖W X̃ − Ŵ X‖² on the probe."""
    E = (W @ probe.X_full.T).sub_(W_hat @ probe.X.T)
    return float(total(_sums(E.square_())))


def relative_error(W: Tensor, W_hat: Tensor, probe: Probe, total: Total = whole) -> float | None:
    """‖W X̃ − Ŵ X‖ / ‖W X̃‖ on the probe; None where W X̃ carries no signal."""
    Y = W @ probe.X_full.T
    norms = _sums(Y.square())
    errors = _sums(Y.sub_(W_hat @ probe.X.T).square_())
    error, norm = total(torch.stack([errors, norms], dim=1)).tolist()
    return math.sqrt(error / norm) if norm > 0 else None


def _sums(Y: Tensor) -> Tensor:
    """The sum of every row, float64."""
    return Y.sum(dim=1, dtype=torch.float64)
