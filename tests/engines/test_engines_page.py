"""docs/engines.md as a reader types it: the demo model, the commands of the page, each engine's own python.

pytest tests/engines/test_engines_page.py -m slow --engine llama.cpp=V/bin/python --engine mlx-lm=V/bin/python
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from docs_runner import DOCS, blocks, commands
from fewbit import demo


@pytest.mark.slow
@pytest.mark.parametrize(("name", "word"), [("llama.cpp", "llama_cpp"), ("mlx-lm", "mlx_lm")])
def test_the_commands_of_the_page_run(
    name: str, word: str, python_of: Callable[[str], str], tmp_path: Path
) -> None:
    python = python_of(name)
    shutil.copytree(demo.model_path(), tmp_path / "my-model")
    text = demo.calibration_text().read_text(encoding="utf-8")
    (tmp_path / "notes.txt").write_text(text[:60_000], encoding="utf-8")
    (block,) = (one for one in blocks(DOCS / "engines.md") if one.kind == "bash" and word in one.code)
    first, installs, last = commands(block)
    assert first[:2] == ["fewbit", "quantize"]
    assert installs[:2] == ["pip", "install"]
    assert last[0] == "python"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    quantized = [sys.executable, "-m", *first]
    subprocess.run(quantized, cwd=tmp_path, env=environment, check=True, capture_output=True)
    said = subprocess.run(
        [python, *last[1:]], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    ).stdout
    words = set(text.lower().split())
    known = [one for one in said.lower().split() if one in words]
    assert len(known) >= 10, said
