"""``fewbit bench``: how fast a checkpoint is here, by kernel, next to the original."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import KernelError
from ..report import words
from .display import console, plain, progress_bar, quiet_libraries
from .options import Dtype

if TYPE_CHECKING:
    from ..bench.layers import Measured, Shape
    from ..bench.machine import Machine
    from ..bench.models import Result
    from ..checkpoint.reader import Checkpoint

_ORIGINAL = "original"
_TOKENS = (1, 16, 512)

_EXAMPLES = """
Examples:

  fewbit bench out --against org/model

  fewbit bench out --all-kernels --threads 4 --json

  fewbit bench out --layers
"""


def bench(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a quantized checkpoint.")],
    against: Annotated[
        str | None, typer.Option(help="The original: its speed is what ratios refer to.")
    ] = None,
    kernel: Annotated[
        list[str] | None, typer.Option(help="auto, or one that `fewbit inspect` lists. Repeatable.")
    ] = None,
    all_kernels: Annotated[
        bool, typer.Option("--all-kernels", help="Every kernel that can run all layers, but the reference.")
    ] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="Measure each layer shape by itself instead of the whole model.")
    ] = False,
    dtype: Annotated[Dtype, typer.Option(help="Of the activations; auto: bfloat16.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Default: what torch chooses.")] = None,
    prefill: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    decode: Annotated[int, typer.Option(min=1, help="Tokens to write in a round.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is measured, in turns.")] = 5,
    fuse: Annotated[bool, typer.Option("--fuse", help="Layers with the same input in one call.")] = False,
    lm_head_runtime: Annotated[
        int | None, typer.Option(help="8: the output layer in 8 bits while running.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model's own code.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Also every round's time (in the JSON).")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress bar.")] = False,
) -> None:
    """Measure prefill and decode speed, memory and load time on this CPU; ratios are from one run, in turns.

    Times are those of the least disturbed round, medians beside them. Models are in memory together.
    """
    import torch

    from ..checkpoint.reader import open_checkpoint

    quiet_libraries()
    opened = open_checkpoint(checkpoint)
    wanted = "bfloat16" if dtype == "auto" else dtype
    if threads is not None:
        torch.set_num_threads(threads)
    names = _kernels(opened, kernel, all_kernels, getattr(torch, wanted))
    if layers:
        _bench_layers(opened, names, getattr(torch, wanted), rounds, as_json, verbose, quiet)
        return
    from ..bench.models import Candidate, measure_models

    trust = {"trust_remote_code": trust_remote_code}
    faster = {"fuse": fuse, "lm_head_runtime": lm_head_runtime}
    candidates = {name: Candidate(str(checkpoint), wanted, name, trust | faster) for name in names}
    if against is not None:
        candidates = {_ORIGINAL: Candidate(against, wanted, None, trust), **candidates}
    with progress_bar("bench", hidden=quiet or as_json) as progress:
        results, refused = measure_models(
            candidates,
            threads=torch.get_num_threads(),
            prefill_tokens=prefill,
            decode_tokens=decode,
            rounds=rounds,
            progress=progress,
        )
    if not results:
        raise KernelError(
            "nothing could be measured: " + "; ".join(f"{n}: {why}" for n, why in refused.items())
        )
    if as_json:
        print(json.dumps(_model_facts(results, refused, torch.get_num_threads(), wanted, verbose)))
        return
    screen = Console()
    screen.print(_model_table(results, torch.get_num_threads(), wanted))
    for name, result in results.items():
        screen.print(plain(f"{name}: {'; '.join(result.kernels)}"))
    for name, why in refused.items():
        console.print(plain(f"{name}: {why}"))


bench.__doc__ = f"{bench.__doc__}\n{_EXAMPLES}"


def _kernels(checkpoint: Checkpoint, named: list[str] | None, every: bool, dtype: Any) -> list[str]:
    """The kernels to measure: those named, or all that can run every layer, or what "auto" takes."""
    from ..bench.layers import able_kernels, shapes_of
    from ..runtime import registry

    if every:
        return able_kernels(shapes_of(checkpoint.layers.values()), dtype)
    for name in named or ():
        if name != "auto" and name not in registry.names():
            registry.get(name)
    return named or ["auto"]


def _model_facts(
    results: dict[str, Result], refused: dict[str, str], threads: int, dtype: str, rounds: bool
) -> dict[str, Any]:
    base = results.get(_ORIGINAL)
    models = {}
    for name, result in results.items():
        facts: dict[str, Any] = {
            "kernels": result.kernels,
            "load_seconds": result.load_seconds,
            "memory_bytes": result.memory_bytes,
            "peak_bytes": result.peak_bytes,
        }
        for phase in ("prefill", "decode"):
            times = getattr(result, phase)
            facts[f"{phase}_tokens_per_second"] = 1 / times.minimum
            facts[f"{phase}_tokens_per_second_median"] = 1 / times.median
            if base is not None:
                facts[f"{phase}_ratio"] = getattr(base, phase).minimum / times.minimum
            if rounds:
                facts[f"{phase}_seconds_per_token"] = times.seconds
        models[name] = facts
    return {"threads": threads, "dtype": dtype, "models": models, "refused": refused}


def _model_table(results: dict[str, Result], threads: int, dtype: str) -> Table:
    facts = _model_facts(results, {}, threads, dtype, rounds=False)["models"]
    table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left")
    table.title = f"{dtype}, {threads} threads: tokens/s (median of the rounds)"
    table.add_column("kernel")
    for column in ("prefill", "", "decode", "", "load", "memory", "peak"):
        table.add_column(column, justify="right")
    for name, found in facts.items():
        cells = []
        for phase in ("prefill", "decode"):
            rate, median = (found[f"{phase}_tokens_per_second{end}"] for end in ("", "_median"))
            ratio = found.get(f"{phase}_ratio")
            cells += [f"{rate:.1f} ({median:.1f})", "" if ratio is None else f"{ratio:.2f}x"]
        peak = found["peak_bytes"]
        memory = [words.size(found["memory_bytes"]), "" if peak is None else words.size(peak)]
        table.add_row(plain(name), *cells, f"{found['load_seconds']:.1f} s", *memory)
    return table


def _bench_layers(
    checkpoint: Checkpoint,
    names: list[str],
    dtype: Any,
    rounds: int,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    from ..bench import layers
    from ..bench.machine import measure_machine

    candidates = {name: layers.registered(name) for name in names}
    rivals = {"Linear": layers.dense(dtype), "torch int4": layers.torch_operator}
    machine = measure_machine()
    found = []
    shapes = layers.shapes_of(checkpoint.layers.values())
    with progress_bar("bench", hidden=quiet or as_json) as progress:
        for done, shape in enumerate(shapes):
            progress(f"{shape.out_features} x {shape.in_features}", done, len(shapes))
            found.append(
                (shape, *layers.measure_shape(shape, _TOKENS, candidates | rivals, dtype, rounds=rounds))
            )
    if as_json:
        rows = [
            {"shape": asdict(shape), "results": [_layer_facts(shape, t, n, r, machine, dtype, verbose)
             for t, r in results.items() for n in r], "refused": refused}
            for shape, results, refused in found
        ]  # fmt: skip
        print(json.dumps({"machine": asdict(machine), "layers": rows}))
        return
    screen = Console()
    peak = machine.peaks.get(str(dtype).removeprefix("torch."), 0.0)
    screen.print(
        f"{machine.threads} threads: reads {machine.read_bandwidth / 1e9:.1f} GB/s from memory, "
        f"{peak / 1e9:.0f} GFLOP/s in {str(dtype).removeprefix('torch.')}"
    )
    for shape, results, refused in found:
        screen.print(_layer_table(shape, results, machine, dtype))
        for name, why in refused.items():
            console.print(plain(f"{name}: {why}"))


def _layer_facts(
    shape: Shape, tokens: int, name: str, row: dict[str, Measured], machine: Machine, dtype: Any, rounds: bool
) -> dict[str, Any]:
    """One cell of the table; `share` is of read bandwidth at one token, and of the arithmetic peak otherwise."""
    seconds = row[name].times.minimum
    dense_bytes = shape.out_features * shape.in_features * dtype.itemsize
    nbytes = dense_bytes if name == "Linear" else shape.nbytes
    rate, peak = shape.operations(tokens) / seconds, machine.peaks.get(str(dtype).removeprefix("torch."))
    facts: dict[str, Any] = {
        "kernel": name,
        "tokens": tokens,
        "ms": seconds * 1e3,
        "ms_median": row[name].times.median * 1e3,
        "gigabytes_per_second": nbytes / seconds / 1e9,
        "gigaflops": rate / 1e9,
        "share": nbytes / seconds / machine.read_bandwidth if tokens == 1 else rate / peak if peak else None,
        "times_linear": row["Linear"].times.minimum / seconds,
        "error": row[name].error,
    }
    if "torch int4" in row:
        facts["times_torch_int4"] = row["torch int4"].times.minimum / seconds
    return facts | ({"seconds": row[name].times.seconds} if rounds else {})


def _layer_table(
    shape: Shape, results: dict[int, dict[str, Measured]], machine: Machine, dtype: Any
) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left")
    groups = "one group per row" if shape.group_size == -1 else f"groups of {shape.group_size}"
    table.title = (
        f"{shape.count} layers of {shape.out_features} x {shape.in_features}, {shape.bits} bits, {groups}"
    )
    table.add_column("tokens", justify="right")
    table.add_column("kernel")
    for column in ("ms", "median", "GB/s", "share", "x Linear", "x int4", "error"):
        table.add_column(column, justify="right")
    for tokens, row in results.items():
        for name in row:
            facts = _layer_facts(shape, tokens, name, row, machine, dtype, rounds=False)
            share, against = facts["share"], facts.get("times_torch_int4")
            table.add_row(
                str(tokens),
                name,
                f"{facts['ms']:.3f}",
                f"{facts['ms_median']:.3f}",
                f"{facts['gigabytes_per_second']:.1f}" if tokens == 1 else "",
                "" if share is None else f"{share:.0%}",
                f"{facts['times_linear']:.2f}",
                "" if against is None else f"{against:.2f}",
                f"{facts['error']:.1e}",
            )
    return table
