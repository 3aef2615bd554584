"""``fewbit eval``: perplexity of a model, its distance from another one, and its scores in benchmarks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .. import formatting
from ..config import Dtype
from ..errors import CalibrationError, ConfigError
from .display import console, examples, plain, progress_bar, quiet_libraries
from .options import AsJson, Device, TrustRemoteCode

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ..evaluation import Evaluation
    from ..hf.lm_eval import Score
    from ..modeling.source import Source


@examples(
    "fewbit eval out --dataset wikitext2",
    "fewbit eval out --against org/model --dataset held-out.txt --num-samples 64 --json",
    "fewbit eval out --tasks arc_easy,hellaswag --limit 100",
)
def eval_(
    model: Annotated[str, typer.Argument(help="A quantized checkpoint, a transformers folder or a Hub id.")],
    dataset: Annotated[
        str | None,
        typer.Option(help="wikitext2, c4, c4-new, a .txt, .jsonl or .parquet file, or - for stdin."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Compare with this model, usually the original.")
    ] = None,
    seq_len: Annotated[int, typer.Option("--seq-len", "--seqlen", help="Tokens in a window.")] = 512,
    num_samples: Annotated[
        int | None, typer.Option("--num-samples", "--nsamples", help="Use the first N windows; default: all.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Benchmarks of lm-evaluation-harness, with commas: arc_easy,hellaswag."),
    ] = None,
    tasks_folder: Annotated[
        Path | None, typer.Option(help="Folder with task files of your own; they may run code.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Answered questions before each; default: the task's.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="First N questions of each task only.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows or prompts in a forward pass.")] = 1,
    bos: Annotated[bool, typer.Option("--bos", help="Begin every window with the BOS token.")] = False,
    device: Device = "auto",
    dtype: Annotated[
        Dtype,
        typer.Option(help="Of the forward pass; auto: the model's, or float32 where a CPU is faster so."),
    ] = "auto",
    kernel: Annotated[
        str,
        typer.Option(help="auto_a16 (no activation in 8 bits), auto, or one that `fewbit inspect` lists."),
    ] = "auto_a16",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Also device and kernels, on stderr.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress bar.")] = False,
) -> None:
    """Measure perplexity on a text, with --against also KL divergence and top-1 agreement; or run benchmarks."""
    from ..context import resolve_device
    from ..evaluation import windows
    from ..hf.lm_eval import require_harness, run_tasks
    from ..modeling.source import open_source

    if dataset is None and tasks is None:
        raise ConfigError(
            "nothing to measure on: give --dataset TEXT for perplexity, or --tasks for benchmarks"
        )
    if tasks is not None:
        require_harness()
    quiet_libraries()
    where = resolve_device(device)
    source = open_source(model, trust_remote_code=trust_remote_code)
    base = open_source(against, trust_remote_code=trust_remote_code) if against else None
    tokenizer = source.load_tokenizer() or (base and base.load_tokenizer())
    if tokenizer is None:
        raise CalibrationError(
            f"{model} has no tokenizer, and evaluation starts from text: put its files there"
        )
    text = None if dataset is None else windows(dataset, tokenizer, seq_len, num_samples, bos=bos)
    models = [_load(one, dtype, where, kernel) for one in (source, base) if one]
    result = None if text is None else _perplexity(models, text, batch_size, hidden=quiet or as_json)
    scores = [
        run_tasks(
            one,
            tokenizer,
            [name.strip() for name in tasks.split(",") if name.strip()],
            tasks_folder=tasks_folder,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
        )
        for one in models
        if tasks is not None
    ]
    if verbose:
        _show_setup(models[0], where)
    if as_json:
        print(json.dumps(_facts(result, scores)))
        return
    if result is not None:
        Console().print(_table(result))
    if scores:
        Console().print(_score_table(scores))


def _load(source: Source, dtype: Dtype, device: torch.device, kernel: str) -> nn.Module:
    """Load with fewbit if the folder is a GPTQ checkpoint, else with transformers.

    "auto" is the model's dtype, or float32 on a CPU that multiplies that slowly.
    """
    from ..context import computing_dtype

    own = getattr(source.load_config(), "dtype", None) if source.gguf is None else None
    if dtype == "auto" and own is not None and computing_dtype(own, device) is not own:
        dtype = "float32"
    if source.gguf is not None or not _is_gptq(source.folder):
        return source.load_model(dtype, device)
    from ..hf.load import load

    model: nn.Module = load(source.folder, device, dtype, kernel, source.trust_remote_code)
    return model


def _perplexity(models: list[nn.Module], text: Tensor, batch_size: int, *, hidden: bool) -> Evaluation:
    """Evaluate the first model, against the second if there is one."""
    from ..evaluation import evaluate

    with progress_bar("eval", hidden=hidden) as progress:
        return evaluate(
            models[0],
            text,
            against=models[1] if models[1:] else None,
            batch_size=batch_size,
            progress=lambda done, total: progress("", done, total),
        )


def _show_setup(model: nn.Module, device: torch.device) -> None:
    from ..hf.load import kernels

    console.print(f"{type(model).__name__} on {device}", markup=False, highlight=False)
    for line in kernels(model):
        console.print(line, markup=False, highlight=False)


def _is_gptq(folder: Path) -> bool:
    from ..checkpoint.safe_io import read_json

    config = read_json(folder / "config.json")
    return bool(config.get("quantization_config")) or (folder / "quantize_config.json").is_file()


def _facts(result: Evaluation | None, scores: list[list[Score]]) -> dict[str, Any]:
    facts: dict[str, Any] = {} if result is None else result.to_dict()
    for name, found in zip(("tasks", "tasks_against"), scores, strict=False):
        facts[name] = [score.to_dict() for score in found]
    return facts


def _score_table(scores: list[list[Score]]) -> Table:
    originals = {(score.task, score.metric): score for found in scores[1:] for score in found}
    table = Table("task", "metric", "score", *["original"] * len(scores[1:]), "questions", "shots", box=None)
    for score in scores[0]:
        beside = originals.get((score.task, score.metric))
        table.add_row(
            plain(score.task),
            plain(score.metric),
            _with_error(score.value, score.stderr, 4),
            *([_with_error(beside.value, beside.stderr, 4)] if beside else []),
            *("" if count is None else f"{count:,}" for count in (score.examples, score.num_fewshot)),
        )
    return table


def _table(result: Evaluation) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("perplexity", _with_error(result.perplexity, result.stderr, 3))
    table.add_row("nll", f"{_with_error(result.nll, result.nll_stderr, 4)} nats per token")
    if result.kl is not None and result.top1_agreement is not None:
        base = result.base_perplexity or math.nan
        table.add_row("of the original", f"{base:.3f}, ratio {result.perplexity / base:.3f}")
        table.add_row("KL divergence", f"{_with_error(result.kl, result.kl_stderr, 4)} nats per token")
        table.add_row("", formatting.verdict(result.kl))
        table.add_row("same first choice", f"{result.top1_agreement:.2%}")
    table.add_row("tokens", f"{result.tokens:,} in {result.windows} windows of {result.seq_len}")
    table.add_row("time", f"{result.seconds:.1f} s")
    return table


def _with_error(value: float, error: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" if error is None else f"{value:.{digits}f} ± {error:.{digits}f}"
