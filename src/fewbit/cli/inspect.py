"""``fewbit inspect``: what a checkpoint is, what can run it here, and which engines load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from .. import formatting
from .display import NO, engine_table, examples, plain, quiet_libraries
from .options import AsJson, Engines

if TYPE_CHECKING:
    from ..inspection import Inspection


@examples(
    "fewbit inspect out",
    "fewbit inspect out --for vllm --for onnxruntime",
    "fewbit inspect out --json",
)
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a GPTQ checkpoint, from any tool.")],
    for_: Engines = None,
    as_json: AsJson = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="List every layer.")] = False,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="Print nothing: is it a checkpoint that can be opened?")
    ] = False,
) -> None:
    """Show bits, groups, format, sizes and origin of a checkpoint, and which kernels here can run it.

    Reads headers only; `fewbit verify` checks the contents. Exit code 1 if an engine named by --for cannot load it.
    """
    from .. import inspection
    from ..checkpoint.reader import open_checkpoint

    if quiet and not as_json and not for_:
        open_checkpoint(checkpoint)
        return
    quiet_libraries()
    found = inspection.inspect(checkpoint)
    if as_json:
        print(json.dumps(found.to_dict()))
    elif not quiet:
        console = Console()
        console.print(_summary(found))
        if verbose:
            console.print(_layers(found))
        console.print(_kernel_table(found))
        console.print(engine_table(found.engines, for_, verbose))
    if any(found.engines[name] for name in for_ or ()):
        raise typer.Exit(NO)


def _summary(found: Inspection) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("model", plain(found.model_type or "unknown"))
    if found.base_model:
        table.add_row("original", plain(found.base_model))
    table.add_row("format", found.format)
    table.add_row("made by", plain(", ".join(found.made_by) or "not stated"))
    for text, count in found.layouts.items():
        table.add_row(f"{count} layers", text)
    if found.assumed:
        table.add_row("not stated", f"{', '.join(found.assumed)}: read as the default")
    if found.padded_modules:
        table.add_row("padded", f"{found.padded_modules} layers do not fill their last words")
    if found.bits_per_weight is not None:
        per_weight = f"{found.bits_per_weight:.2f}, with scales, zero points and g_idx"
        table.add_row("bits per weight", per_weight)
    quantized, other = formatting.size(found.quantized_bytes), formatting.size(found.other_bytes)
    table.add_row("size", f"{quantized} quantized, {other} not, in {formatting.plural(found.files, 'file')}")
    if found.base_bytes:
        ratio = found.base_bytes / (found.quantized_bytes + found.other_bytes)
        table.add_row("", f"{formatting.size(found.base_bytes)} before: {ratio:.1f} × smaller")
    return table


def _layers(found: Inspection) -> Table:
    from ..inspection import layout_text

    table = Table("layer", "out x in", "layout", "size", box=None, padding=(0, 2, 0, 0))
    for spec in found.layers:
        shape = f"{spec.out_features} x {spec.in_features}"
        table.add_row(plain(spec.name), shape, layout_text(spec), formatting.size(spec.nbytes))
    return table


def _kernel_table(found: Inspection) -> Table:
    table = Table("kernel", "layers", "", box=None, padding=(0, 2, 0, 0))
    unknown = ", if all layers are linear" if found.kinds.get("unknown") else ""
    table.title, table.title_justify = f"kernels on {found.kernels[0].device}{unknown}", "left"
    for row in found.kernels:
        here = f"runs {row.used} of them with kernel=auto" if row.used else ""
        table.add_row(row.kernel, f"{row.modules} of {found.modules}", row.why_not or here)
    return table
