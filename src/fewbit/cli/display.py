"""Output that the commands share: console, examples, progress bar, and the table of engines."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ..engines import engine
from ..progress import Bar, Lines, Progress, no_progress

# Results go to stdout; progress and notes to stderr, so that `--json` can be piped.
console = Console(stderr=True)
F = TypeVar("F", bound=Callable[..., Any])

NO = 1  # exit code if the answer is no
INTERRUPTED = 130  # exit code after Ctrl-C


def plain(value: object) -> Text:
    """Untrusted text for the screen: no markup, and control characters are shown, not executed."""
    text = str(value)
    return Text("".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text))


def quiet_libraries() -> None:
    """Turn off the progress bars and warnings of transformers, and fewbit's log, because commands show the notes."""
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
def progress_bar(title: str, *, hidden: bool = False) -> Iterator[Progress]:
    """Show a progress bar, or lines where there is no terminal; yields its callback ``(phase, done, total)``."""
    if hidden or not console.is_terminal:
        yield no_progress if hidden else Lines(title, partial(console.print, highlight=False, markup=False))
        return
    bar = Bar(title)
    try:
        yield bar
    finally:
        bar.close()


def engine_table(reasons: Mapping[str, Sequence[str]], asked: Collection[str] | None, verbose: bool) -> Table:
    """The engines in `asked`, or all, with the reasons why they cannot load a checkpoint: the first one, or all."""
    table = Table("engine", "loads it", Column("why not", overflow="fold"), box=None, padding=(0, 2, 0, 0))
    table.title, table.title_justify = "other engines", "left"
    for name, why in reasons.items():
        if not asked or name in asked:
            shown = why if verbose or asked else why[:1]
            table.add_row(engine(name).title, "no" if why else "yes", "\n".join(shown))
    return table
