"""The heat map of the report's page: a grid of kinds of layer × blocks, colored by error.

The template draws it as SVG. This module computes positions, colors and texts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import formatting
from .layer_stats import ERRORS, Location, Record, error_measure, location_of_skipped, mean, setting

SHADES = 10
_ROW, _TOP = 22, 6  # pixels: height of a row, space above the first
_WIDTH, _CHARACTER, _MEAN = 1050, 6.6, 60  # pixels: the map, a character of a label, the column of means
_LOGARITHMIC = 10  # ratio of the largest to the smallest error from which the scale is logarithmic


@dataclass(frozen=True)
class Cell:
    """One cell of the map.

    Attributes:
        x: left edge in pixels.
        y: top edge in pixels.
        style: CSS class: "h0" to "h9" by error, "unknown" without an error, "gap" for a layer that was not quantized.
        text: the error; "" where the cell is too narrow.
        hint: text of the tooltip.
        fallback: True if a layer needed a fallback.
    """

    x: float
    y: float
    style: str
    text: str
    hint: str
    fallback: bool


@dataclass(frozen=True)
class HeatMap:
    """The map of one stack of blocks.

    Attributes:
        stack: name of the stack.
        width: width in pixels.
        height: height in pixels.
        left: left edge of the cells in pixels.
        cell_width: width of a cell in pixels.
        rows: (y, kind, mean error) of each row.
        blocks: (x, block number) of each label of the axis.
        cells: all cells.
    """

    stack: str
    width: float
    height: float
    left: float
    cell_width: float
    rows: list[tuple[float, str, str]]
    blocks: list[tuple[float, str]]
    cells: list[Cell]


@dataclass(frozen=True)
class Scale:
    """Errors → shades; logarithmic where the errors differ by more than a factor of ten."""

    low: float
    high: float

    @property
    def logarithmic(self) -> bool:
        return self.low > 0 and self.high / self.low > _LOGARITHMIC

    def style(self, error: float | None) -> str:
        """CSS class of an error."""
        if error is None:
            return "unknown"
        low, high, value = self.low, self.high, error
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(value)
        part = (value - low) / (high - low) if high > low else 0.5
        return f"h{min(int(SHADES * part), SHADES - 1)}"

    def ticks(self) -> list[str]:
        """The errors at the left end, the middle and the right end of the scale."""
        middle = math.sqrt(self.low * self.high) if self.logarithmic else (self.low + self.high) / 2
        return [formatting.percent(value) for value in (self.low, middle, self.high)]


def heat_maps(
    layers: Sequence[Record], skipped: Iterable[Mapping[str, Any]], found: Sequence[Location]
) -> tuple[list[HeatMap], Scale | None]:
    """One map per stack of blocks, and their common scale; None if no error is known."""
    groups: dict[Location, list[Record]] = {}
    for layer, location in zip(layers, found, strict=True):
        groups.setdefault(location, []).append(layer)
    gaps = {}
    for item in skipped:
        gap = location_of_skipped(item["name"], found)
        if gap is not None and gap not in groups:
            gaps[gap] = f"{item['name']}: {item['reason']}"
    measure = error_measure(layers)
    errors = [mean(layer[measure] for layer in group) for group in groups.values()]
    known = [error for error in errors if error is not None]
    scale = Scale(min(known), max(known)) if known else None
    stacks = dict.fromkeys(
        location.stack for location in groups if location.stack or location.block is not None
    )
    return [_heat_map(stack, groups, gaps, scale or Scale(0, 0)) for stack in stacks], scale


def _heat_map(
    stack: str, groups: Mapping[Location, Sequence[Record]], gaps: Mapping[Location, str], scale: Scale
) -> HeatMap:
    inside = [
        location for location in (*groups, *gaps) if location.stack == stack and location.block is not None
    ]
    kinds = {kind: row for row, kind in enumerate(dict.fromkeys(location.kind for location in inside))}
    blocks = {
        block: column for column, block in enumerate(sorted({location.block or 0 for location in inside}))
    }
    left = _CHARACTER * max(map(len, kinds)) + 12
    cell_width = min(max((_WIDTH - left - _MEAN) / len(blocks), 9), 64)
    measure = error_measure([layer for group in groups.values() for layer in group])

    def corner(location: Location) -> tuple[float, float]:
        return left + cell_width * blocks[location.block or 0], _TOP + _ROW * kinds[location.kind]

    cells = []
    for location in inside:
        if location in gaps:
            cells.append(Cell(*corner(location), "gap", "", gaps[location], fallback=False))
            continue
        group = groups[location]
        error = mean(layer[measure] for layer in group)
        text = formatting.percent(error) if cell_width >= 46 else ""
        fallback = any(layer["fallbacks"] for layer in group)
        cells.append(Cell(*corner(location), scale.style(error), text, _hint(group, measure), fallback))
    every = math.ceil(len(blocks) / 20)
    return HeatMap(
        stack=stack,
        width=left + cell_width * len(blocks) + _MEAN,
        height=_TOP + _ROW * len(kinds) + 20,
        left=left,
        cell_width=cell_width,
        rows=[
            (_TOP + _ROW * row, kind or "(the block itself)", _mean_error(groups, stack, kind, measure))
            for kind, row in kinds.items()
        ],
        blocks=[
            (left + cell_width * (column + 0.5), str(block))
            for block, column in blocks.items()
            if column % every == 0
        ],
        cells=cells,
    )


def _mean_error(groups: Mapping[Location, Sequence[Record]], stack: str, kind: str, measure: str) -> str:
    rows = [group for location, group in groups.items() if (location.stack, location.kind) == (stack, kind)]
    return formatting.percent(mean(layer[measure] for group in rows for layer in group))


def _hint(group: Sequence[Record], measure: str) -> str:
    """Name and figures of a layer, or of several that share a cell."""
    percent = formatting.percent
    needed = dict.fromkeys(name for layer in group for name in layer["fallbacks"])
    fallbacks = f"\nfallbacks: {', '.join(needed)}" if needed else ""
    first = group[0]
    if len(group) > 1:
        error = percent(mean(layer[measure] for layer in group))
        return f"{len(group)} layers, {first['name']} …\nmean {ERRORS[measure][0]} {error}{fallbacks}"
    errors = f"true error {percent(first['true_error'])}, own error {percent(first['output_error'])}"
    return f"{first['name']}\n{setting(first)}; {errors}{fallbacks}"
