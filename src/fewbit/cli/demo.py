"""``fewbit demo``: the whole job, offline, on the small model that ships inside the package."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .. import formatting
from .display import console, examples, progress_bar, quiet_libraries


@examples(
    "fewbit demo",
    "fewbit demo --json",
)
def demo(
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Also the settings, on stderr.")] = False,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="Only the table: no progress bar, no text.")
    ] = False,
) -> None:
    """Quantize the model inside the package to 4, 3 and 2 bits and show what that costs."""
    from .. import native
    from ..demo.showcase import SETTINGS, Showcase

    quiet_libraries()
    if not native.available():
        console.print(f"note: {native.unsupported_reason()}", markup=False, highlight=False)
    if verbose:
        console.print("settings: " + ", ".join(f"{name} {value}" for name, value in SETTINGS.items()))
    with progress_bar("demo", hidden=as_json or quiet) as progress:
        rows = Showcase(progress).run()
    if as_json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    table = Table(
        "model", "bits/weight", "size", "perplexity", "KL", caption="KL: nats per token to the original"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        kl = "" if row.kl is None else f"{row.kl:.4f}"
        table.add_row(
            row.name,
            f"{row.bits_per_weight:.2f}",
            formatting.size(row.size_bytes),
            f"{row.perplexity:.2f}",
            kl,
        )
    output = Console()
    output.print(table)
    if quiet:
        return
    output.print("Text of each model, from the same prompt and the same seed:")
    for row in rows:
        output.print(f"[bold]{row.name}[/]: ", end="")
        output.print(row.text, markup=False, highlight=False)
