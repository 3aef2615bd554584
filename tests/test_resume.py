"""Killed, interrupted, out of disk, out of luck: the same command again ends with the same bytes, or says why not.

`python -m fewbit quantize` runs in processes of its own (`forked_runs`). The fast set kills a dozen of them;
the full one is

    pytest -m slow tests/test_resume.py
"""

import itertools
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import pytest

from forked_runs import ForkedRuns, blocks_in_journal, phase_of
from models import TEXT, save_tiny

BLOCKS, LAYERS = 4, 7  # layers in each block
# What a run says about itself: when, where, how long, and on what machine.
REPORTS = ("fewbit_report.json", "fewbit_report.html")
OF_THE_RUN = {
    "output", "seconds", "seconds_by_phase", "phases", "peak_memory_bytes", "resumed_layers", "notes", "command",
}  # fmt: skip


def arguments(model, out, text, *more):
    return [
        "quantize", str(model), "-o", str(out), "--dataset", str(text), "--group-size", "16", "--seq-len", "64",
        "--num-samples", "16", "--max-shard-size", "60KB", *more,
    ]  # fmt: skip


def contents(folder):
    """Every file of the result but the two reports, and whatever else lies there."""
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*")}
    return {name: p.read_bytes() if p.is_file() else None for name, p in files.items() if name not in REPORTS}


def told(folder):
    """What the report says about the result."""
    report = json.loads((folder / REPORTS[0]).read_text())
    report["layers"] = [{k: v for k, v in layer.items() if k != "seconds"} for layer in report["layers"]]
    return {key: value for key, value in report.items() if key not in OF_THE_RUN}


class Inputs(NamedTuple):
    """What all runs share; `whole` is what lies in the folder `at` after a run that nobody disturbed."""

    model: object
    text: object
    runs: ForkedRuns
    at: object
    whole: dict

    def command(self, out, *more):
        return arguments(self.model, out, self.text, *more)

    def check(self, out):
        assert contents(out) == self.whole
        assert told(out) == told(self.at)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    model = save_tiny(folder / "model", "llama", num_hidden_layers=BLOCKS)
    text = folder / "text.txt"
    text.write_text(TEXT * 12)
    with ForkedRuns(arguments(model, folder / "whole", text)) as runs:
        yield Inputs(model, text, runs, folder / "whole", contents(folder / "whole"))


def moments(durations, count, seed=20261121):
    """So many random moments: a quarter in each phase, uniform over the time that an undisturbed run spends in it."""
    draw = random.Random(seed)
    phases = [phase for phase, _ in zip(itertools.cycle(durations), range(count), strict=False)]
    draw.shuffle(phases)
    for phase in phases:
        yield {
            "phase": phase,
            "blocks": draw.randrange(1, BLOCKS),
            "after": draw.uniform(0, durations[phase]),
        }


def durations_of(inputs, out):
    """Seconds that a run needs from the start of each phase to its end ("walk": from one block to the next)."""
    found = {}
    for phase in ("walk", "write", "end"):
        outcome = inputs.runs.run(inputs.command(out), kill={"phase": phase, "blocks": 1, "after": 0})
        assert outcome.returncode == -signal.SIGKILL, outcome.stderr
        found[phase] = outcome.seconds
        shutil.rmtree(out)
    whole = inputs.runs.run(inputs.command(out)).seconds
    shutil.rmtree(out)
    return {
        "start": found["walk"],
        "walk": (found["write"] - found["walk"]) / BLOCKS,
        "write": max(found["end"] - found["write"], 0.02),
        "end": max(whole - found["end"], 0.02),
    }


def kill_and_resume(inputs, out, count):
    """Kill `count` runs, each where the one before it stopped or anew; returns what each kill left behind."""
    left = []
    for kill in moments(durations_of(inputs, out), count):
        while inputs.runs.run(inputs.command(out), kill=kill).returncode != -signal.SIGKILL:
            inputs.check(out)  # it was faster than the moment
            shutil.rmtree(out)
        left.append(phase_of(out))
        if left[-1][0] in ("write", "end"):  # later moments would not see the walk again
            if blocks_in_journal(out) is None:  # all was done but to remove the empty folder
                shutil.rmtree(out / ".fewbit", ignore_errors=True)
                inputs.check(out)
            else:
                finish(inputs, out)
            shutil.rmtree(out)
    return left


def finish(inputs, out):
    outcome = inputs.runs.run(inputs.command(out))
    assert outcome.returncode == 0, outcome.stderr
    inputs.check(out)
    return outcome


@pytest.mark.parametrize("count", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path, inputs, count):
    left = kill_and_resume(inputs, tmp_path / "out", count)
    if (tmp_path / "out").exists():
        finish(inputs, tmp_path / "out")
    print(left)
    assert len(left) == count
    blocks = [number for _, number in left]
    assert 0 in blocks
    assert any(0 < number < BLOCKS for number in blocks)
    assert BLOCKS in blocks
    assert {phase for phase, _ in left} & {"write", "end"}


def sending(name, blocks, where):
    """Code for a run that sends itself the signal `name` after so many finished blocks.

    Sent from inside, the signal comes at the same moment on every machine: while a layer is being written
    ("solver"), or in the middle of a batch's own forward pass, in its greenlet ("forward").
    """
    return f"""
import os, signal
import torch.nn.functional as functional
from fewbit.pipeline.journal import Journal
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


@pytest.mark.parametrize("blocks", [1, BLOCKS - 1])
@pytest.mark.parametrize("where", ["solver", "forward"])
def test_killed_after_so_many_blocks(tmp_path, inputs, blocks, where):
    out = tmp_path / "out"
    killed = inputs.runs.run(inputs.command(out), prelude=sending("SIGKILL", blocks, where))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (out / "config.json").exists()
    assert f"{LAYERS * blocks} layers came from the interrupted run" in finish(inputs, out).stdout


@pytest.mark.parametrize("where", ["solver", "forward"])
def test_ctrl_c_says_how_to_resume(tmp_path, inputs, where):
    out = tmp_path / "out"
    stopped = inputs.runs.run(inputs.command(out), prelude=sending("SIGINT", 2, where))
    assert stopped.returncode == 130, stopped.stderr
    assert "run the same command again to go on" in stopped.words
    assert f"{LAYERS * 2} layers came from the interrupted run" in finish(inputs, out).stdout


def test_changed_inputs_are_refused_with_the_reason(tmp_path, inputs):
    out = tmp_path / "out"
    inputs.runs.run(inputs.command(out), prelude=sending("SIGKILL", 2, "solver"))
    before = contents(out)
    other = tmp_path / "other.txt"
    other.write_text(TEXT.upper() * 12)
    refused = inputs.runs.run(arguments(inputs.model, out, other))
    assert refused.returncode == 2
    assert "made with another calibration data" in refused.words
    refused = inputs.runs.run(inputs.command(out, "--bits", "3"))
    assert refused.returncode == 2
    assert "made with another config" in refused.words
    assert contents(out) == before


def test_second_process_is_refused(tmp_path, inputs):
    out = tmp_path / "out"
    first = subprocess.Popen([sys.executable, "-m", "fewbit", *inputs.command(out)], stderr=subprocess.PIPE)
    try:
        while not blocks_in_journal(out):
            assert first.poll() is None, first.communicate()[1]
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)
        refused = inputs.runs.run(inputs.command(out))
        assert refused.returncode == 2, refused.stderr
        assert "another fewbit process is writing to" in refused.words
    finally:
        first.kill()
        first.communicate()
    assert first.returncode == -signal.SIGKILL
    assert "layers came from the interrupted run" in finish(inputs, out).stdout


def full_disk(after):
    """Code for a run that finds the disk full from its so many-th step on: a file opened, synced or renamed.

    At the end it says how many steps there were.
    """
    return f"""
import atexit, errno, os, sys
steps = 0

def step():
    global steps
    steps += 1
    if steps > {after}:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

def opened(event, arguments):
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        if "/out/" in str(arguments[0]):
            step()

def stepped(function):
    def call(*arguments, **options):
        step()
        return function(*arguments, **options)
    return call

os.fsync, os.replace = stepped(os.fsync), stepped(os.replace)
sys.addaudithook(opened)
from fewbit.pipeline.journal import Journal
remove = Journal.remove
def told(self):
    remove(self)
    print("steps", steps, file=sys.stderr)
Journal.remove = told
"""


@pytest.mark.parametrize("stride", [16, pytest.param(1, marks=pytest.mark.slow)])
def test_disk_full_from_any_step_on(tmp_path, inputs, stride):
    out = tmp_path / "out"
    undisturbed = inputs.runs.run(inputs.command(out), prelude=full_disk(10**6))
    steps = int(re.findall(r"steps (\d+)", undisturbed.stderr)[-1])
    assert steps > 20 + 6 * BLOCKS
    shutil.rmtree(out)
    finished = []
    for after in sorted({*range(0, steps, stride), steps - 1}):
        failed = inputs.runs.run(inputs.command(out), prelude=full_disk(after))
        assert failed.returncode == 2, failed.stderr
        assert "No space left on device" in failed.words
        assert re.search(r"[Mm]ake room|Correct this|choose another folder", failed.words), failed.stderr
        phase, blocks = phase_of(out) if out.exists() else ("start", 0)
        resumed = finish(inputs, out)
        if blocks:
            assert f"{LAYERS * blocks} layers came from the interrupted run" in resumed.stdout
        finished.append((phase, blocks))
        shutil.rmtree(out)
    print(finished)
    assert {phase for phase, _ in finished} == {"start", "walk", "write", "end"}


@pytest.mark.parametrize("limit", [2_000, 20_000, 50_000])
def test_files_that_are_cut_off_while_they_are_written(tmp_path, inputs, limit):
    """The system itself refuses the byte after `limit`, so that half a file is on disk."""
    prelude = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
"""
    out = tmp_path / "out"
    failed = inputs.runs.run(inputs.command(out), prelude=prelude)
    assert failed.returncode == 2, failed.stderr
    assert "cannot write" in failed.words
    assert "File too large" in failed.words
    assert not (out / "config.json").exists()
    finish(inputs, out)


def damage(folder, draw):
    """Change one file of a killed run at random: a flipped byte, a cut, more bytes, another file's bytes, no file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = draw.choice(
        [file for file in files if file.stat().st_size or draw.random() < 0.2]
    )  # the lock is empty
    data = path.read_bytes()
    kind = draw.choice(["flip", "flip", "cut", "cut", "more", "swap", "none"])
    at = draw.randrange(max(len(data), 1))
    if kind == "flip" and data:
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :])
    elif kind == "more":
        path.write_bytes(data[:at] + draw.randbytes(10) + data[at:])
    elif kind == "swap":
        path.write_bytes(draw.choice(files).read_bytes())
    elif kind == "none":
        path.unlink()
    else:
        path.write_bytes(data[:at])
    return f"{kind} {path.relative_to(folder)} at {at} of {len(data)}"


@pytest.mark.parametrize("count", [3, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("phase", ["walk", "write", "end"])
def test_damaged_files_are_made_again_or_refused(tmp_path, inputs, phase, count):
    killed, out = tmp_path / "killed" / "out", tmp_path / "out"
    draw = random.Random(f"{phase} {count}")
    while True:
        after = 0.01 if phase == "write" else 0
        kill = {"phase": phase, "blocks": 2, "after": after}
        assert inputs.runs.run(inputs.command(killed), kill=kill).returncode == -signal.SIGKILL
        if phase_of(killed)[0] == phase and blocks_in_journal(killed):
            break
        shutil.rmtree(killed)
    for _ in range(count):
        shutil.copytree(killed, out)
        what = damage(out, draw)
        again = inputs.runs.run(inputs.command(out))
        if again.returncode == 0:
            assert contents(out) == inputs.whole, what
            assert told(out) == told(inputs.at), what
        else:
            assert again.returncode == 2, (what, again.stderr)
            assert re.search(r"error \((Output|Resume)Error\): .*(delete|another)", again.words, re.I), what
        print(what, again.returncode)
        shutil.rmtree(out)


@pytest.mark.parametrize(
    "kind", ["flip", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("cut", "none"))]
)
def test_a_damaged_choice_of_bits_is_made_again(tmp_path, inputs, kind):
    options = ("--target-bits", "4.9", "--fast")
    whole, out = tmp_path / "whole" / "out", tmp_path / "out"
    assert inputs.runs.run(inputs.command(whole, *options)).returncode == 0
    killed = inputs.runs.run(inputs.command(out, *options), prelude=sending("SIGKILL", 2, "solver"))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    path = out / ".fewbit" / "allocation.json"
    data = path.read_bytes()
    if kind == "none":
        path.unlink()
    else:
        half = len(data) // 2
        path.write_bytes(
            data[:half] + (bytes([data[half] ^ 4]) + data[half + 1 :] if kind == "flip" else b"")
        )
    again = inputs.runs.run(inputs.command(out, *options))
    assert again.returncode == 0, again.stderr
    assert f"{LAYERS * 2} layers came from the interrupted run" in again.stdout
    assert contents(out) == contents(whole)
