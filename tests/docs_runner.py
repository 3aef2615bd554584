"""Runs the code of a documentation page: its Python and bash blocks in their order, in one folder.

Python blocks share their names. Lines of bash blocks that begin with ``fewbit`` go through the command line, in this
process; no other command may stand there. A block after the line ``<!-- not run: REASON -->`` is only shown.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from fewbit import demo
from fewbit.cli.main import app
from models import save_tiny

DOCS = Path(__file__).parents[1] / "docs"
_FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+?) -->\n+)?^```(?P<kind>[^\n]*)\n(?P<code>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """One fenced block. `reason` says why it is not run; `line` is where its fence begins."""

    page: str
    line: int
    kind: str
    code: str
    reason: str | None


def pages() -> list[Path]:
    """Every page of the site."""
    return sorted(DOCS.glob("**/*.md"))


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page.name,
            text.count("\n", 0, found.start()) + 1,
            found["kind"].strip(),
            found["code"],
            found["reason"],
        )
        for found in _FENCE.finditer(text)
    ]


def prepare(folder: Path) -> None:
    """Create what the pages assume: a model, a calibration text and an evaluation text."""
    save_tiny(
        folder / "my-model",
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=2,
        max_position_embeddings=512,
    )
    text = demo.calibration_text().read_text(encoding="utf-8")
    (folder / "notes.txt").write_text(text[:6000], encoding="utf-8")
    (folder / "held-out.txt").write_text(text[20_000:23_000], encoding="utf-8")


def run(page: Path) -> dict[str, Any]:
    """Run the blocks of `page` in the current folder; returns the names that its Python blocks define."""
    names: dict[str, Any] = {}
    for block in blocks(page):
        if block.reason is not None:
            continue
        if block.kind == "python":
            source = "\n" * block.line + block.code  # so that a traceback names the page's own line
            exec(compile(source, str(page), "exec"), names)
        elif block.kind == "bash":
            for command in commands(block):
                _run_command(command, block)
    return names


def commands(block: Block) -> list[list[str]]:
    """The command lines of a bash block, as words."""
    joined = block.code.replace("\\\n", " ")
    words = [shlex.split(line, comments=True) for line in joined.splitlines()]
    return [line for line in words if line]


def _run_command(command: list[str], block: Block) -> None:
    where = f"docs/{block.page}, block at line {block.line}: {' '.join(command)}"
    assert command[0] == "fewbit", f"{where}: not a fewbit command, so the block has to say why it is not run"
    result = CliRunner().invoke(app, command[1:])
    assert result.exit_code == 0, f"{where}\n{result.output}\n{result.exception!r}"
