"""What ``fewbit demo`` shows; the job itself is tested in tests/demo."""

import pytest
from typer.testing import CliRunner

from fewbit.cli.main import app
from fewbit.demo.showcase import Row, Showcase


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.setattr(Showcase, "__init__", lambda self, progress: None)
    monkeypatch.setattr(Showcase, "run", lambda self: [Row("original", 16, 2_000_000, 12.5, None, "It was.")])


def run(*arguments):
    result = CliRunner().invoke(app, ["demo", *arguments])
    assert result.exit_code == 0, result.output
    return result


def test_quiet_leaves_the_table_and_verbose_adds_the_settings(rows):
    assert "It was." in run().stdout
    quiet = run("-q")
    assert "12.50" in quiet.stdout
    assert "It was." not in quiet.stdout
    assert quiet.stderr == ""
    assert "group_size 64" in run("-v").stderr
