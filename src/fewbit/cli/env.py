"""``fewbit env``: what to paste into a bug report."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .display import examples


@examples(
    "fewbit env",
    "fewbit env -v --json",
)
def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Also the build settings of torch.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only the version of fewbit.")] = False,
) -> None:
    """Show versions, devices and what is compiled: paste this into a bug report."""
    import torch

    from .. import native
    from ..report.report import versions

    facts = versions()
    if quiet:
        print(json.dumps({"fewbit": facts["fewbit"]}) if as_json else facts["fewbit"])
        return
    facts["cpu threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    facts["compiled solver"] = (
        "yes: " + ", ".join(native.instruction_sets()) if native.available() else native.unsupported_reason()
    )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    else:
        facts["cuda"] = "not available"
    if verbose:
        facts["torch build"] = torch.__config__.show().strip()
    if as_json:
        print(json.dumps(facts))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in facts.items():
        table.add_row(name, value)
    Console().print(table)
