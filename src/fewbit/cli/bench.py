"""``fewbit bench``: speed and memory of a checkpoint on this machine, by kernel, against the original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import Dtype
from .display import console, examples, plain, progress_bar, quiet_libraries
from .options import AsJson, Fuse, LmHeadRuntime, TrustRemoteCode, head_bits

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from ..bench.models import Result

_ORIGINAL = "original"


@examples("fewbit bench out --against org/model", "fewbit bench out --all-kernels --threads 4 --json")
def bench(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a quantized checkpoint.")],
    against: Annotated[str | None, typer.Option(help="The original model, for ratios.")] = None,
    kernel: Annotated[
        list[str] | None, typer.Option(help="auto, or one that `fewbit inspect` lists. Repeatable.")
    ] = None,
    all_kernels: Annotated[
        bool,
        typer.Option("--all-kernels", help="Every kernel that can run all layers, except the reference."),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, xpu or mps.")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="Of the activations; auto: bfloat16.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Default: torch's choice.")] = None,
    prefill: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    decode: Annotated[int, typer.Option(min=1, help="Tokens to generate in a round.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Number of measurements of each, in turns.")] = 5,
    fuse: Fuse = True,
    lm_head_runtime: LmHeadRuntime = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Also the time of every round (in the JSON).")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress bar.")] = False,
) -> None:
    """Measure prefill and decode speed, memory and load time; ratios are from one run, in turns.

    Speeds are from the least disturbed round, with the median in brackets. All models are in memory at the same time.
    """
    import torch

    from ..bench.models import Candidate, measure_models
    from ..context import resolve_device
    from ..errors import KernelError

    quiet_libraries()
    where = resolve_device(device)
    wanted = "bfloat16" if dtype == "auto" else dtype
    if threads is not None:
        torch.set_num_threads(threads)
    names = _kernels(checkpoint, kernel, all_kernels, getattr(torch, wanted), where)
    trust = {"trust_remote_code": trust_remote_code}
    options = trust | {"fuse": fuse, "lm_head_runtime": head_bits(lm_head_runtime)}
    candidates = {name: Candidate(str(checkpoint), wanted, name, options, str(where)) for name in names}
    if against is not None:
        candidates = {_ORIGINAL: Candidate(against, wanted, None, trust, str(where)), **candidates}
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
    facts = {
        "threads": torch.get_num_threads(),
        "dtype": wanted,
        "models": _facts(results, rounds=verbose),
        "refused": refused,
    }
    if as_json:
        print(json.dumps(facts))
    else:
        _show(facts)


def _kernels(
    checkpoint: Path, named: list[str] | None, every: bool, dtype: torch.dtype, device: torch.device
) -> list[str]:
    """The kernels to measure: the named ones, or all that can run every layer, or "auto"."""
    from ..checkpoint.reader import open_checkpoint
    from ..engines import of_checkpoint
    from ..kernels import registry

    if not every:
        for name in named or ():
            if name != "auto":
                registry.get(name)  # raises for an unknown name
        return named or ["auto"]
    able = [name for name in registry.names() if name != "reference"]
    for spec in {spec for _, spec in of_checkpoint(open_checkpoint(checkpoint), {}).layers}:
        reasons = dict(registry.explain(spec, device, dtype))
        able = [name for name in able if reasons[name] is None]
    return able


def _facts(results: dict[str, Result], *, rounds: bool) -> dict[str, dict[str, Any]]:
    """The results in plain JSON types."""
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
    return models


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console

    screen = Console()
    screen.print(_table(facts))
    for name, found in facts["models"].items():
        screen.print(plain(f"{name}: {'; '.join(found['kernels'])}"))
    for name, why in facts["refused"].items():
        console.print(plain(f"{name}: {why}"))


def _table(facts: dict[str, Any]) -> Table:
    from rich.table import Table

    from .. import formatting

    table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left")
    table.title = f"{facts['dtype']}, {facts['threads']} threads: tokens/s (median of the rounds)"
    table.add_column("kernel")
    for column in ("prefill", "", "decode", "", "load", "memory", "peak"):
        table.add_column(column, justify="right")
    for name, found in facts["models"].items():
        cells = []
        for phase in ("prefill", "decode"):
            rate, median = (found[f"{phase}_tokens_per_second{end}"] for end in ("", "_median"))
            ratio = found.get(f"{phase}_ratio")
            cells += [f"{rate:.1f} ({median:.1f})", "" if ratio is None else f"{ratio:.2f}x"]
        peak = found["peak_bytes"]
        memory = [formatting.size(found["memory_bytes"]), "" if peak is None else formatting.size(peak)]
        table.add_row(plain(name), *cells, f"{found['load_seconds']:.1f} s", *memory)
    return table
