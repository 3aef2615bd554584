"""``fewbit quantize``: a model in, a GPTQ checkpoint and a report out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Column, Table

from ..config import QuantConfig, parse_overrides
from .display import INTERRUPTED, console, progress_bar, quiet_libraries

ActOrder = Literal["group", "none", "full"]
Method = Literal["gptq", "rtn"]
Format = Literal["gptq", "gptq_v2"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_EXAMPLES = """
Examples:

  fewbit quantize ./SmolLM2-135M -o ./SmolLM2-135M-4bit --dataset notes.txt

  fewbit quantize org/model -o out --bits 3 --group-size 64 --dataset wikitext2 --eval wikitext2

  fewbit quantize model.gguf -o out --dataset chats.jsonl --override 'down_proj=bits:8' --ignore 'layers.0'

  torchrun --nproc-per-node 8 -m fewbit quantize org/model -o out --dataset wikitext2
"""


def quantize(
    model: Annotated[str, typer.Argument(help="A transformers folder, a .gguf file or a Hub id.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder to write; new, empty or interrupted.")
    ],
    bits: Annotated[int, typer.Option(help="2, 3, 4 or 8.")] = 4,
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale; -1: the whole row.")] = 128,
    sym: Annotated[bool, typer.Option("--sym/--asym", help="Symmetric or asymmetric grids.")] = True,
    act_order: Annotated[ActOrder, typer.Option(help="Order of the columns; full writes a g_idx.")] = "group",
    damp: Annotated[float, typer.Option(help="Damping, as a fraction of mean(diag H).")] = 0.01,
    correction: Annotated[
        str,
        typer.Option(help="Move targets towards the full-precision outputs: 0 to 1, or auto.", metavar="A"),
    ] = "auto",
    refit: Annotated[
        bool, typer.Option("--refit", help="Fit scales again after rounding where held-out error falls.")
    ] = False,
    fast: Annotated[
        bool, typer.Option("--fast", help="Half the time: no full-precision stream, no correction.")
    ] = False,
    target_bits: Annotated[
        float | None,
        typer.Option(help="Average stored bits per weight; bits and groups are then chosen per layer."),
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Also train rounding and scales block by block. Takes minutes.")
    ] = False,
    tune_steps: Annotated[int, typer.Option(help="Steps per block with --tune.")] = 100,
    method: Annotated[Method, typer.Option(help="gptq, or rtn (round-to-nearest, no text needed).")] = "gptq",
    dataset: Annotated[
        str | None,
        typer.Option(help="wikitext2, c4, c4-new, a .txt, .jsonl or .parquet file, or - for stdin."),
    ] = None,
    num_samples: Annotated[
        int, typer.Option("--num-samples", "--nsamples", help="Calibration sequences.")
    ] = 128,
    seq_len: Annotated[int, typer.Option("--seq-len", "--seqlen", help="Tokens in each.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Sequences in a forward pass.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, xpu or mps.")] = "auto",
    dtype: Annotated[
        Dtype, typer.Option(help="Read the model in this: for calibration and what stays as it is.")
    ] = "auto",
    ignore: Annotated[
        list[str] | None, typer.Option(help="REGEX of layers to leave alone. Repeatable.")
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option(help="'REGEX=bits:8,group_size:32' or 'REGEX=skip'. Repeatable.")
    ] = None,
    lm_head: Annotated[bool, typer.Option("--lm-head", help="Also quantize the output embedding.")] = False,
    format: Annotated[Format, typer.Option(help="gptq (v1) is read by everything.")] = "gptq",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with an interrupted run.")
    ] = True,
    eval_dataset: Annotated[
        str | None, typer.Option("--eval", help="Measure the result on this text, against the original.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses the calibration windows.")] = 0,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where a fallback would be used.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model's own code.")
    ] = False,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read .bin weight files.")] = False,
    offload_dir: Annotated[
        Path | None,
        typer.Option(help="Folder for activations of batches that wait, instead of memory. Same result."),
    ] = None,
    push_to_hub: Annotated[str | None, typer.Option(help="Upload the result to this Hub repository.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Also list every layer.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only errors.")] = False,
) -> None:
    """Quantize a model with GPTQ into a checkpoint that transformers, vLLM, SGLang and GPTQModel read."""
    config = QuantConfig(
        bits=bits,
        group_size=group_size,
        sym=sym,
        act_order=act_order,
        damp=damp,
        correction=_correction(correction),
        refit=refit,
        fast=fast,
        target_bits=target_bits,
        tune=tune,
        tune_steps=tune_steps,
        method=method,
        ignore=tuple(ignore or ()),
        override=parse_overrides(override or ()),
        lm_head=lm_head,
        format=format,
        num_samples=num_samples,
        seq_len=seq_len,
        batch_size=batch_size,
        seed=seed,
        dtype=dtype,
        strict=strict,
    )
    from .. import api
    from ..walk.ranks import joined

    quiet_libraries()
    with joined(device) as speaks:  # of several processes, one
        try:
            with progress_bar("quantize", hidden=quiet or as_json or not speaks) as progress:
                report = api.quantize(
                    model,
                    config,
                    dataset=dataset,
                    output=output,
                    device=device,
                    resume=resume,
                    max_shard_size=max_shard_size,
                    trust_remote_code=trust_remote_code,
                    allow_pickle=allow_pickle,
                    evaluate_on=eval_dataset,
                    push_to_hub=push_to_hub,
                    offload_dir=offload_dir,
                    progress=progress,
                )
        except KeyboardInterrupt as interrupt:
            if speaks:
                console.print(_after_interrupt(output))
            raise typer.Exit(INTERRUPTED) from interrupt
    if as_json and speaks:
        print(json.dumps(report.summary()))
    elif speaks and not quiet:
        _show(report, verbose)


quantize.__doc__ = f"{quantize.__doc__}\n{_EXAMPLES}"


def _correction(text: str) -> float | str:
    """A number where the text is one; QuantConfig judges the rest."""
    return float(text) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text.lower()) else text


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
    from ..report import words
    from ..report.collect import PAGE_NAME
    from ..report.layers import MEASURES, error_measure, is_known, mean

    results = Console()
    if verbose:
        results.print(_layer_table(report))
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    measure = error_measure(report.layers)
    known = [layer for layer in report.layers if is_known(layer, measure)]
    table.add_row("quantized", f"{report.modules} layers, {report.bits_per_weight:.3f} bits per weight")
    table.add_row("left as they are", f"{len(report.skipped)} weight matrices")
    if known:
        worst = max(known, key=lambda layer: layer[measure])
        average = mean(layer[measure] for layer in known)
        table.add_row(
            MEASURES[measure][0] + (", before tuning" if any(layer["tuned"] for layer in known) else ""),
            f"{words.percent(average)} on average, {words.percent(worst[measure])} at most ({worst['name']})",
        )
    fallbacks = ", ".join(f"{name} ({count} layers)" for name, count in report.fallbacks.items())
    table.add_row("fallbacks", fallbacks or "none")
    table.add_row("time", f"{report.seconds:.1f} s, peak memory {words.size(report.peak_memory_bytes)}")
    if report.resumed_layers:
        table.add_row("resumed", f"{report.resumed_layers} layers came from the interrupted run")
    if report.evaluation:
        base, after = report.evaluation["base"], report.evaluation["quantized"]
        table.add_row(
            "perplexity",
            f"{words.number(base['perplexity'])} before, {words.number(after['perplexity'])} after; "
            f"KL {words.number(after['kl'])} nats per token; same first choice "
            f"{words.percent(after['top1_agreement'])}",
        )
    table.add_row("written to", str(report.output))
    table.add_row("report", str(Path(report.output) / PAGE_NAME))
    results.print(table)
    for note in report.notes:
        console.print(f"note: {note}", markup=False, highlight=False)


def _layer_table(report: Any) -> Table:
    from ..report import words

    headings = ("shape", "bits", "group", "tokens", "own error", "true error", "α", "refit", "fallbacks")
    table = Table(Column("layer", overflow="fold"), *headings)
    for layer in report.layers:
        table.add_row(
            layer["name"],
            f"{layer['out_features']} × {layer['in_features']}",
            str(layer["bits"]),
            str(layer["group_size"]),
            str(layer["tokens"]),
            words.percent(layer["output_error"]),
            words.percent(layer["true_error"]),
            words.alpha(layer["correction"]),
            "kept" if layer["refit"] else "",
            ", ".join(layer["fallbacks"]),
        )
    return table
