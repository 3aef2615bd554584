"""The Hessian of a linear layer: H = X Xᵀ, summed over calibration tokens.

Contract: a sum, never an average, in float32; symmetric; tokens are added in any number of batches and
H does not depend on anything else. Knows nothing of models, layers or weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SolverError
from . import native
from .native import Backend

# A token with a larger value is treated like one that is not finite: its squares, summed over any
# calibration set, could leave float32.
LARGEST_ACTIVATION = 2.0**50

# Blocks of columns whose upper triangle is computed: 60% of the full product. More blocks save
# arithmetic but make the matrix products too narrow to run at full speed.
_BLOCKS = 5

# Float32 copies of a batch are made in pieces of this many bytes.
_PIECE_BYTES = 1 << 26


class Hessian:
    """Accumulates H = Σ x xᵀ over tokens.

    Only the upper triangle is accumulated; `matrix` mirrors it. The same batches in the same order
    give the same bytes, for one backend and thread count.

    Args:
        n: input features of the layer.
        device: where H lives. Batches are moved there.
        backend: "auto", "torch" or "native" (see `solver.native`).
    """

    def __init__(self, n: int, *, device: torch.device | str = "cpu", backend: Backend = "auto") -> None:
        self.n = n
        self.tokens = 0
        self.dropped = 0
        self._backend: Backend = backend
        self._H = torch.zeros(n, n, dtype=torch.float32, device=device)

    def add(self, X: Tensor, mask: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            X: (tokens, n) or (..., n), float32, bfloat16 or float16. One row per token.
            mask: bool, one value per row of X; False rows (padding) do not count.

        Raises:
            SolverError: the last dimension of X is not n, or the mask has another number of rows.
        """
        if X.shape[-1] != self.n:
            raise SolverError(f"this Hessian has {self.n} input features, but the batch has {X.shape[-1]}")
        X = X.detach().reshape(-1, self.n).to(self._H.device)
        if mask is not None:
            X = _masked(X, mask)
        X = self._without_bad_rows(X)
        if X.shape[0] == 0:
            return
        self.tokens += X.shape[0]
        if X.dtype == torch.bfloat16 and native.use(self._backend, X, needs="avx512_bf16"):
            native.syrk_bf16(X.contiguous(), self._H)
            return
        step = max(1, _PIECE_BYTES // (4 * self.n))
        for a in range(0, X.shape[0], step):
            _add_upper(self._H, X[a : a + step].float())

    def matrix(self) -> Tensor:
        """H, float32 (n, n), symmetric. A view of the state: do not write to it, and do not keep it
        while more tokens are added.
        """
        for a in range(0, self.n, 256):
            b = min(a + 256, self.n)
            self._H[b:, a:b] = self._H[a:b, b:].T
            square = self._H[a:b, a:b]
            self._H[a:b, a:b] = square.triu() + square.triu(1).T
        return self._H

    def diagonal(self) -> Tensor:
        """diag(H), float32 (n,), a copy."""
        return self._H.diagonal().clone()

    def _without_bad_rows(self, X: Tensor) -> Tensor:
        """X without the rows that are not finite. One reduction in the normal case."""
        if X.numel() == 0 or _in_range(torch.stack(torch.aminmax(X))):
            return X
        good = ((X.abs() <= LARGEST_ACTIVATION) & torch.isfinite(X)).all(dim=1)
        self.dropped += int((~good).sum())
        return X[good]


def _in_range(extremes: Tensor) -> bool:
    # NaN compares false, so it is out of range too.
    return bool((extremes.float().abs() <= LARGEST_ACTIVATION).all())


def _masked(X: Tensor, mask: Tensor) -> Tensor:
    mask = mask.reshape(-1).to(device=X.device, dtype=torch.bool)
    if mask.shape[0] != X.shape[0]:
        raise SolverError(f"the mask has {mask.shape[0]} rows, but the batch has {X.shape[0]} tokens")
    return X if bool(mask.all()) else X[mask]


def _add_upper(H: Tensor, X: Tensor) -> None:
    """H += Xᵀ X on and above the block diagonal; X is (tokens, n) float32."""
    n = H.shape[0]
    step = max(64, -(-n // _BLOCKS))
    for a in range(0, n, step):
        b = min(a + step, n)
        H[a:b, a:].addmm_(X[:, a:b].T, X[:, a:])
