"""``fewbit quantize``: a model in, a GPTQ checkpoint and a report out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer
from rich.console import Console
from rich.table import Column, Table

from .. import formatting
from ..config import ExportTarget
from ..engines import engine
from .display import INTERRUPTED, console, examples, progress_bar, quiet_libraries
from .export import show_export
from .options import AsJson, ChosenFor, QuantizeArguments, with_options
from .plan import show_estimate


@examples(
    "fewbit quantize ./SmolLM2-135M -o ./SmolLM2-135M-4bit --dataset notes.txt",
    "fewbit quantize org/model -o out --bits 3 --group-size 64 --dataset wikitext2 --eval wikitext2",
    "fewbit quantize model.gguf -o out --dataset chats.jsonl --override 'down_proj=bits:8' --ignore 'layers.0'",
    "fewbit quantize ./SmolLM2-135M -o out --dataset notes.txt --for llama.cpp --export gguf",
    "torchrun --nproc-per-node 8 -m fewbit quantize org/model -o out --dataset wikitext2",
)
@with_options
def quantize(
    arguments: QuantizeArguments,
    *,
    context: typer.Context,
    export: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TARGET",
            help=f"Then also write it, beside the output, as {', '.join(get_args(ExportTarget))}. Repeatable.",
        ),
    ] = None,
    for_: ChosenFor = None,
    push_to_hub: Annotated[str | None, typer.Option(help="Upload the result to this Hub repository.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only plan the run, as fewbit plan does.")
    ] = False,
    as_json: AsJson = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Also list every layer.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only errors.")] = False,
) -> None:
    """Quantize a model with GPTQ into a checkpoint that transformers, vLLM, SGLang and GPTQModel read."""
    from ..distributed import launched_processes, launched_rank, torchrun_session

    if for_ or export:
        given = {name for name in context.params if _is_given(context, name)}
        arguments = _prepared(arguments, given, for_ or (), export or ())
    if dry_run:
        if launched_rank() in (None, 0):
            show_estimate(arguments, launched_processes(), as_json=as_json, verbose=verbose, quiet=quiet)
        return
    if arguments.output is None:
        raise typer.BadParameter("the folder to write is missing", param_hint="'-o' / '--output'")
    from .. import exports
    from .. import quantization as api

    quiet_libraries()
    with torchrun_session(arguments.keywords["device"]) as is_leader:
        try:
            with progress_bar("quantize", hidden=quiet or as_json or not is_leader) as progress:
                report = api.quantize(
                    arguments.model,
                    arguments.config,
                    **arguments.keywords,
                    push_to_hub=push_to_hub,
                    progress=progress,
                )
        except KeyboardInterrupt as interrupt:
            if is_leader:
                console.print(_after_interrupt(arguments.output))
            raise typer.Exit(INTERRUPTED) from interrupt
    if as_json and is_leader:
        print(json.dumps(report.summary()))
    elif is_leader and not quiet:
        _show(report, verbose)
    for target in (export or ()) if is_leader else ():
        result = exports.export(
            arguments.output, _beside(arguments.output, target), cast(ExportTarget, target)
        )
        if not (quiet or as_json):
            show_export(result)
    if is_leader and not (quiet or as_json):
        for target in {engine(name).target for name in for_ or ()} - {"", *(export or ())}:
            console.print(
                f"next: fewbit export {arguments.output} --to {target} -o {_beside(arguments.output, target)}",
                markup=False,
                soft_wrap=True,
            )


def _is_given(context: typer.Context, option: str) -> bool:
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def _prepared(
    arguments: QuantizeArguments, given: Collection[str], engines: Sequence[str], targets: Sequence[str]
) -> QuantizeArguments:
    """Choose settings for the engines, and refuse what could not be exported."""
    from ..exports.before import check_export, open_prospect, settings_for

    quiet_libraries()
    keywords, config = arguments.keywords, arguments.config
    options = {name: keywords[name] for name in ("trust_remote_code", "allow_pickle")}
    prospect = open_prospect(arguments.model, config.dtype, **options)
    if engines:
        config = settings_for(engines, prospect, config, given)
    for name in ("group_size", "format"):
        if getattr(config, name) != getattr(arguments.config, name):
            console.print(
                f"note: {name} is {getattr(config, name)}, for {', '.join(engines)}", highlight=False
            )
    outputs = {target: arguments.output and _beside(arguments.output, target) for target in targets}
    for target in dict.fromkeys([*targets, *(to for name in engines if (to := engine(name).target))]):
        check_export(prospect, config, target, outputs.get(target))
    return dataclasses.replace(arguments, config=config)


def _beside(output: Path, target: str) -> Path:
    return output.with_name(f"{output.name}.gguf" if target == "gguf" else f"{output.name}-{target}")


def _after_interrupt(output: Path) -> str:
    if (output / "config.json").exists():
        return (
            f"interrupted. The checkpoint in {output} is complete; run the same command again for its evaluation, "
            f"or measure it with `fewbit eval {output} --against MODEL`."
        )
    if (output / ".fewbit").exists():
        return f"interrupted. Finished blocks are kept in {output}: run the same command again to go on."
    return "interrupted, before there was anything to keep."


def _show(report: Any, verbose: bool) -> None:
    from ..checkpoint.writer import PAGE_NAME
    from ..report.layer_stats import error_measure, error_name, mean, worst_layer

    results = Console()
    if verbose:
        results.print(_layer_table(report))
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    measure = error_measure(report.layers)
    worst = worst_layer(report.layers, measure)
    whole = f"{report.model_bits_per_weight:.3f} over the whole model"
    table.add_row(
        "quantized", f"{report.modules} layers, {report.bits_per_weight:.3f} bits per weight; {whole}"
    )
    before, after = report.model["bytes"], report.result_bytes
    table.add_row(
        "size", f"{formatting.size(before)} → {formatting.size(after)}, {before / after:.1f} × smaller"
    )
    left = formatting.plural(len(report.skipped), "weight matrix", "weight matrices")
    table.add_row("left as they are", left)
    if worst is not None:
        average = mean(layer[measure] for layer in report.layers)
        tuned = any(layer["tuned"] for layer in report.layers)
        table.add_row(
            error_name(report.layers) + (", before tuning" if tuned else ""),
            f"{formatting.percent(average)} on average, {formatting.percent(worst[measure])} at most ({worst['name']})",
        )
    fallbacks = ", ".join(f"{name} ({count} layers)" for name, count in report.fallbacks.items())
    table.add_row("fallbacks", fallbacks or "none")
    processes = f" in one of {report.ranks} processes" if report.ranks > 1 else ""
    peak = formatting.size(report.peak_memory_bytes)
    table.add_row("time", f"{report.seconds:.1f} s, peak memory {peak}{processes}")
    if report.resumed_layers:
        table.add_row("resumed", f"{report.resumed_layers} layers came from the interrupted run")
    if report.evaluation:
        base, after = report.evaluation["base"], report.evaluation["quantized"]
        table.add_row(
            "perplexity",
            f"{formatting.number(base['perplexity'])} before, {formatting.number(after['perplexity'])} after; "
            f"same first choice {formatting.percent(after['top1_agreement'])}",
        )
        table.add_row(
            "KL divergence",
            f"{formatting.number(after['kl'])} nats per token: {formatting.verdict(after['kl'])}",
        )
    else:
        table.add_row(
            "cost", f"not measured yet: fewbit eval {report.output} --against MODEL --dataset HELD-OUT-TEXT"
        )
    table.add_row("written to", str(report.output))
    table.add_row("report", str(Path(report.output) / PAGE_NAME))
    results.print(table)
    for note in report.notes:
        console.print(f"note: {note}", markup=False, highlight=False)


def _layer_table(report: Any) -> Table:

    headings = ("shape", "bits", "group", "tokens", "own error", "true error", "α", "fallbacks")
    table = Table(Column("layer", overflow="fold"), *headings)
    for layer in report.layers:
        table.add_row(
            layer["name"],
            f"{layer['out_features']} × {layer['in_features']}",
            str(layer["bits"]),
            str(layer["group_size"]),
            str(layer["tokens"]),
            formatting.percent(layer["output_error"]),
            formatting.percent(layer["true_error"]),
            formatting.alpha(layer["correction"]),
            ", ".join(layer["fallbacks"]),
        )
    return table
