"""The Hessian of a linear layer, H = X Xᵀ, and the input-error covariance, C = (X̃ − X) Xᵀ.

X are the layer's inputs in the quantized model, X̃ its inputs in the original model. Contract: sums over calibration
tokens, never averages. Tokens come in batches. The sum over batches is exact, so the same batches give the same bytes
in any order and on any rank. This file knows nothing about models, layers or weights.

H_ij is kept as an integer in units of 2⁻³⁰ s_i s_j, where s_i is the smallest power of two with H_ii ≤ s_i². As
|H_ij| ≤ √(H_ii H_jj), nothing overflows, and a unit is less than 2⁻²⁸ √(H_ii H_jj): finer than the rounding of a
float32 sum. It takes two passes over the tokens: the first, `observe_range`, finds Σ x_i².
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..errors import SolverError
from .gram import ONE, ROOT, add_rounded, pieces, scaled, sum_of_squares

# A token with a larger value is treated like one that is not finite: its squares, summed over any
# calibration set, could leave float32.
LARGEST_ACTIVATION = 2.0**50

# Float32: what is added to the exponent, and the bits below it.
_BIAS, _MANTISSA = 127, 23

# For the compiled module, batches smaller than `SMALL_BATCH` wait until `_JOINED_TOKENS` tokens have come: each call
# goes through the whole matrix.
SMALL_BATCH = 256
_JOINED_TOKENS = 4096

_FINISHED_ROWS = 64  # that are turned into float32 at a time
_FINISHED_ROWS_ON_GPU = 1024


class Hessian:
    """Accumulates H = Σ x xᵀ over tokens, and P = Σ x̃ xᵀ where the full-precision inputs are given.

    First `observe_range` every batch, then `add` every batch; for a single one `add` alone will do. A product inside a
    batch is a float32 sum, which is the same every time for one backend and thread count. Where others add further
    batches, all give `freeze_units` the `range_stats` of all, and sum what `sums` returns.

    Of H only the upper triangle is accumulated; `matrix` mirrors it.

    Args:
        n: input features of the layer.
        device: where H lives. Batches are moved there.
    """

    def __init__(self, n: int, *, device: torch.device | str = "cpu") -> None:
        self.n = n
        self.tokens = 0
        self.dropped = 0
        self._H = torch.zeros(n, n, dtype=torch.int32, device=device)  # float32 once finished
        self._P: Tensor | None = None  # C once finished
        self._squares: list[Tensor] = []
        self._announced = 0
        self._clean = True
        self._s: Tensor | None = None
        self._waiting: list[list[Tensor]] = []
        self._finished = False

    def observe_range(
        self, X: Tensor, mask: Tensor | None = None, full: Tensor | None = None, *, check_finite: bool = True
    ) -> None:
        """Announce tokens that will be added; `add` documents the other arguments.

        Args:
            check_finite: leave out tokens that are not finite. With False, ask `in_range` after the last batch: a GPU
                then synchronizes once instead of once a batch.

        Raises:
            SolverError: as in `add`; or the units are fixed already.
        """
        if self._s is not None:
            raise SolverError(
                "this Hessian has its units already: observe_range of all batches comes before the first add"
            )
        both = self._both(X, mask, full)
        squares = _squares(both)
        if check_finite and not _in_range(squares):
            self._clean = False
            both = [part[_good_rows(both)] for part in both]
            squares = _squares(both)
        self._announced += both[0].shape[0]
        self._squares.append(squares if full is not None else torch.cat([squares, torch.zeros_like(squares)]))

    @property
    def in_range(self) -> bool:
        """Whether every observed token is usable. If not: `reset`, and observe all again with `check_finite`."""
        return _in_range(self.range_stats)

    def reset(self) -> None:
        """Forget every announced batch."""
        self._squares.clear()
        self._announced = 0

    @property
    def range_stats(self) -> Tensor:
        """Σ x_i² and Σ x̃_i² of each announced batch, float32 (batches, 2n)."""
        return (
            torch.stack(self._squares)
            if self._squares
            else self._H.new_empty(0, 2 * self.n, dtype=torch.float32)
        )

    def freeze_units(self, squares: Tensor) -> None:
        """Fix the units of H and P.

        Args:
            squares: of all batches that all will add, in an order on which all agree, float32 (batches, 2n).
        """
        # Σ x² < 2^exponent.
        exponents = torch.frexp(squares.double().sum(0)).exponent
        # Made of its bits: a GPU's pow(2, k) need not be exact.
        self._s = (((exponents + 1) // 2 + _BIAS) << _MANTISSA).int().view(torch.float32)
        self._squares.clear()

    def add(self, X: Tensor, mask: Tensor | None = None, full: Tensor | None = None) -> None:
        """Add the tokens of one batch.

        Args:
            X: (tokens, n) or (..., n), float32, bfloat16 or float16. One row per token.
            mask: bool, one value per row of X, on any device; False rows (padding) do not count. On the CPU, a GPU
                need not be waited for.
            full: X̃ for the same tokens, shape and dtype of X; given for all batches or for none.

        Raises:
            SolverError: the last dimension of X is not n, the mask has another number of rows, `full` another
                shape; more tokens than were announced, or the matrix was taken already.
        """
        if self._s is None:
            if not self._squares:
                self.observe_range(X, mask, full)
            self.freeze_units(self.range_stats)
        both = self._both(X, mask, full)
        if not self._clean:
            good = _good_rows(both)
            self.dropped += int((~good).sum())
            both = [part[good] for part in both]
        self.tokens += both[0].shape[0]
        if self.tokens > self._announced or self._finished:
            raise SolverError(
                f"this Hessian was made for the {self._announced} tokens that it has: observe all batches first, and "
                "add them before the matrix is taken"
            )
        if full is not None and self._P is None:
            self._P = torch.zeros_like(self._H)
        self._waiting.append(both)
        if not self._joins(both) or sum(len(part[0]) for part in self._waiting) >= _JOINED_TOKENS:
            self._flush()

    def sums(self, full: bool) -> list[Tensor]:
        """H (its upper triangle) and, if `full`, P, as integers: to be summed in place over all who added batches.

        `tokens` and `dropped` are to be set to their sums, too.
        """
        self._flush()
        if full and self._P is None:
            self._P = torch.zeros_like(self._H)
        return [self._H, self._P] if full and self._P is not None else [self._H]

    @property
    def has_full(self) -> bool:
        """Whether full-precision inputs were given."""
        return self._P is not None

    def matrix(self) -> Tensor:
        """H, float32 (n, n), symmetric. The state itself: do not write to it."""
        self._finish()
        return self._H

    def input_error(self) -> Tensor | None:
        """C = (X̃ − X) Xᵀ, float32 (n, n), C_ij = Σ (x̃_i − x_i) x_j; None where no X̃ was given.

        The difference of two sums: both hold exact products, so what cancels is their rounding only.
        """
        self._finish()
        return self._P

    def include(self, H: Tensor, tokens: int, dropped: int) -> None:
        """Add the finished matrix of other tokens, float32 (n, n), whose X and X̃ are the same."""
        self.matrix().add_(H.to(self._H.device))
        self.tokens += tokens
        self.dropped += dropped

    def diagonal(self) -> Tensor:
        """diag(H), float32 (n,), a copy."""
        return self.matrix().diagonal().clone()

    def _both(self, X: Tensor, mask: Tensor | None, full: Tensor | None) -> list[Tensor]:
        """The rows of X that count and, if given, of X̃: a token is left out of both or of neither."""
        if X.shape[-1] != self.n:
            raise SolverError(f"this Hessian has {self.n} input features, but the batch has {X.shape[-1]}")
        if full is not None and full.shape != X.shape:
            raise SolverError(
                f"the full-precision inputs have shape {tuple(full.shape)}, but the batch has {tuple(X.shape)}"
            )
        streams = [X] if full is None else [X, full]
        both = [part.detach().reshape(-1, self.n).to(self._H.device) for part in streams]
        return both if mask is None else _masked(both, mask)

    def _is_native(self, both: list[Tensor]) -> bool:
        short = all(part.dtype == torch.bfloat16 for part in both)
        return short and both[0].device.type == "cpu" and "avx512_bf16" in native.instruction_sets()

    def _joins(self, both: list[Tensor]) -> bool:
        return len(both[0]) < SMALL_BATCH and self._is_native(both)

    def _flush(self) -> None:
        """Add the batches that wait."""
        batches = [both for both in self._waiting if len(both[0])]
        self._waiting.clear()
        if not batches or self._s is None:
            return
        if all(map(self._is_native, batches)):
            self._add_native(batches)
        else:
            for both in batches:
                self._add_torch(both)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """2¹⁵/s of x and of x̃: multiplied by it, all products sum to 2³⁰ at most."""
        assert self._s is not None
        return ROOT / self._s[: self.n], ROOT / self._s[self.n :]

    def _add_native(self, batches: list[list[Tensor]]) -> None:
        ends = torch.tensor([len(both[0]) for both in batches]).cumsum(0)
        X, *full = (
            torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
            for parts in zip(*batches, strict=True)
        )
        of_x, of_full = self._factors()
        native.gram_bf16(X, X, self._H, ends, of_x * ROOT, of_x / ROOT, upper=True)
        if full and self._P is not None:
            native.gram_bf16(full[0], X, self._P, ends, of_full * ROOT, of_x / ROOT, upper=False)

    def _add_torch(self, both: list[Tensor]) -> None:
        of_x, of_full = self._factors()
        for X, *full in zip(*(pieces(part) for part in both), strict=True):
            x = scaled(X, of_x)
            add_rounded(self._H, x, x, upper=True)
            if full and self._P is not None:
                add_rounded(self._P, scaled(full[0], of_full), x, upper=False)

    def _finish(self) -> None:
        """Turn the integers into float32, in place: H symmetric, and C = P − H instead of P."""
        if self._finished:
            return
        self._flush()
        self._finished = True
        H, P = self._H, self._P
        self._H = H.view(torch.float32)
        self._P = None if P is None else P.view(torch.float32)
        if self._s is None:  # nothing was added: zeros
            return
        _mirror(H)
        of_x, of_full = self._s[: self.n].double(), self._s[self.n :].double()
        step = _FINISHED_ROWS if H.device.type == "cpu" else _FINISHED_ROWS_ON_GPU
        for a in range(0, self.n, step):
            b = min(a + step, self.n)
            values = H[a:b] * (of_x[a:b, None] / ONE * of_x)
            if P is not None and self._P is not None:
                self._P[a:b] = P[a:b] * (of_full[a:b, None] / ONE * of_x) - values
            self._H[a:b] = values


def usable_rows(X: Tensor) -> Tensor:
    """Which rows of X (tokens, n) are finite and in range, bool (tokens,)."""
    return ((X.abs() <= LARGEST_ACTIVATION) & torch.isfinite(X)).all(dim=1)


def _good_rows(both: list[Tensor]) -> Tensor:
    """Which rows are usable in all streams."""
    return torch.stack([usable_rows(X) for X in both]).all(0)


def _in_range(squares: Tensor) -> bool:
    """Whether sums of squares leave no doubt that every row was usable. NaN compares false."""
    return bool((squares <= LARGEST_ACTIVATION**2).all())


def _squares(both: list[Tensor]) -> Tensor:
    """Σ x_i² over the rows of each stream, one after the other: float32 (n,) or (2n,)."""
    return torch.cat([sum_of_squares(part) for part in both])


def _masked(both: list[Tensor], mask: Tensor) -> list[Tensor]:
    mask = mask.reshape(-1).bool()
    if mask.shape[0] != both[0].shape[0]:
        raise SolverError(f"the mask has {mask.shape[0]} rows, but the batch has {both[0].shape[0]} tokens")
    if bool(mask.all()):
        return both
    rows = mask.nonzero()[:, 0].to(both[0].device, non_blocking=True)
    return [X.index_select(0, rows) for X in both]


def _mirror(H: Tensor) -> None:
    """Make H (n, n) symmetric, from its upper triangle."""
    n = H.shape[0]
    for a in range(0, n, 256):
        b = min(a + 256, n)
        H[b:, a:b] = H[a:b, b:].T
        square = H[a:b, a:b]
        H[a:b, a:b] = square.triu() + square.triu(1).T
