"""The Hessian of a linear layer, H = X Xᵀ, and the drift of its inputs, C = (X̃ − X) Xᵀ.

X are the inputs that the layer gets in the quantized model, X̃ those it gets in the original one. Contract:
sums over calibration tokens, never averages, in float32; tokens are added in any number of batches and the
sums do not depend on anything else. Knows nothing of models, layers or weights.
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
    """Accumulates H = Σ x xᵀ over tokens, and P = Σ x̃ xᵀ where the full-precision inputs are given.

    Of H only the upper triangle is accumulated; `matrix` mirrors it. The same batches in the same order
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
        self._P: Tensor | None = None  # C once the drift was asked for
        self._has_drift = False

    def add(self, X: Tensor, mask: Tensor | None = None, full: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            X: (tokens, n) or (..., n), float32, bfloat16 or float16. One row per token.
            mask: bool, one value per row of X; False rows (padding) do not count.
            full: X̃ for the same tokens, shape and dtype of X; given for all batches or for none.

        Raises:
            SolverError: the last dimension of X is not n, the mask has another number of rows, `full` another
                shape, or the drift was taken already.
        """
        if X.shape[-1] != self.n:
            raise SolverError(f"this Hessian has {self.n} input features, but the batch has {X.shape[-1]}")
        if full is not None and full.shape != X.shape:
            raise SolverError(
                f"the full-precision inputs have shape {tuple(full.shape)}, but the batch has {tuple(X.shape)}"
            )
        if self._has_drift:
            raise SolverError("the drift of this Hessian was taken already: make a new one to add tokens")
        X = X.detach().reshape(-1, self.n).to(self._H.device)
        # Both streams side by side, so that a token is left out of both or of neither.
        both = [X] if full is None else [X, full.detach().reshape(-1, self.n).to(self._H.device)]
        if mask is not None:
            both = _masked(both, mask)
        both = self._without_bad_rows(both)
        if both[0].shape[0] == 0:
            return
        self.tokens += both[0].shape[0]
        self._accumulate(both[0], both[0], self._H, upper=True)
        if full is not None:
            if self._P is None:
                self._P = torch.zeros_like(self._H)
            self._accumulate(both[1], both[0], self._P, upper=False)

    def _accumulate(self, A: Tensor, B: Tensor, C: Tensor, *, upper: bool) -> None:
        """C += Aᵀ B, or at least its upper triangle."""
        if A.dtype == B.dtype == torch.bfloat16 and native.use(self._backend, A, needs="avx512_bf16"):
            A = A.contiguous()
            native.product_bf16(A, A if upper else B.contiguous(), C, upper=upper)
            return
        step = max(1, _PIECE_BYTES // (4 * self.n))
        for a in range(0, A.shape[0], step):
            _add_product(C, A[a : a + step].float(), B[a : a + step].float(), upper=upper)

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

    def sums(self, full: bool) -> list[Tensor]:
        """H (its upper triangle) and, if `full`, P: to be summed, in place, over all who added some of the tokens.

        `tokens` and `dropped` are to be set to their sums, too.
        """
        if full and self._P is None:
            self._P = torch.zeros_like(self._H)
        return [self._H, self._P] if full and self._P is not None else [self._H]

    @property
    def has_full(self) -> bool:
        """Whether full-precision inputs were given."""
        return self._P is not None

    def drift(self) -> Tensor | None:
        """C = (X̃ − X) Xᵀ, float32 (n, n), C_ij = Σ (x̃_i − x_i) x_j; None where no X̃ was given.

        The difference of two sums: both hold exact products, so what cancels is their rounding only. Takes the
        place of P, so no token can be added afterwards.
        """
        if self._P is not None and not self._has_drift:
            self._P.sub_(self.matrix())
            self._has_drift = True
        return self._P

    def diagonal(self) -> Tensor:
        """diag(H), float32 (n,), a copy."""
        return self._H.diagonal().clone()

    def _without_bad_rows(self, both: list[Tensor]) -> list[Tensor]:
        """Without the rows that are not finite in one of them. One reduction each in the normal case."""
        if both[0].numel() == 0 or all(_in_range(torch.stack(torch.aminmax(X))) for X in both):
            return both
        good = torch.stack([usable_rows(X) for X in both]).all(0)
        self.dropped += int((~good).sum())
        return [X[good] for X in both]


def usable_rows(X: Tensor) -> Tensor:
    """Which rows of X (tokens, n) are finite and in range, bool (tokens,)."""
    return ((X.abs() <= LARGEST_ACTIVATION) & torch.isfinite(X)).all(dim=1)


def _in_range(extremes: Tensor) -> bool:
    # NaN compares false, so it is out of range too.
    return bool((extremes.float().abs() <= LARGEST_ACTIVATION).all())


def _masked(both: list[Tensor], mask: Tensor) -> list[Tensor]:
    mask = mask.reshape(-1).to(device=both[0].device, dtype=torch.bool)
    if mask.shape[0] != both[0].shape[0]:
        raise SolverError(f"the mask has {mask.shape[0]} rows, but the batch has {both[0].shape[0]} tokens")
    return both if bool(mask.all()) else [X[mask] for X in both]


def _add_product(C: Tensor, A: Tensor, B: Tensor, *, upper: bool) -> None:
    """C += Aᵀ B, or no more than is needed of its upper triangle; A, B are (tokens, n) float32."""
    n = C.shape[0]
    if not upper:
        C.addmm_(A.T, B)
        return
    step = max(64, -(-n // _BLOCKS))
    for a in range(0, n, step):
        b = min(a + step, n)
        C[a:b, a:].addmm_(A[:, a:b].T, B[:, a:])
