"""Rows of a weight, each rounded on the grid that ends with its lowest loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .gptq import Factor, RoundBlock, round_columns
from .grid import Grid, storable

# Multiples of the fitted scales. They are tried for rows that lose more than CLIPPED times what rounding alone would.
WIDER_GRIDS = (1.15, 1.3)
CLIPPED = 1.25

# Weights on all candidate grids that are rounded at a time, in whole multiples of 32 rows: a matrix product gives a row
# the same bytes beside any number of others from there on (as in `distributed`).
CANDIDATE_ELEMENTS = 1 << 25
ROW_MULTIPLE = 32


class Rounded(NamedTuple):
    """Rows that are rounded.

    Attributes:
        codes: uint8 (m, n).
        scales: float16 (m, groups).
        losses: float64 (m,), tr(E H Eᵀ) of every row.
    """

    codes: Tensor
    scales: Tensor
    losses: Tensor


def round_rows(T: Tensor, grid: Grid, factor: Factor, bits: int, round_block: RoundBlock) -> Rounded:
    """Round T (m, n) on the fitted grid, and rows with clipped weights on wider ones too."""
    # Rows are independent: slices of them bound the memory of the candidates.
    step = max(1, CANDIDATE_ELEMENTS // len(WIDER_GRIDS) // T.shape[1] // ROW_MULTIPLE) * ROW_MULTIPLE
    parts = []
    for a in range(0, len(T), step):
        targets, fitted = T[a : a + step], rows_of(grid, slice(a, a + step))
        grids = _multiples(fitted, (1.0,))
        part = _best(grids, *round_columns(targets, factor, grids, bits, round_block))
        rows = _clipped_rows(part, fitted, factor, bits)
        if len(rows):
            grids = _multiples(rows_of(fitted, rows), WIDER_GRIDS)
            wider = _best(grids, *round_columns(targets[rows], factor, grids, bits, round_block))
            better = wider.losses < part.losses[rows]
            for old, new in zip(part, wider, strict=True):
                old[rows[better]] = new[better]
        parts.append(part)
    return Rounded(*(torch.cat(part) for part in zip(*parts, strict=True)))


def rows_of(grid: Grid, rows: Tensor | slice) -> Grid:
    """The grid of some rows."""
    return Grid(grid.scales[rows], grid.zeros[rows], grid.g_idx)


def to_row_multiple(rows: Tensor) -> Tensor:
    """Repeat row numbers up to a whole multiple, so that a part of the layer gives the bytes of the whole."""
    count = -(-len(rows) // ROW_MULTIPLE) * ROW_MULTIPLE
    return rows[torch.arange(count, device=rows.device) % max(len(rows), 1)]


def _multiples(grid: Grid, multipliers: Sequence[float]) -> Grid:
    """B multiples of the fitted scales, (B, m, groups)."""
    scales = torch.stack([storable(grid.scales.float() * by).half() for by in multipliers])
    return Grid(scales, grid.zeros.expand(scales.shape), grid.g_idx)


def _best(grids: Grid, codes: Tensor, losses: Tensor) -> Rounded:
    """Of every row, the grid with the lowest loss; codes (B, m, n), losses (B, m)."""
    best, row = losses.argmin(0), torch.arange(losses.shape[1], device=codes.device)
    return Rounded(codes[best, row], grids.scales[best, row], losses[best, row])


def _clipped_rows(rounded: Rounded, grid: Grid, factor: Factor, bits: int) -> Tensor:
    """Rows with clipped weights, int64: they lose more than rounding explains. Empty at 8 bits.

    The grid that fits the weights best clips the largest ones. While columns are rounded, each target also absorbs the
    errors of earlier columns, which a clipped weight cannot. So with strongly correlated inputs a wider and coarser
    grid ends with the lower loss.
    """
    limit = math.inf if bits == 8 else CLIPPED
    clipped = (rounded.losses > limit * _rounding_loss(grid, factor)).nonzero()[:, 0]
    return to_row_multiple(clipped)


def _rounding_loss(grid: Grid, factor: Factor) -> Tensor:
    """The loss of every row if no weight were clipped: Σ_i (d_i − λ) s_i² / 12. float64 (m,)."""
    d = torch.zeros(grid.scales.shape[1], dtype=torch.float64, device=factor.d.device)
    d.index_add_(0, grid.g_idx[factor.perm].long(), factor.d.double() - factor.added)
    return grid.scales.double().square() @ d / 12
