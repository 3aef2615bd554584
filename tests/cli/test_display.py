"""Progress where there is no terminal, and the version."""

from typer.testing import CliRunner

import fewbit
from fewbit import progress
from fewbit.cli import display
from fewbit.cli.main import app


def test_progress_is_lines_without_a_terminal(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with display.progress_bar("quantize") as update:
        for done in range(11):
            update("quantize", done, 10)
            now[0] += 6.0
        update("evaluate", 1, 2)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "quantize 0.00 %",
        "quantize 30.0 % after 18.0 s, 42.0 s left",
        "quantize 60.0 % after 36.0 s, 24.0 s left",
        "quantize 90.0 % after 54.0 s, 6.0 s left",
        "quantize 100 % after 60.0 s",
        "quantize: evaluate 50.0 %",
    ]
    with display.progress_bar("quantize", hidden=True) as update:
        update("quantize", 1, 2)
    assert capsys.readouterr().err == ""


def test_the_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout == f"fewbit {fewbit.__version__}\n"
