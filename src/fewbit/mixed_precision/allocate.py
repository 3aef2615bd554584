"""The choice itself: one option for each unit, least total cost, total size within a budget.

Contract: a pure function of numbers. This is the multiple-choice knapsack problem. On the lower convex
hulls of the options, taking steps in order of gain per byte is optimal for every budget that the steps
hit exactly (Sinha and Zoltners, 1979); what is left over is then filled by single changes and exchanges.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

# Exchanges are tried with up to so many units; with more, one step is too small to be worth the search.
_EXCHANGED = 256


@dataclass(frozen=True)
class Option:
    """What a unit may be: its size in bytes and its predicted cost."""

    size: int
    cost: float


def allocate(units: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """Choose an option for each unit.

    Args:
        units: each with at least one option.
        budget: largest sum of sizes; at least the sum of the smallest.

    Returns:
        For each unit the index of its option. Ties go to the smaller option, then to the earlier one.

    Raises:
        ValueError: not even the smallest options fit.
    """
    chosen, room = _along_hulls(units, budget)
    if room < 0:
        raise ValueError(f"the smallest options take {budget - room} bytes, {-room} more than the budget")
    _fill(units, chosen, room)
    return chosen


def hull(options: Sequence[Option]) -> list[int]:
    """Indices of the options on the lower convex hull of cost over size, from the smallest to the cheapest."""
    points: list[int] = []
    for index in sorted(range(len(options)), key=lambda i: (options[i].size, options[i].cost, i)):
        if points and options[index].cost >= options[points[-1]].cost:
            continue
        while len(points) > 1 and _gain(options, points[-2], index) >= _gain(options, points[-2], points[-1]):
            points.pop()
        points.append(index)
    return points


def _along_hulls(units: Sequence[Sequence[Option]], budget: int) -> tuple[list[int], int]:
    """Start from the smallest options and take every step along a hull that still fits, steepest first."""
    hulls = [hull(options) for options in units]
    chosen = [points[0] for points in hulls]
    room = budget - sum(options[index].size for options, index in zip(units, chosen, strict=True))
    # A hull's steps get flatter, so the next step of a unit is never taken before the one in front of it.
    steps = [_step(units, hulls, unit, 1) for unit, points in enumerate(hulls) if len(points) > 1]
    heapq.heapify(steps)
    while steps:
        _, unit, position = heapq.heappop(steps)
        options, points = units[unit], hulls[unit]
        more = options[points[position]].size - options[chosen[unit]].size
        if more > room:
            continue
        chosen[unit] = points[position]
        room -= more
        if position + 1 < len(points):
            heapq.heappush(steps, _step(units, hulls, unit, position + 1))
    return chosen, room


def _step(
    units: Sequence[Sequence[Option]], hulls: Sequence[Sequence[int]], unit: int, position: int
) -> tuple[float, int, int]:
    points = hulls[unit]
    return -_gain(units[unit], points[position - 1], points[position]), unit, position


def _gain(options: Sequence[Option], small: int, large: int) -> float:
    """Cost saved per byte added."""
    return (options[small].cost - options[large].cost) / (options[large].size - options[small].size)


def _fill(units: Sequence[Sequence[Option]], chosen: list[int], room: int) -> None:
    """Improve `chosen` in place: the best change of one unit, or of two together, again and again."""
    while True:
        changes = [
            _Change(unit, index, option.size - options[now].size, options[now].cost - option.cost)
            for unit, (options, now) in enumerate(zip(units, chosen, strict=True))
            for index, option in enumerate(options)
            if index != now
        ]
        best = _best_change(changes, room)
        if len(units) <= _EXCHANGED:
            best = max(best, _best_exchange(changes, room), key=lambda found: sum(c.saved for c in found))
        if not best:
            return
        for change in best:
            chosen[change.unit] = change.option
            room -= change.more


class _Change(NamedTuple):
    """Another option for a unit: bytes more, cost saved."""

    unit: int
    option: int
    more: int
    saved: float


def _best_change(changes: Sequence[_Change], room: int) -> list[_Change]:
    fitting = [change for change in changes if change.more <= room and change.saved > 0]
    return [max(fitting, key=lambda change: (change.saved, -change.more))] if fitting else []


def _best_exchange(changes: Sequence[_Change], room: int) -> list[_Change]:
    """The best pair of a change that takes more room than there is and one that makes room."""
    larger = [change for change in changes if change.more > room and change.saved > 0]
    smaller = [change for change in changes if change.more < 0]
    if not larger or not smaller:
        return []

    def table(key: str) -> tuple[Any, Any]:
        ours = np.array([getattr(change, key) for change in larger])
        theirs = np.array([getattr(change, key) for change in smaller])
        return ours[:, None], theirs[None, :]

    more, saved, units = table("more"), table("saved"), table("unit")
    saved_together = np.where((sum(more) <= room) & (units[0] != units[1]), sum(saved), 0.0)
    row, column = divmod(int(saved_together.argmax()), len(smaller))
    # A pair must save more than rounding errors, or two could be exchanged back and forth for ever.
    worth = saved_together[row, column] > 1e-9 * larger[row].saved
    return [larger[row], smaller[column]] if worth else []
