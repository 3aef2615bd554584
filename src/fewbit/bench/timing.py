"""Time measurements in turns.

On a shared machine the same work takes different times from one second to the next. Every round measures each candidate
once, so a slow period affects all of them. The minimum is the least disturbed run, the median the typical one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# Turns work into a function that does it and returns the seconds of one call.
Stopwatch = Callable[[Callable[[], object]], Callable[[], float]]


@dataclass(frozen=True)
class Times:
    """Seconds of one candidate, one entry per round."""

    seconds: tuple[float, ...]

    @property
    def minimum(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def in_turns(
    candidates: Mapping[str, Callable[[], float]], rounds: int, budget: float = float("inf")
) -> dict[str, Times]:
    """Measure each candidate once per round.

    Args:
        candidates: name → function that does the work once and returns its seconds; warm-up is its own task.
        rounds: number of rounds.
        budget: seconds after which no further round begins; there is always one round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + budget
    for done in range(rounds):
        if done and time.perf_counter() > end:
            break
        for name, measure in candidates.items():
            seconds[name].append(measure())
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def seconds_per_call(work: Callable[[], object], at_least: float = 0.004) -> Callable[[], float]:
    """A `Stopwatch` for the CPU: seconds of one call of `work`, averaged over at least `at_least` seconds.

    Calls `work` once to warm up and once more to choose the number of calls.
    """
    work()
    calls = max(1, round(at_least / max(_time(work, 1), 1e-7)))
    return lambda: _time(work, calls) / calls


def _time(work: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return time.perf_counter() - start
