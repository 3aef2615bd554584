"""``fewbit bench``: how fast a checkpoint is here, by kernel, next to the original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .. import formatting as words
from ..errors import ConfigError, KernelError
from .bench_layers import measure_layers
from .display import console, plain, progress_bar, quiet_libraries
from .options import Dtype

if TYPE_CHECKING:
    from ..bench.layers import Shape
    from ..bench.models import Result

_ORIGINAL = "original"

_EXAMPLES = """
Examples:

  fewbit bench out --against org/model

  fewbit bench out --all-kernels --threads 4 --json

  fewbit bench out --layers --rivals

  fewbit bench --shapes 8b --device cuda
"""


def bench(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Folder of a quantized checkpoint; with --shapes none is needed.")
    ] = None,
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
    shapes: Annotated[
        list[str] | None,
        typer.Option(help="1b, 8b or 70b: the layer shapes of Llama models, random weights. Repeatable."),
    ] = None,
    bits: Annotated[int, typer.Option(help="Of --shapes.")] = 4,
    group_size: Annotated[int, typer.Option(help="Of --shapes; -1: the whole row.")] = 128,
    device: Annotated[
        str, typer.Option(help="cpu, cuda or cuda:1; a GPU is measured layer by layer.")
    ] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="Of the activations; auto: bfloat16.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Default: what torch chooses.")] = None,
    prefill: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    decode: Annotated[int, typer.Option(min=1, help="Tokens to write in a round.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is measured, in turns.")] = 5,
    rivals: Annotated[
        bool,
        typer.Option(
            "--rivals", help="With --layers or --shapes, on a CPU: onnxruntime, ggml, GPTQModel too."
        ),
    ] = False,
    ggml_folder: Annotated[
        Path | None, typer.Option(help="Of libggml-base.so and libggml-cpu.so; default: llama-cpp-python's.")
    ] = None,
    fuse: Annotated[
        bool, typer.Option("--fuse", help="Joined layers, norms, MLPs and attention in one call each.")
    ] = False,
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
    """Measure prefill and decode speed, memory and load time; ratios are from one run, in turns.

    Times are those of the least disturbed round, medians beside them. Models are in memory together.
    """
    import torch

    from ..bench.baselines import all_rivals
    from ..bench.gpu import check_device

    quiet_libraries()
    where = torch.device(device)
    if rivals and (where.type != "cpu" or not (layers or shapes)):
        raise ConfigError("rivals are measured layer by layer on a CPU: add --layers, without --device cuda")
    if where.type != "cpu":
        check_device(where)
    measured = _shapes(checkpoint, shapes, bits, group_size)
    wanted = "bfloat16" if dtype == "auto" else dtype
    if threads is not None:
        torch.set_num_threads(threads)
    names = _kernels(measured, kernel, all_kernels, getattr(torch, wanted), where)
    if layers or shapes or where.type != "cpu":
        with progress_bar("bench", hidden=quiet or as_json) as progress:
            others = all_rivals(ggml_folder) if rivals else {}
            found = measure_layers(measured, names, getattr(torch, wanted), where, rounds, progress, others)
        print(json.dumps(found.facts(verbose))) if as_json else found.show()
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


def _shapes(checkpoint: Path | None, named: list[str] | None, bits: int, group_size: int) -> list[Shape]:
    """The layer shapes of the models named, or of the checkpoint."""
    from ..bench import layers, llama
    from ..checkpoint.reader import open_checkpoint

    if named:
        return [shape for name in named for shape in llama.shapes(name, bits, group_size)]
    if checkpoint is None:
        raise ConfigError("nothing to measure: give a checkpoint's folder, or --shapes 1b, 8b or 70b")
    return layers.shapes_of(open_checkpoint(checkpoint).layers.values())


def _kernels(shapes: list[Shape], named: list[str] | None, every: bool, dtype: Any, device: Any) -> list[str]:
    """The kernels to measure: those named, or all that can run every layer, or what "auto" takes."""
    from ..bench.layers import able_kernels
    from ..kernels import registry

    if every:
        return able_kernels(shapes, dtype, device)
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
