"""``fewbit eval``: perplexity of a model, and its distance from another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from ..checkpoint.untrusted import read_json
from ..errors import CalibrationError
from ..evaluate import Evaluation, evaluate, windows
from ..source import Source, open_source
from .display import console, progress_bar, quiet_libraries
from .options import Dtype

_EXAMPLES = """
Examples:

  fewbit eval out --dataset wikitext2

  fewbit eval out --against org/model --dataset held-out.txt --num-samples 64 --json
"""


def eval_(
    model: Annotated[str, typer.Argument(help="A quantized checkpoint, a transformers folder or a Hub id.")],
    dataset: Annotated[
        str,
        typer.Option(help="wikitext2, c4, c4-new, a .txt, .jsonl or .parquet file, or - for stdin."),
    ],
    against: Annotated[
        str | None, typer.Option(help="Compare with this model, usually the original.")
    ] = None,
    seq_len: Annotated[int, typer.Option("--seq-len", "--seqlen", help="Tokens in a window.")] = 512,
    num_samples: Annotated[
        int | None, typer.Option("--num-samples", "--nsamples", help="Use the first N windows; default: all.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows in a forward pass.")] = 1,
    bos: Annotated[bool, typer.Option("--bos", help="Begin every window with the BOS token.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, xpu or mps.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Of the forward pass; auto keeps the model's.")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model's own code.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Also device and kernels, on stderr.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress bar.")] = False,
) -> None:
    """Measure perplexity on a text, and with --against also KL divergence and top-1 agreement."""
    from ..preparation import resolve_device

    quiet_libraries()
    where = resolve_device(device)
    source = open_source(model, trust_remote_code=trust_remote_code)
    base = open_source(against, trust_remote_code=trust_remote_code) if against else None
    tokenizer = source.load_tokenizer() or (base and base.load_tokenizer())
    if tokenizer is None:
        raise CalibrationError(
            f"{model} has no tokenizer, and evaluation starts from text: put its files there"
        )
    text = windows(dataset, tokenizer, seq_len, num_samples, bos=bos)
    with progress_bar("eval", hidden=quiet or as_json) as progress:
        measured = _load(source, dtype, where)
        result = evaluate(
            measured,
            text,
            against=_load(base, dtype, where) if base else None,
            batch_size=batch_size,
            progress=lambda done, total: progress("", done, total),
        )
    if verbose:
        _show_setup(measured, where)
    if as_json:
        print(json.dumps(result.to_dict()))
    else:
        Console().print(_table(result))


eval_.__doc__ = f"{eval_.__doc__}\n{_EXAMPLES}"


def _load(source: Source, dtype: str, device: torch.device) -> nn.Module:
    """Through fewbit's runtime if the folder is a GPTQ checkpoint, else through transformers."""
    if source.gguf is not None or not _is_gptq(source.folder):
        return source.load_model(dtype, device)
    from ..runtime.load import load

    model: nn.Module = load(source.folder, device, dtype, trust_remote_code=source.trust_remote_code)
    return model


def _show_setup(model: nn.Module, device: torch.device) -> None:
    from ..runtime.load import kernels

    console.print(f"{type(model).__name__} on {device}", markup=False, highlight=False)
    for line in kernels(model):
        console.print(line, markup=False, highlight=False)


def _is_gptq(folder: Path) -> bool:
    config = read_json(folder / "config.json")
    return bool(config.get("quantization_config")) or (folder / "quantize_config.json").is_file()


def _table(result: Evaluation) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("perplexity", _with_error(result.perplexity, result.stderr, 3))
    table.add_row("nll", f"{_with_error(result.nll, result.nll_stderr, 4)} nats per token")
    if result.kl is not None and result.top1_agreement is not None:
        table.add_row("KL divergence", f"{_with_error(result.kl, result.kl_stderr, 4)} nats per token")
        table.add_row("same first choice", f"{result.top1_agreement:.2%}")
    table.add_row("tokens", f"{result.tokens:,} in {result.windows} windows of {result.seq_len}")
    table.add_row("time", f"{result.seconds:.1f} s")
    return table


def _with_error(value: float, error: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" if error is None else f"{value:.{digits}f} ± {error:.{digits}f}"
