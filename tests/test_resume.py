"""Kill -9 at any block, run the same command again: the same bytes."""

import signal
import subprocess
import sys

import pytest

from models import TEXT, save_tiny

RUN = """
import sys, torch
torch.set_num_threads(1)
from fewbit.cli.main import run
sys.argv[0] = "fewbit"
run()
"""


def command(model, out, text, *more):
    return [
        sys.executable, "-c", RUN, "quantize", str(model), "-o", str(out), "--dataset", str(text),
        "--group-size", "16", "--seq-len", "64", "--num-samples", "24", *more,
    ]  # fmt: skip


def contents(folder):
    reports = ("fewbit_report.json", "fewbit_report.html")
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name not in reports}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    model = save_tiny(folder / "model", "llama", num_hidden_layers=6)
    text = folder / "text.txt"
    text.write_text(TEXT * 12)
    subprocess.run(command(model, folder / "whole", text), check=True, capture_output=True)
    return model, text, contents(folder / "whole")


def interrupted(arguments, name, blocks, where="solver"):
    """Run a command that sends itself the signal `name` after so many finished blocks.

    Sent from inside, the signal comes at the same moment on every machine: while a layer is being written
    ("solver"), or in the middle of a batch's own forward pass, in its greenlet ("forward").
    """
    prelude = f"""
import os, signal
import torch.nn.functional as functional
from fewbit.walk.journal import Journal
append, silu, done = Journal.append, functional.silu, []
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts without it

def counted(self, *block):
    append(self, *block)
    done.append(block)
    if {where!r} == "solver" and len(done) == {blocks}:
        os.kill(os.getpid(), signal.{name})

def activation(*args, **kwargs):
    if {where!r} == "forward" and len(done) == {blocks}:
        os.kill(os.getpid(), signal.{name})
    return silu(*args, **kwargs)

Journal.append, functional.silu = counted, activation
"""
    return subprocess.run(
        [*arguments[:2], prelude + arguments[2], *arguments[3:]], capture_output=True, text=True
    )


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("where", ["solver", "forward"])
def test_killed_and_resumed_gives_the_same_bytes(tmp_path, inputs, blocks, where):
    model, text, whole = inputs
    out = tmp_path / "out"
    killed = interrupted(command(model, out, text), "SIGKILL", blocks, where)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (out / "config.json").exists()
    again = subprocess.run(command(model, out, text), capture_output=True, text=True, check=True)
    assert f"{7 * blocks} layers came from the interrupted run" in again.stdout
    assert contents(out) == whole


@pytest.mark.parametrize("where", ["solver", "forward"])
def test_ctrl_c_says_how_to_resume(tmp_path, inputs, where):
    model, text, whole = inputs
    out = tmp_path / "out"
    stopped = interrupted(command(model, out, text), "SIGINT", 2, where)
    assert stopped.returncode == 130, stopped.stderr
    assert "run the same command again to go on" in " ".join(stopped.stderr.split())
    again = subprocess.run(command(model, out, text), capture_output=True, text=True, check=True)
    assert "14 layers came from the interrupted run" in again.stdout
    assert contents(out) == whole


def test_changed_inputs_are_refused_with_the_reason(tmp_path, inputs):
    model, text, _ = inputs
    out = tmp_path / "out"
    interrupted(command(model, out, text), "SIGKILL", 2)
    journal = out / ".fewbit" / "journal"
    before = journal.read_bytes()
    other = tmp_path / "other.txt"
    other.write_text(TEXT.upper() * 12)
    refused = subprocess.run(command(model, out, other), capture_output=True, text=True)
    assert refused.returncode == 2
    assert "made with another calibration data" in " ".join(refused.stderr.split())
    refused = subprocess.run(command(model, out, text, "--bits", "3"), capture_output=True, text=True)
    assert refused.returncode == 2
    assert "made with another config" in " ".join(refused.stderr.split())
    assert journal.read_bytes() == before


def test_a_full_disk_is_reported_and_the_next_run_goes_on(tmp_path, inputs):
    model, text, whole = inputs
    out = tmp_path / "out"
    limited = RUN.replace(
        "import sys, torch",
        "import resource, signal, sys, torch\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))",
    )
    arguments = command(model, out, text)
    arguments[2] = limited
    failed = subprocess.run(arguments, capture_output=True, text=True)
    assert failed.returncode == 2, failed.stderr
    assert "cannot write" in failed.stderr
    assert not (out / "config.json").exists()
    again = subprocess.run(command(model, out, text), capture_output=True, text=True, check=True)
    assert "layers came from the interrupted run" in again.stdout
    assert contents(out) == whole
