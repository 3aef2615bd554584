"""`torchrun -m fewbit quantize`, as a user starts it."""

import json
import os
import signal
import subprocess
import sys

import pytest

from fewbit.verification import verify
from models import TEXT, save_tiny

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

# A process of the given rank that kills itself after the given number of finished blocks.
KILLED = """
import os, signal, sys
from fewbit.cli.main import run
from fewbit.pipeline.layer_quantizer import LayerQuantizer

rank, blocks = sys.argv.pop(1), int(sys.argv.pop(1))
quantize_layer = LayerQuantizer.quantize_layer

def quantize_or_die(self, *arguments):
    if os.environ["RANK"] == rank and len(self.sink.records) == 7 * blocks:
        os.kill(os.getpid(), signal.SIGKILL)
    quantize_layer(self, *arguments)

LayerQuantizer.quantize_layer = quantize_or_die
run()
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torchrun")
    (folder / "text.txt").write_text(TEXT * 6)
    (folder / "killed.py").write_text(KILLED)
    return (
        save_tiny(folder / "model", "llama", num_hidden_layers=4),
        folder / "text.txt",
        folder / "killed.py",
    )


def torchrun(inputs, output, *more, start=("-m", "fewbit")):
    model, text, _ = inputs
    options = ["--dataset", text, "--group-size", "16", "--seq-len", "64", "--num-samples", "9", *more]
    command = [*TORCHRUN, *start, "quantize", model, "-o", output, *options]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)


def words(text):
    return " ".join(text.split())


def test_only_rank_0_writes_and_prints(inputs, tmp_path):
    done = torchrun(inputs, tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["modules"] == 28
    assert verify(tmp_path / "out").ok
    report = json.loads((tmp_path / "out" / "fewbit_report.json").read_text())
    assert report["ranks"] == 2


@pytest.mark.slow
def test_a_refusal_is_printed_once(inputs, tmp_path):
    refused = torchrun(inputs, tmp_path / "out", "--dataset", "-")
    assert refused.returncode != 0
    assert refused.stderr.count("error (ConfigError)") == 1
    assert "standard input cannot be read by all 2 processes" in words(refused.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_run_resumes_after_a_process_was_killed(inputs, tmp_path, rank):
    torchrun(inputs, tmp_path / "whole")
    output = tmp_path / "out"
    killed = torchrun(inputs, output, start=(inputs[2], rank, 2))
    assert killed.returncode != 0
    assert f"Signal {signal.SIGKILL.value} (SIGKILL)" in killed.stderr  # torchrun's message
    if rank == 1:
        assert "same command again to go on" in words(killed.stderr)
    assert not (output / "config.json").exists()
    again = torchrun(inputs, output)
    assert again.returncode == 0, again.stderr
    assert "14 layers came from the interrupted run" in words(again.stdout)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (output, tmp_path / "whole")]
    assert weights[0] == weights[1]
