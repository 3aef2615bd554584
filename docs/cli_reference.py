"""A hook of mkdocs: writes the options of every command into the page cli.md, as typer describes them."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from typing import Any

PAGE = "cli.md"
_EXAMPLES = re.compile(r"^Examples:\n\n((?: {2}\S.*\n\n?)+)", re.M)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return f"{markdown}\n{reference()}" if page.file.src_uri == PAGE else markdown


def reference() -> str:
    """All commands with their options, in Markdown."""
    command = [sys.executable, "-m", "typer", "fewbit.cli.main", "utils", "docs", "--name", "fewbit"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise RuntimeError(f"typer could not describe the commands:\n{done.stderr}")
    _, title, rest = done.stdout.partition("# `fewbit`\n")
    assert title, done.stdout[:200]
    return _EXAMPLES.sub(_block, rest)


def _block(found: re.Match[str]) -> str:
    """The examples of a command as a code block, in which HTML's escapes would be shown as they are."""
    lines = [html.unescape(line.strip()) for line in found[1].splitlines() if line.strip()]
    return "Examples:\n\n```bash\n" + "\n".join(lines) + "\n```\n\n"
