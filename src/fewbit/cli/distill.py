"""``fewbit distill``: train the scales of a finished checkpoint against the original model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .. import formatting
from ..config import Dtype
from .display import INTERRUPTED, console, examples, progress_bar, quiet_libraries
from .options import AsJson, TrustRemoteCode


@examples(
    "fewbit distill out --against org/model --dataset wikitext2 -o out-distilled",
    "fewbit distill gptqmodel-3bit --against ./model --dataset text.txt --tokens 2000000 -o better",
)
def distill(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a GPTQ checkpoint, from any tool.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder to write; new, empty or interrupted.")
    ],
    against: Annotated[str, typer.Option(help="The original model: a transformers folder or a Hub id.")],
    dataset: Annotated[
        str, typer.Option(help="wikitext2, c4, c4-new, a .txt, .jsonl or .parquet file, or - for stdin.")
    ],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to train on.")] = 500_000,
    seq_len: Annotated[int, typer.Option("--seq-len", "--seqlen", min=2, help="Tokens in a sequence.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a step.")] = 2,
    rate: Annotated[
        float | None, typer.Option(help="Peak learning rate: a scale's relative change in one step.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses the sequences and their order.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, xpu or mps.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Of the activations; auto keeps the checkpoint's.")] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Continue an interrupted run.")] = True,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only errors.")] = False,
) -> None:
    """Train scales, norms and biases until the logits are nearer to the original's. The size stays the same."""
    from .. import distillation as api
    from ..distributed import torchrun_session

    quiet_libraries()
    config = api.DistillConfig(tokens, seq_len, batch_size, rate, seed, dtype)
    with torchrun_session(device) as is_leader:
        try:
            with progress_bar("distill", hidden=quiet or as_json or not is_leader) as bar:
                result = api.distill(
                    checkpoint,
                    against,
                    dataset,
                    output,
                    config,
                    device=device,
                    resume=resume,
                    max_shard_size=max_shard_size,
                    trust_remote_code=trust_remote_code,
                    progress=lambda phase, done, total: bar("", done, total),
                )
        except KeyboardInterrupt as interrupt:
            if is_leader:
                console.print("interrupted. The same command goes on from the last saved state.")
            raise typer.Exit(INTERRUPTED) from interrupt
    if as_json and is_leader:
        print(json.dumps(result.to_dict()))
    elif is_leader and not quiet:
        _show(result)


def _show(result: Any) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    change = formatting.percent(1 - result.after / result.before)
    table.add_row(
        "KL divergence",
        f"{formatting.number(result.before)} before, {formatting.number(result.after)} after ({change} less), "
        "nats per held-out token",
    )
    table.add_row("trained", f"{result.trained:,} values on {result.tokens:,} tokens")
    table.add_row("time", f"{result.seconds:.1f} s")
    table.add_row("written to", result.output)
    Console().print(table)
    for note in result.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
