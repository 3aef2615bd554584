"""What the commands share on the screen: the console, the progress bar, sizes in words."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

# Results go to stdout; progress and notes to stderr, so that `--json` can be piped.
console = Console(stderr=True)
F = TypeVar("F", bound=Callable[..., Any])

INTERRUPTED = 130  # exit code after Ctrl-C


def plain(value: object) -> Text:
    """What a stranger wrote, for the screen: no markup, and control characters shown instead of obeyed."""
    text = str(value)
    return Text("".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text))


def quiet_libraries() -> None:
    """Keep the progress bars and advice of transformers off the screen, and fewbit's log: commands show notes."""
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("fewbit").setLevel(logging.ERROR)


def examples(*commands: str) -> Callable[[F], F]:
    """Decorator: add examples to the help of a command."""

    def decorate(command: F) -> F:
        command.__doc__ = "\n\n".join(
            [inspect.cleandoc(command.__doc__ or ""), "Examples:", *(f"  {line}" for line in commands)]
        )
        return command

    return decorate


@contextmanager
def progress_bar(title: str, *, hidden: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A live bar with the time left; gives the callback ``(phase, done, total)`` that moves it."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=hidden) as bar:
        task = bar.add_task(title, total=None)

        def update(phase: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, description=f"{title}: {phase}" if phase else title)

        yield update
