"""``fewbit verify``: does a checkpoint hold together?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from .display import NO, examples, plain, quiet_libraries
from .options import AsJson

if TYPE_CHECKING:
    from ..verification import VerifyResult


@examples(
    "fewbit verify out",
    "fewbit verify out --against path/to/original --json",
)
def verify(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a GPTQ checkpoint, from any tool.")],
    against: Annotated[
        Path | None, typer.Option(help="Folder of the original model: also measure every layer's error.")
    ] = None,
    as_json: AsJson = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="With --against: every layer.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only the exit code.")] = False,
) -> None:
    """Check names (also those that the model needs), shapes, dtypes, index, hashes, scales, zero points and g_idx.

    Lists every problem. Exit code 0 if there is none, else 1.
    """
    from ..verification import verify as verify_checkpoint

    quiet_libraries()
    result = verify_checkpoint(checkpoint, against)
    if as_json:
        problems = [problem._asdict() for problem in result.problems]
        answer = {"ok": result.ok, "problems": problems, "layers": result.layers, "errors": result.errors}
        print(json.dumps(answer))
    elif not quiet:
        _show(Console(), result, verbose)
    if not result.ok:
        raise typer.Exit(NO)


def _show(console: Console, result: VerifyResult, verbose: bool) -> None:
    for problem in result.problems:
        console.print(plain(f"{problem.where}: {problem.what}"), highlight=False)
    if result.errors:
        ranked = sorted(result.errors.items(), key=lambda item: -item[1])
        shown = ranked if verbose else ranked[:3]
        console.print("relative error of the weights, largest first:")
        for name, error in shown:
            console.print(f"  {error:.4f}  {name}", markup=False, highlight=False)
        if len(shown) < len(ranked):
            mean = sum(result.errors.values()) / len(result.errors)
            console.print(f"  … {len(ranked) - len(shown)} more (-v shows them); mean {mean:.4f}")
    if result.ok:
        console.print(f"[green]ok[/]: {result.layers} quantized layers, nothing wrong")
    else:
        console.print(f"[red]{len(result.problems)} problems[/] in {result.layers} quantized layers")
