"""``fewbit export``: the same weights in the format of another engine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .. import formatting
from ..config import ExportTarget, PlainDtype
from .display import console, examples
from .options import AsJson


@examples(
    "fewbit export out --to compressed-tensors -o out-vllm",
    "fewbit export out --to gguf -o out.gguf",
    "fewbit export out --to mlx -o out-mlx",
    "fewbit export out --to dense --dtype float16 -o out-16bit",
)
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a GPTQ checkpoint, from any tool.")],
    to: Annotated[ExportTarget, typer.Option(help="Format to write.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder to write, empty or new; a file for gguf.")
    ],
    dtype: Annotated[
        PlainDtype | None,
        typer.Option(
            help="With --to dense: of the weights. With --to gguf: of embeddings and output layer, q8_0 too. Default: "
            "the model's."
        ),
    ] = None,
    allow_inexact: Annotated[
        bool, typer.Option("--allow-inexact", help="Also where the format only holds the weights nearly.")
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, such as 5GB or 512MiB.")] = "5GB",
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print nothing.")] = False,
) -> None:
    """Write a checkpoint for another engine, without quantizing again.

    What the format cannot hold is refused before anything is written, with the reason and the number of layers.
    """
    from .. import exports as api

    result = api.export(
        checkpoint, output, to, dtype=dtype, allow_inexact=allow_inexact, max_shard_size=max_shard_size
    )
    if as_json:
        print(json.dumps(asdict(result)))
    elif not quiet:
        show_export(result)


def show_export(result: Any) -> None:
    """Print what an export did."""
    exact = result.layers - sum(result.inexact.values())
    Console().print(
        f"{formatting.plural(result.layers, 'layer')} written as {result.target} to {result.output}, {exact} of them "
        "exactly",
        markup=False,
    )
    for reason, count in result.inexact.items():
        console.print(
            f"{formatting.plural(count, 'layer')}: {reason}, by up to {result.error:.2g} of a step of the grid",
            markup=False,
        )
    for note in result.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
