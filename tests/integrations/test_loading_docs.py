"""Every Python block of docs/loading.md runs and leaves what it says."""

import inspect
import re
from pathlib import Path

import torch
from transformers import GPTQConfig

import fewbit
from fewbit.checkpoint.verify import verify
from models import TEXT, save_tiny

PAGE = (Path(__file__).parents[2] / "docs" / "loading.md").read_text()


def test_the_page_runs(tmp_path, monkeypatch):
    save_tiny(tmp_path / "my-model")
    (tmp_path / "notes.txt").write_text("\n\n".join(TEXT[start : start + 100] for start in range(0, 240, 60)))
    fewbit.quantize(str(tmp_path / "my-model"), fewbit.QuantConfig(method="rtn"), output=tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(code, "docs/loading.md", "exec"), {})
    for name in ("out", "copy", "my-model-4bit"):
        assert not verify(tmp_path / name).problems
    ours, theirs = fewbit.load("out").state_dict(), fewbit.load("copy").state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_no_argument_of_transformers_is_left_out():
    arguments = inspect.signature(GPTQConfig).parameters.keys() - {"kwargs"}
    table = PAGE.partition("| argument of `GPTQConfig`")[2]
    assert all(f"`{argument}" in table for argument in arguments)
