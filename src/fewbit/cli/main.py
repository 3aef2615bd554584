"""The `fewbit` command: collects the commands and turns errors into messages and exit codes.

Exit codes: 0 done, 1 the answer is no, 2 bad usage or bad input, 130 interrupted.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..errors import FewbitError
from .bench import bench
from .convert import convert
from .demo import demo
from .display import console, plain
from .distill import distill
from .env import env
from .eval import eval_
from .export import export
from .generate import generate
from .inspect import inspect
from .plan import plan
from .quantize import quantize
from .serve import serve
from .verify import verify


class _UnderscoreGroup(TyperGroup):
    """Accepts ``--group_size`` for ``--group-size``, in every command."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, [_with_dashes(arg) for arg in args])


def _with_dashes(arg: str) -> str:
    if not arg.startswith("--"):
        return arg
    name, separator, value = arg.partition("=")
    return name.replace("_", "-") + separator + value


app = typer.Typer(
    cls=_UnderscoreGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make large language models small: GPTQ quantization to 2, 3, 4 or 8 bits, on the machine you have.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"fewbit {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Make large language models small: GPTQ quantization to 2, 3, 4 or 8 bits, on the machine you have."""


app.command()(quantize)
app.command()(plan)
app.command("eval")(eval_)
app.command()(inspect)
app.command()(verify)
app.command()(generate)
app.command()(serve)
app.command()(bench)
app.command()(convert)
app.command()(distill)
app.command()(export)
app.command()(demo)
app.command()(env)


def run() -> None:
    """Entry point of the ``fewbit`` command."""
    try:
        app()
    except FewbitError as error:
        console.print(f"[bold red]error[/] ({type(error).__name__}):", end=" ")
        console.print(plain(error), highlight=False)
        sys.exit(2)
