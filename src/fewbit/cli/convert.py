"""``fewbit convert``: the same weights in another format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .. import formatting
from ..config import Format
from .display import examples
from .options import AsJson


@examples(
    "fewbit convert out -o out-v2 --format gptq_v2",
    "fewbit convert old-autogptq -o new --format gptq --allow-pickle",
)
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a GPTQ checkpoint, from any tool.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write; must be empty or new.")],
    fmt: Annotated[Format, typer.Option("--format", help="gptq (v1, read by everything) or gptq_v2.")],
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, such as 5GB or 512MiB.")] = "5GB",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also read .bin and .pt files.")
    ] = False,
    as_json: AsJson = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Also list the files that were written.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print nothing.")] = False,
) -> None:
    """Rewrite a checkpoint as v1 or v2, in shards of any size, from AutoGPTQ's old layouts too.

    No weight changes by a single bit.
    """
    from ..checkpoint import convert as checkpoint_convert

    result = checkpoint_convert.convert(
        checkpoint, output, fmt, max_shard_size=max_shard_size, allow_pickle=allow_pickle
    )
    if as_json:
        answer = {
            "output": str(result.output),
            "format": result.format,
            "modules": result.layers,
            "turned_groups": result.turned_groups,
        }
        print(json.dumps(answer))
    elif not quiet:
        console = Console()
        console.print(f"{result.layers} layers written as {result.format} to {result.output}", markup=False)
        if result.turned_groups:
            console.print(
                f"{result.turned_groups} groups had zero point 0, which {result.format} cannot say: "
                "their scales were negated and their codes mirrored; the weights are the same"
            )
        for path in sorted(result.output.iterdir()) if verbose else ():
            console.print(
                f"{formatting.size(path.stat().st_size):>10}  {path.name}", markup=False, highlight=False
            )
