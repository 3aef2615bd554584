"""The grid of a layer: one scale and one integer zero point per row and group, fitted before the rounding.

Minimizes Σ_i D_i (ŵ_i − w_i)² for every row and group independently, with ŵ = s (q − z) and
q = clamp(round(w / s) + z, 0, 2^bits − 1). The scale is rounded to float16 before its error is measured, so the stored
scale is the one that was chosen. D is diag(H) or ones; the rounding of the columns accounts for the rest of H.

The search (the integer-zero form of NeUQI, arXiv:2505.17595) tries every candidate zero point with a coarse list of
scales, then a fine list around the best one, then the least-squares scale of the codes found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-24  # the smallest float16 above zero
LARGEST_SCALE = 65504.0  # the largest finite float16

LEAST_SQUARES_STEPS = 2
TINY = 1e-37  # replaces zero in a division

# Weights that the torch search processes at a time: what a CPU's cache holds; on a GPU, enough to hide launch overhead.
_PIECE_ELEMENTS, _PIECE_ELEMENTS_ON_DEVICE = 1 << 19, 1 << 25


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of a weight (m, n); B candidate grids have a leading dimension.

    Attributes:
        scales: float16 (m, G) or (B, m, G).
        zeros: int16 (m, G) or (B, m, G).
        g_idx: int32 (n,), the group of every column.
    """

    scales: Tensor
    zeros: Tensor
    g_idx: Tensor


@dataclass(frozen=True)
class Candidates:
    """What the search tries.

    Attributes:
        coarse: float32, multiples of the scale that spans the weights.
        fine: float32, multiples of the best coarse scale.
        offsets: int32, zero points relative to the one that centers the weights on the grid.
    """

    coarse: Tensor
    fine: Tensor
    offsets: Tensor


# W (m, n) with groups of consecutive columns, D (n,), starts (G + 1,) on the CPU, candidates, bits, sym
# → scales and zeros, float32 (m, G).
Search = Callable[[Tensor, Tensor, Tensor, Candidates, int, bool], tuple[Tensor, Tensor]]


# Per bit width: the smallest multiple of the min-max scale, the number of multiples (symmetric, asymmetric), and how
# far zero points reach to both sides. The lengths are the cost: 100 to 200 measurements of a symmetric grid; for an
# asymmetric grid, one for each pair of scale and zero point.
_SEARCH = {2: (0.25, 40, 28, 2), 3: (0.25, 48, 28, 4), 4: (0.25, 64, 32, 8), 8: (0.35, 96, 28, 10)}
_FINE_STEPS = 9


def candidates(bits: int, sym: bool) -> Candidates:
    """Return what the search tries."""
    low, symmetric_count, asymmetric_count, reach = _SEARCH[bits]
    levels, half = 2**bits - 1, 2 ** (bits - 1)
    # Above `high` every weight lies inside the grid, and a larger scale only makes it coarser.
    high = 1.05 * (half / (half - 1) if sym else levels / (levels - 1))
    count = symmetric_count if sym else asymmetric_count
    ratio = (low / high) ** (1 / (count - 1))
    coarse = high * ratio ** torch.arange(count, dtype=torch.float32)
    fine = ratio ** (torch.arange(1 - _FINE_STEPS, _FINE_STEPS, dtype=torch.float32) / _FINE_STEPS)
    return Candidates(coarse, fine, torch.arange(-reach, reach + 1, dtype=torch.int32))


def search(
    W: Tensor, D: Tensor, starts: Tensor, candidates: Candidates, bits: int, sym: bool
) -> tuple[Tensor, Tensor]:
    """Find scales and zero points; group g has the columns ``starts[g] … starts[g + 1]``.

    Args:
        W: float32 (m, n).
        D: float32 (n,).
        starts: int64 (G + 1,), on the CPU.

    Returns:
        scales and zeros, float32 (m, G).
    """
    widths = starts.diff()
    m, G, width = W.shape[0], len(widths), int(widths.max())
    # Groups are padded to one width with columns of weight 0, which change neither range nor error.
    index = starts[:-1, None] + torch.arange(width)
    there = index < starts[1:, None]
    index, inside = index.mul_(there).to(W.device), there.to(W.device, W.dtype)
    D_groups = D[index] * inside
    scales = torch.empty(m, G, dtype=torch.float32, device=W.device)
    zeros = torch.empty_like(scales)
    piece = _PIECE_ELEMENTS if W.device.type == "cpu" else _PIECE_ELEMENTS_ON_DEVICE
    step = max(1, piece // (G * width))
    for a in range(0, m, step):
        W_groups = W[a : a + step][:, index] * inside
        scales[a : a + step], zeros[a : a + step] = _Search(W_groups, D_groups, candidates, bits, sym).run()
    return scales, zeros


class _Search:
    """The search for one piece: W (m, G, width), D (G, width); state is the best so far, (m, G)."""

    def __init__(self, W: Tensor, D: Tensor, candidates: Candidates, bits: int, sym: bool) -> None:
        self.W, self.D, self.candidates = W, D, candidates
        self.levels, self.sym = 2**bits - 1, sym
        self.zero = float(2 ** (bits - 1))
        self.low, self.high = W.amin(2).clamp(max=0), W.amax(2).clamp(min=0)
        self.error = torch.full_like(self.low, float("inf"))
        self.s, self.z = torch.ones_like(self.low), torch.full_like(self.low, self.zero)

    def run(self) -> tuple[Tensor, Tensor]:
        if self.sym:
            self.coarse_symmetric()
        else:
            self.coarse_asymmetric()
        s, z = self.s, self.z
        for factor in self.candidates.fine.tolist():
            for offset in (0,) if self.sym else (-1, 0, 1):
                self.attempt(s * factor, (z + offset).clamp(1, self.levels))
        for _ in range(LEAST_SQUARES_STEPS):
            self.attempt(self.least_squares(), self.z)
        empty = self.high == self.low
        return torch.where(empty, 1.0, self.s), torch.where(empty, self.zero, self.z)

    def coarse_symmetric(self) -> None:
        largest = torch.maximum(-self.low, self.high)
        self.attempt(largest * (2 / self.levels), self.z)  # the min-max grid: nothing worse is ever returned
        base = largest / self.zero
        for factor in self.candidates.coarse.tolist():
            self.attempt(base * factor, self.z)
            self.attempt(base * -factor, self.z)

    def coarse_asymmetric(self) -> None:
        base = (self.high - self.low) / self.levels
        self.attempt(base, torch.round(-self.low / base.clamp(min=TINY)).clamp(1, self.levels))
        for factor in self.candidates.coarse.tolist():
            s = base * factor
            middle = torch.round(self.levels / 2 - (self.high + self.low) / (2 * s).clamp(min=TINY))
            for offset in self.candidates.offsets.tolist():
                self.attempt(s, (middle + offset).clamp(1, self.levels))

    def attempt(self, s: Tensor, z: Tensor) -> None:
        """Keep (s, z) where it is better than the best so far."""
        s = storable(s)
        error = self.codes(s, z).mul_(s[..., None]).sub_(self.W).square_().mul_(self.D).sum(2)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.s, self.z = torch.where(better, s, self.s), torch.where(better, z, self.z)

    def codes(self, s: Tensor, z: Tensor) -> Tensor:
        """q − z, (m, G, width)."""
        q = torch.round(self.W * (1 / s)[..., None])
        return torch.clamp(q, -z[..., None], (self.levels - z)[..., None], out=q)

    def least_squares(self) -> Tensor:
        """The scale that is best for the codes of the best grid: Σ D w q / Σ D q²."""
        q = self.codes(self.s, self.z)
        Dq = q * self.D
        norm = (Dq * q).sum(2)
        s = (Dq * self.W).sum(2) / norm.clamp(min=TINY)
        usable = (norm > 0) & (s * self.s > 0)
        return torch.where(usable, s, self.s)


def storable(s: Tensor) -> Tensor:
    """s as float16 will hold it: not zero, finite, with its sign."""
    return s.abs().clamp(SMALLEST_SCALE, LARGEST_SCALE).copysign(s).half().float()


def fit_grid(W: Tensor, D: Tensor, g_idx: Tensor, bits: int, *, sym: bool, search: Search = search) -> Grid:
    """Fit scales and zero points.

    Symmetric: the zero point is 2^(bits−1) and scales of both signs are tried, because the sign decides
    which side has one level more. Asymmetric: scales are positive and zero points lie in 1 … 2^bits − 1,
    which every reader of the v1 format takes. A group of zeros gets scale 1.

    Args:
        W: float32 (m, n), finite.
        D: float32 (n,), not negative.
        g_idx: int (n,), the group of every column, 0 … G−1 with none empty.
        bits: 2, 3, 4 or 8.
        search: a backend's form of `search`.
    """
    groups = g_idx.cpu().long()  # group boundaries decide shapes: one synchronization instead of several
    columns, counts = torch.argsort(groups, stable=True), torch.bincount(groups)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    if not torch.equal(columns, torch.arange(len(columns))):
        columns = columns.to(W.device)
        W, D = W[:, columns], D[columns]
    scales, zeros = search(W, _with_idle_groups(D, counts), starts, candidates(bits, sym), bits, sym)
    return Grid(scales.half(), zeros.short(), g_idx.int())


def clamped_scales(scales: Tensor) -> Tensor:
    """Count the scales of each row that are the smallest or the largest float16: the best one may lie beyond."""
    size = scales.float().abs()
    return ((size <= SMALLEST_SCALE) | (size >= LARGEST_SCALE)).sum(dim=1)


def _with_idle_groups(D: Tensor, counts: Tensor) -> Tensor:
    """D (n,) with ones in groups where all of it is zero: weights of inputs that never were active count equally."""
    group = torch.repeat_interleave(torch.arange(len(counts)), counts).to(D.device)
    idle = D.new_zeros(len(counts)).index_add_(0, group, D) == 0
    return torch.where(idle[group], torch.ones_like(D), D)


def nearest(W: Tensor, grid: Grid, bits: int) -> Tensor:
    """Round W (m, n) to the nearest codes on the grid, uint8 (m, n)."""
    groups = grid.g_idx.long()
    s = grid.scales.float()[:, groups]
    z = grid.zeros.float()[:, groups]
    return torch.round(W / s).add_(z).clamp_(0, 2**bits - 1).to(torch.uint8)
