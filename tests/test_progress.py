"""Progress of a run from Python: a bar for people, lines for a log, a callback, or nothing."""

import io
import logging
import os
import sys

import pytest

import fewbit
from fewbit import progress
from models import random_sequences, tiny_model


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(**options):
    fewbit.quantize(tiny_model("llama"), bits=8, dataset=random_sequences(2), fast=True, **options)


def test_a_bar_for_each_phase_in_a_terminal(monkeypatch):
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    callback = progress.progress_of(True, "quantize")
    for phase in ("measure", "quantize"):
        for done in (1, 2, 4):
            callback(phase, done, 4)
    assert "quantize: measure: 100%" in shown.getvalue()
    assert "quantize: 100%" in shown.getvalue()


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_terminal_that_does_not_state_its_size_shows_the_bar(monkeypatch):
    here, there = os.openpty()  # 0 columns, 0 rows
    with open(there, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        callback = progress.progress_of(True, "quantize")
        callback("quantize", 1, 1)
        assert isinstance(callback, progress.Bar)
        assert "quantize: 100%|" in os.read(here, 4096).decode()
    os.close(here)


def test_lines_in_the_log_elsewhere(caplog, capsys):
    with caplog.at_level(logging.INFO, "fewbit"):
        run()
    lines = [record.message for record in caplog.records if record.levelno == logging.INFO]
    assert lines[-1].startswith("quantize 100 %")
    assert capsys.readouterr().err == ""


def test_the_time_left_counts_from_where_a_phase_begins(monkeypatch):
    now, lines = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    callback = progress.Lines("quantize", lines.append)
    callback("quantize", 50, 100)  # a run that goes on
    now[0] = 20.0
    callback("quantize", 60, 100)
    assert lines == ["quantize 50.0 %", "quantize 60.0 % after 20.0 s, 80.0 s left"]


def test_a_callback_or_nothing(caplog, monkeypatch):
    calls = []
    run(progress=lambda *call: calls.append(call))
    phase, done, total = calls[-1]
    assert (phase, done) == ("quantize", total)
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    with caplog.at_level(logging.INFO, "fewbit"):
        run(progress=False)
        run(progress=None)
    assert shown.getvalue() == ""
    assert not [record for record in caplog.records if record.levelno == logging.INFO]


@pytest.mark.parametrize("given", [True, False])
def test_a_bar_in_a_notebook(given, monkeypatch):
    monkeypatch.setattr(progress, "_IN_NOTEBOOK", True)
    assert isinstance(progress.progress_of(given, "quantize"), progress.Bar) is given
