"""Choose one option for each group of layers: least total cost, total size within a budget.

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

# Exchanges are tried with up to this many groups; with more, one step is too small to be worth the search.
_EXCHANGED = 256


@dataclass(frozen=True)
class Option:
    """One choice for a group: its size in bytes and its predicted cost."""

    size: int
    cost: float


def allocate(groups: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """Choose an option for each group.

    Args:
        groups: options of each group, at least one.
        budget: largest sum of sizes in bytes; at least the sum of the smallest options.

    Returns:
        Index of the chosen option of each group. Ties go to the smaller option, then to the earlier one.

    Raises:
        ValueError: not even the smallest options fit.
    """
    chosen, free = _along_hulls(groups, budget)
    if free < 0:
        raise ValueError(f"the smallest options take {budget - free} bytes, {-free} more than the budget")
    _fill(groups, chosen, free)
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


def _along_hulls(groups: Sequence[Sequence[Option]], budget: int) -> tuple[list[int], int]:
    """Start from the smallest options and take every step along a hull that still fits, steepest first."""
    hulls = [hull(options) for options in groups]
    chosen = [points[0] for points in hulls]
    free = budget - sum(options[index].size for options, index in zip(groups, chosen, strict=True))
    # A hull's steps get flatter, so the next step of a group is never taken before the one in front of it.
    steps = [_step(groups, hulls, group, 1) for group, points in enumerate(hulls) if len(points) > 1]
    heapq.heapify(steps)
    while steps:
        _, group, position = heapq.heappop(steps)
        options, points = groups[group], hulls[group]
        more = options[points[position]].size - options[chosen[group]].size
        if more > free:
            continue
        chosen[group] = points[position]
        free -= more
        if position + 1 < len(points):
            heapq.heappush(steps, _step(groups, hulls, group, position + 1))
    return chosen, free


def _step(
    groups: Sequence[Sequence[Option]], hulls: Sequence[Sequence[int]], group: int, position: int
) -> tuple[float, int, int]:
    points = hulls[group]
    return -_gain(groups[group], points[position - 1], points[position]), group, position


def _gain(options: Sequence[Option], small: int, large: int) -> float:
    """Cost saved per byte added."""
    return (options[small].cost - options[large].cost) / (options[large].size - options[small].size)


def _fill(groups: Sequence[Sequence[Option]], chosen: list[int], free: int) -> None:
    """Improve `chosen` in place, as long as a change of one group or of two helps."""
    while True:
        changes = [
            _Change(group, index, option.size - options[now].size, options[now].cost - option.cost)
            for group, (options, now) in enumerate(zip(groups, chosen, strict=True))
            for index, option in enumerate(options)
            if index != now
        ]
        best = _best_change(changes, free)
        if len(groups) <= _EXCHANGED:
            best = max(best, _best_exchange(changes, free), key=lambda found: sum(c.saved for c in found))
        if not best:
            return
        for change in best:
            chosen[change.group] = change.option
            free -= change.more


class _Change(NamedTuple):
    """Another option for a group: bytes more, cost saved."""

    group: int
    option: int
    more: int
    saved: float


def _best_change(changes: Sequence[_Change], free: int) -> list[_Change]:
    fitting = [change for change in changes if change.more <= free and change.saved > 0]
    return [max(fitting, key=lambda change: (change.saved, -change.more))] if fitting else []


def _best_exchange(changes: Sequence[_Change], free: int) -> list[_Change]:
    """The best pair of a change that does not fit and one that frees bytes."""
    larger = [change for change in changes if change.more > free and change.saved > 0]
    smaller = [change for change in changes if change.more < 0]
    if not larger or not smaller:
        return []

    def table(key: str) -> tuple[Any, Any]:
        ours = np.array([getattr(change, key) for change in larger])
        theirs = np.array([getattr(change, key) for change in smaller])
        return ours[:, None], theirs[None, :]

    more, saved, groups = table("more"), table("saved"), table("group")
    saved_by_both = np.where((sum(more) <= free) & (groups[0] != groups[1]), sum(saved), 0.0)
    row, column = divmod(int(saved_by_both.argmax()), len(smaller))
    # A pair must save more than rounding errors, or two could be exchanged back and forth forever.
    worth = saved_by_both[row, column] > 1e-9 * larger[row].saved
    return [larger[row], smaller[column]] if worth else []
