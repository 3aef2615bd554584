"""The grid of a layer: one scale and one integer zero point per row and group, fitted before the sweep.

Contract: minimises Σ_i D_i (ŵ_i − w_i)² for every row and group on its own, with ŵ = s (q − z),
q = clamp(round(w / s) + z, 0, 2^bits − 1). The scale is rounded to float16 before its error is measured,
so what is chosen is what is stored. D is diag(H) or ones; the off-diagonal of H is the sweep's business.

The search (the integer-zero form of NeUQI, arXiv:2505.17595): every candidate zero point with a coarse
list of scales, then a fine list around the best one, then the least-squares scale of the codes found.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import native
from ..native import Backend
from .backends import path_for
from .batching import stacked

SMALLEST_SCALE = 2.0**-14  # the smallest normal float16: below it a scale would lose precision, or be zero
LARGEST_SCALE = 65504.0  # the largest finite float16

LEAST_SQUARES_STEPS = 2
TINY = 1e-37  # instead of zero, in a division

# The torch path works on this many weights at a time: on the CPU as many as its cache holds, elsewhere so many
# that starting an operation costs nothing beside it.
_PIECE_ELEMENTS, _PIECE_ELEMENTS_ON_DEVICE = 1 << 19, 1 << 25


@dataclass(frozen=True)
class Grid:
    """Scales float16 (m, G), zeros int16 (m, G), and g_idx int32 (n,), the group of every column."""

    scales: Tensor
    zeros: Tensor
    g_idx: Tensor


@dataclass(frozen=True)
class Candidates:
    """What is tried: multiples of a base scale, multiples of the best of them, and zero points.

    Zero points are relative to the one that centres the range of the weights on the grid.
    """

    coarse: Tensor
    fine: Tensor
    offsets: Tensor


def fit_grid(W: Tensor, D: Tensor, g_idx: Tensor, bits: int, *, sym: bool, backend: Backend = "auto") -> Grid:
    """Fit scales and zero points.

    Symmetric: the zero point is 2^(bits−1) and scales of both signs are tried, because the sign decides
    which side has one level more. Asymmetric: scales are positive and zero points lie in 1 … 2^bits − 1,
    which every reader of the v1 format takes.

    Args:
        W: float32 (m, n), finite. D: float32 (n,), not negative.
        g_idx: int (n,), the group of every column, 0 … G−1 with none empty.
        bits: 2, 3, 4 or 8.

    Returns:
        The grid. A group of zeros gets scale 1.
    """
    [grid] = fit_grids(W[None], D[None], g_idx[None], bits, sym=sym, backend=backend)
    return grid


def fit_grids(
    W: Tensor, D: Tensor, g_idx: Tensor, bits: int, *, sym: bool, backend: Backend = "auto"
) -> list[Grid]:
    """As `fit_grid` for each of a batch: W (B, m, n), D (B, n), g_idx (B, n), in all of which groups have one size.

    With Triton it is one search.
    """
    # Where groups begin decides the shapes below: one look at it from the CPU, instead of several.
    groups = g_idx.cpu().long()
    columns, counts = torch.argsort(groups, stable=True), torch.bincount(groups[0])
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    if not bool((columns == torch.arange(columns.shape[1])).all()):
        columns = columns.to(W.device)
        W, D = W.gather(2, columns[:, None].expand_as(W)), D.gather(1, columns)
    tried = candidates(bits, sym)
    path = path_for(backend, W)
    search = SEARCHES[path]
    D = _with_idle_groups(D, counts)
    if path == "triton":
        scales, zeros = search(W, D, starts, tried, bits, sym)
    else:
        found = [search(w, d, starts, tried, bits, sym) for w, d in zip(W, D, strict=True)]
        scales, zeros = map(stacked, zip(*found, strict=True))
    return [Grid(*grid) for grid in zip(scales.half(), zeros.short(), g_idx.int(), strict=True)]


def _with_idle_groups(D: Tensor, counts: Tensor) -> Tensor:
    """D (B, n) with ones in groups without any weight in it (inputs that never were active): there all matter alike."""
    group = torch.repeat_interleave(torch.arange(len(counts)), counts).to(D.device)
    idle = D.new_zeros(len(D), len(counts)).index_add_(1, group, D) == 0
    return torch.where(idle[:, group], torch.ones_like(D), D)


def nearest(W: Tensor, grid: Grid, bits: int) -> Tensor:
    """Round-to-nearest codes of W on the grid: uint8 (m, n)."""
    groups = grid.g_idx.long()
    s = grid.scales.float()[:, groups]
    z = grid.zeros.float()[:, groups]
    return torch.round(W / s).add_(z).clamp_(0, 2**bits - 1).to(torch.uint8)


# Per bit width: the smallest multiple of the min-max scale that is tried, how many multiples there are
# (symmetric, asymmetric), and how far zero points reach to both sides. The lengths are the cost: 100 to
# 200 measurements of a symmetric grid, and of an asymmetric one as many as there are pairs.
_SEARCH = {2: (0.25, 40, 28, 2), 3: (0.25, 48, 28, 4), 4: (0.25, 64, 32, 8), 8: (0.35, 96, 28, 10)}
_FINE_STEPS = 9


def candidates(bits: int, sym: bool) -> Candidates:
    """What `fit_grid` tries."""
    low, symmetric_count, asymmetric_count, reach = _SEARCH[bits]
    levels, half = 2**bits - 1, 2 ** (bits - 1)
    # Above `high` every weight lies inside the grid, and a larger scale only makes it coarser.
    high = 1.05 * (half / (half - 1) if sym else levels / (levels - 1))
    count = symmetric_count if sym else asymmetric_count
    ratio = (low / high) ** (1 / (count - 1))
    coarse = high * ratio ** torch.arange(count, dtype=torch.float32)
    fine = ratio ** (torch.arange(1 - _FINE_STEPS, _FINE_STEPS, dtype=torch.float32) / _FINE_STEPS)
    return Candidates(coarse, fine, torch.arange(-reach, reach + 1, dtype=torch.int32))


def _fit_torch(
    W: Tensor, D: Tensor, starts: Tensor, tried: Candidates, bits: int, sym: bool
) -> tuple[Tensor, Tensor]:
    """The search in torch: float32 scales and zeros (m, G). `starts` are on the CPU."""
    starts = starts.long()
    widths = starts.diff()
    m, G, width = W.shape[0], len(widths), int(widths.max())
    # Groups padded to one width with columns of weight 0, which change neither range nor error.
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
        search = _Search(W_groups, D_groups, tried, bits, sym)
        scales[a : a + step], zeros[a : a + step] = search.run()
    return scales, zeros


def _fit_native(
    W: Tensor, D: Tensor, starts: Tensor, tried: Candidates, bits: int, sym: bool
) -> tuple[Tensor, Tensor]:
    lists = tried.coarse, tried.fine, tried.offsets
    return native.fit_grid(W.contiguous(), D.contiguous(), starts.int(), *lists, bits, sym)


def _fit_triton(
    W: Tensor, D: Tensor, starts: Tensor, tried: Candidates, bits: int, sym: bool
) -> tuple[Tensor, Tensor]:
    from . import triton_backend as triton

    widest = int(starts.diff().max())
    starts, coarse, fine, offsets = (
        values.to(W.device).contiguous() for values in (starts.int(), tried.coarse, tried.fine, tried.offsets)
    )
    return triton.fit_grid(W.contiguous(), D.contiguous(), starts, coarse, fine, offsets, widest, bits, sym)


SEARCHES = {"native": _fit_native, "triton": _fit_triton, "torch": _fit_torch}


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
    """s as float16 will hold it: normal, finite, with its sign."""
    return s.abs().clamp(SMALLEST_SCALE, LARGEST_SCALE).copysign(s).half().float()
