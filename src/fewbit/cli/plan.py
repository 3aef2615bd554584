"""``fewbit plan``: what a quantization would do, need and take, and why it could not work."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from .. import formatting
from ..engines import engine
from .display import NO, console, examples, quiet_libraries
from .options import AsJson, Engines, QuantizeArguments, with_options

if TYPE_CHECKING:
    from ..estimate import Estimate
    from ..planning import LayerPlan, Plan


@examples(
    "fewbit plan ./SmolLM2-135M -o ./SmolLM2-135M-4bit --dataset notes.txt",
    "fewbit plan org/model --bits 3 --group-size 64 -v",
    "fewbit plan org/model --bits 8 --asym --for vllm --for onnxruntime",
    "fewbit plan org/model --num-samples 64 --json | jq .problems",
)
@with_options
def plan(
    arguments: QuantizeArguments,
    processes: Annotated[
        int, typer.Option(min=1, help="Plan for so many processes of torchrun, on this machine.")
    ] = 1,
    for_: Engines = None,
    as_json: AsJson = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="List every module.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only say what cannot work.")] = False,
) -> None:
    """Say what `fewbit quantize` with the same options would do, need and take. Exit code 1 if it cannot work, or if an
    engine named by --for could not load the result.

    Takes a few seconds, for a measurement on this machine; nothing is written.
    """
    show_estimate(arguments, processes, for_ or (), as_json=as_json, verbose=verbose, quiet=quiet)


def show_estimate(
    arguments: QuantizeArguments,
    processes: int,
    engines: Sequence[str] = (),
    *,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Estimate a run and print the result, with the verdict of `engines` about its checkpoint.

    Raises:
        typer.Exit: the run cannot work, or an engine could not load the result.
    """
    from ..engines import of_plan
    from ..estimate import estimate
    from ..inspection import engine_reasons

    quiet_libraries()
    found = estimate(arguments.model, arguments.config, **arguments.keywords, processes=processes)
    answers = {} if found.plan is None else engine_reasons(of_plan(found.plan, arguments.config))
    refused = [name for name in engines if answers.get(name)]
    if as_json:
        asked = {"readers": {name: answers.get(name) for name in engines}} if engines else {}
        print(json.dumps(found.summary() | asked | (found.details() if verbose else {})))
    elif not quiet:
        _show(found, verbose)
        for name in sorted(answers.keys() & set(engines) - set(refused)):
            console.print(f"{engine(name).title} can load the result", markup=False, highlight=False)
    problems = [
        f"{engine(name).title} could not load the result: {'; '.join(answers[name])}" for name in refused
    ]
    for problem in (*found.problems, *problems):
        console.print(f"[bold red]problem[/]: {escape(problem)}", highlight=False)
    if problems or not found.works:
        raise typer.Exit(NO)


def _show(found: Estimate, verbose: bool) -> None:
    results = Console()
    if found.plan is not None:
        results.print(_module_table(found) if verbose else _kind_table(found))
        results.print(_kept_table(found, found.plan))
    results.print(_summary(found))
    for note in found.notes:
        console.print(f"note: {note}", markup=False, highlight=False)


def _kind_table(found: Estimate) -> Table:
    """Layers of the same name, shape and settings in one row."""
    assert found.plan is not None
    counts: Counter[tuple[str, ...]] = Counter()
    nbytes: Counter[tuple[str, ...]] = Counter()
    for layer in found.plan.layers:
        kind = (_kind_name(layer), _shape(layer.out_features, layer.in_features), *_settings(layer))
        counts[kind] += 1
        nbytes[kind] += found.sizes.layers[layer.name] if found.sizes else 0
    table = Table("layers", Column("", overflow="fold"), "out × in", "bits", "group", "how", "size")
    table.title, table.title_justify, table.box = "to be quantized", "left", None
    for columns, count in counts.items():
        table.add_row(f"{count} ×", *columns, formatting.size(nbytes[columns]))
    return table


def _module_table(found: Estimate) -> Table:
    assert found.plan is not None
    table = Table(Column("layer", overflow="fold"), "out × in", "bits", "group", "how", "size", box=None)
    table.title, table.title_justify = "to be quantized", "left"
    for layer in found.plan.layers:
        size = formatting.size(found.sizes.layers[layer.name]) if found.sizes else formatting.DASH
        table.add_row(layer.name, _shape(layer.out_features, layer.in_features), *_settings(layer), size)
    return table


def _settings(layer: LayerPlan) -> tuple[str, str, str]:
    """Bits, group and the rest in formatting."""
    settings = layer.settings
    group = "row" if settings.group_size == -1 else str(settings.group_size)
    grid = "symmetric" if settings.sym else "asymmetric"
    how = f"{settings.method}, {grid}" + (", full act-order" if settings.act_order == "full" else "")
    return str(settings.bits), group, how


def _kept_table(found: Estimate, plan: Plan) -> Table:
    """What stays as it is, by reason."""
    table = Table("", Column("", overflow="fold"), "weights", "why", box=None)
    total = (
        f" ({formatting.size(found.sizes.plain)}, with embeddings, norms and biases)" if found.sizes else ""
    )
    table.title, table.title_justify = f"to stay as they are{total}", "left"
    kinds: Counter[tuple[str, str]] = Counter()
    weights: Counter[tuple[str, str]] = Counter()
    for item in (*plan.skipped, *plan.others):
        kind = (re.sub(r"\d+", "N", item.name), item.reason)
        kinds[kind] += 1
        weights[kind] += math.prod(item.shape)
    for (name, why), count in kinds.items():
        table.add_row(f"{count} ×", name, formatting.parameters(weights[name, why]), why)
    return table


def _summary(found: Estimate) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    each = f" in each of {found.processes} processes" if found.processes > 1 else ""
    if found.plan is not None:
        stored = f", {found.bits_per_weight:.3f} bits per weight" if found.bits_per_weight else ""
        if found.model_bits_per_weight:
            stored += f"; {found.model_bits_per_weight:.3f} over the whole model"
        table.add_row("layers", f"{formatting.plural(len(found.plan.layers), 'layer')}{stored}")
    if found.sizes is not None:
        sizes = found.sizes
        table.add_row(
            "result",
            f"{formatting.size(sizes.output)}: {formatting.size(sizes.quantized)} quantized, "
            f"{formatting.size(sizes.plain)} as it was",
        )
        table.add_row("disk", f"{formatting.size(sizes.disk)} while it is written")
    if found.memory is not None:
        memory = found.memory
        parts = ", ".join(f"{name} {formatting.size(size)}" for name, size in memory.parts.items() if size)
        table.add_row("peak memory", f"{formatting.size(memory.peak)}{each}, while {memory.moment}")
        table.add_row("", parts)
        if memory.device_peak is not None:
            table.add_row("GPU memory", f"{formatting.size(memory.device_peak)}{each}")
    if found.seconds is not None:
        phases = sorted(found.seconds.items(), key=lambda item: -item[1])
        shown = ", ".join(
            f"{name} {formatting.duration(seconds)}" for name, seconds in phases if seconds >= 0.1
        )
        table.add_row("time", f"about {formatting.duration(found.total_seconds)}{each}")
        table.add_row("", shown)
    return table


def _kind_name(layer: LayerPlan) -> str:
    """The name without its block, and without numbers: experts are alike."""
    inside = layer.name[len(layer.block) + 1 :] or layer.name
    return re.sub(r"\d+", "N", inside)


def _shape(out_features: int, in_features: int) -> str:
    return f"{out_features} × {in_features}"
