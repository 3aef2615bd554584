"""What `plan` and `inspect` say about other engines: which load it, and why the others do not."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from ..engines.table import READERS, reader

if TYPE_CHECKING:  # transformers takes seconds to import: not for --help
    from ..engines.rules import Contents

NO = 1  # exit code where the answer is no

_NAMES = [entry.name for entry in READERS]


def _known(names: list[str] | None) -> list[str] | None:
    for name in names or ():
        if name not in _NAMES:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(_NAMES)}")
    return names


ForReaders = Annotated[
    list[str] | None,
    typer.Option(
        "--for", metavar="ENGINE", callback=_known, help=f"Can it load this? {', '.join(_NAMES)}. Repeatable."
    ),
]


def verdicts(contents: Contents) -> dict[str, list[str]]:
    """Reader → why it cannot load it; empty where nothing is known against it."""
    from ..engines.rules import why_not

    return {entry.name: why_not(entry, contents) for entry in READERS}


def verdict_table(
    answers: Mapping[str, Sequence[str]], asked: Collection[str] | None, verbose: bool
) -> Table:
    """The readers that were asked for (all, if none was) with their reasons: the first of each, or all."""
    table = Table("engine", "loads it", Column("why not", overflow="fold"), box=None, padding=(0, 2, 0, 0))
    table.title, table.title_justify = "other engines", "left"
    for name, reasons in answers.items():
        if asked and name not in asked:
            continue
        shown = reasons if verbose or asked else reasons[:1]
        table.add_row(reader(name).title, "no" if reasons else "yes", "\n".join(shown))
    return table
