"""Progress for people: a bar in a terminal or a notebook, lines elsewhere."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm

from . import formatting

_LOG = logging.getLogger("fewbit")
_IN_NOTEBOOK = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)


# Called as progress(phase, done, total).
Progress = Callable[[str, int, int], None]


def no_progress(phase: str, done: int, total: int) -> None:
    """The progress callback of a run that shows none."""


def progress_of(progress: Progress | bool | None, title: str) -> Progress:
    """The callback that a caller asks for.

    Args:
        progress: a callback; True for a bar in a terminal or a notebook, and lines in the log (level INFO) elsewhere;
            False or None for nothing.
        title: what is in progress.
    """
    if not progress:
        return no_progress
    if progress is not True:
        return progress
    return Bar(title) if _IN_NOTEBOOK or sys.stderr.isatty() else Lines(title, _LOG.info)


class Bar:
    """One bar of tqdm for each phase."""

    def __init__(self, title: str) -> None:
        self._title, self._phase = title, ""
        self._bar: Any = None

    def __call__(self, phase: str, done: int, total: int) -> None:
        if self._bar is None or phase != self._phase:
            self.close()
            self._phase = phase
            form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"
            name = name_of(self._title, phase)
            self._bar = tqdm(total=total, initial=done, desc=name, bar_format=form, **_size())
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None


def _size() -> dict[str, int]:
    """Size of the terminal for tqdm, which shows nothing in one that states none."""
    return {} if _IN_NOTEBOOK else {"ncols": shutil.get_terminal_size().columns, "nrows": 20}


class Lines:
    """A line at the start of a phase, at its end, and every `SECONDS` between.

    Args:
        title: what is in progress.
        write: takes a line.
    """

    SECONDS = 15.0

    def __init__(self, title: str, write: Callable[[str], object]) -> None:
        self._title, self._write, self._phase = title, write, ""
        self._started = self._last = time.monotonic()
        self._first = 0

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        begins = phase != self._phase
        if begins:
            self._phase, self._started, self._first = phase, now, done
        if not begins and done < total and now - self._last < self.SECONDS:
            return
        self._last, elapsed = now, now - self._started
        line = f"{name_of(self._title, phase)} {formatting.percent(done / max(total, 1))}"
        if elapsed >= 1:
            line += f" after {formatting.duration(elapsed)}"
        if self._first < done < total and elapsed >= 1:
            left = elapsed * (total - done) / (done - self._first)
            line += f", {formatting.duration(left)} left"
        self._write(line)


def name_of(title: str, phase: str) -> str:
    """The name of a phase, with what it is a phase of."""
    return f"{title}: {phase}" if phase not in ("", title) else title
