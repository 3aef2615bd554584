"""One process against two: how much faster, and is it the same result?

    python benchmarks/ranks.py [--fast] [--dtype float32] [--threads]

SmolLM2-135M, 32 × 512 tokens of Wikipedia, 4 bits g64; each process with one thread. Seconds are the reports' (the
whole run but starting Python), CPU seconds those of all processes, less what it takes to start them. The weight files
of both are compared byte by byte, and so are their codes. With `--threads`, one process with two threads stands beside
two processes: inside a batch it sums in another order, one code turns, and all that the sweep decides after it in that
row. Perplexity: 16 × 512 tokens of other articles. `--demo`: the model that ships with fewbit, in seconds.

Needs two cores with nothing else on them; the load at the start of each run is printed. On a busy machine (or pinned
to one core: `taskset -c 0`) seconds say nothing, but CPU seconds do: with two cores the second run would take half of
its own. Expected: what `scale.two_processes` makes of the first run's phases.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prepare
from scale import two_processes

# Name → processes, threads of each.
RUNS = {"1 process": (1, 1), "2 processes": (2, 1), "1 process, 2 threads": (1, 2)}

# Of a Cholesky factorization on one core, float32 operations per second.
FACTOR_FLOPS = 40e9


@dataclass(frozen=True)
class Job:
    """A model, its calibration text with how much of it is used, and the text that judges."""

    model: Path
    train: Path
    test: Path
    samples: int
    seq_len: int


def run(name: str, job: Job, output: Path, options: list[str]) -> dict[str, Any]:
    """One whole run as a user starts it; its report, and the CPU seconds of all its processes."""
    processes, threads = RUNS[name]
    start = ["-m", "fewbit"]
    if processes > 1:
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *start]
    text = [
        "--dataset",
        job.train,
        "--num-samples",
        job.samples,
        "--seq-len",
        job.seq_len,
        "--group-size",
        "64",
    ]
    command = [sys.executable, *start, "quantize", job.model, "-o", output, "-q", *text, *options]
    load = os.getloadavg()[0]
    started = processes + (processes > 1)  # torchrun itself
    idle = cpu_seconds([sys.executable, "-c", "import fewbit.quantization, torch.distributed.run"], 1)
    cpu = cpu_seconds(command, threads) - started * idle
    return {**json.loads((output / "fewbit_report.json").read_text()), "cpu": cpu, "load": load}


def cpu_seconds(command: Sequence[object], threads: int) -> float:
    """Of a command and its children."""
    before = os.times()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([str(part) for part in command], check=True, env=environment)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def same_codes(one: Path, other: Path) -> float:
    """The share of codes that are the same in both checkpoints."""
    from fewbit.checkpoint.reader import open_checkpoint

    equal = total = 0
    first, second = open_checkpoint(one), open_checkpoint(other)
    for name in first.layers:
        codes, others = first.codes(name).codes, second.codes(name).codes
        equal, total = equal + int((codes == others).sum()), total + codes.numel()
    return equal / total


def same_files(one: Path, other: Path) -> bool:
    """Whether both checkpoints have the same weight files, byte by byte."""
    first, second = (
        {path.name: path.read_bytes() for path in folder.glob("*.safetensors")} for folder in (one, other)
    )
    return first == second


def perplexity(folder: Path, job: Job) -> float:
    """On the test text."""
    from transformers import AutoTokenizer

    import fewbit
    from fewbit.evaluation import evaluate, windows

    text = windows(str(job.test), AutoTokenizer.from_pretrained(folder), job.seq_len, 16)
    return evaluate(fewbit.load(folder, device="cpu"), text).perplexity


def jobs(demo: bool) -> Job:
    """SmolLM2, or the model inside the package."""
    if demo:
        from fewbit.demo import calibration_text, evaluation_text, model_path

        return Job(model_path(), calibration_text(), evaluation_text(), 32, 128)
    prepare.ensure()
    return Job(prepare.MODEL, prepare.TRAIN, prepare.TEST, 32, 512)


def main() -> None:
    """Run and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--fast", action="store_true", help="one stream, no correction")
    parser.add_argument("--threads", action="store_true", help="also one process with two threads")
    parser.add_argument("--demo", action="store_true", help="the model that ships with fewbit")
    arguments = parser.parse_args()
    job = jobs(arguments.demo)
    options = ["--dtype", arguments.dtype, *(["--fast"] if arguments.fast else [])]
    names = list(RUNS) if arguments.threads else list(RUNS)[:2]
    with tempfile.TemporaryDirectory() as folder:
        outputs = {name: Path(folder) / name for name in names}
        reports = {name: run(name, job, outputs[name], options) for name in names}
        print_runs(reports, outputs, job)


def print_runs(reports: dict[str, Any], outputs: dict[str, Path], job: Job) -> None:
    """A line for each run, and where the time of the first went."""
    first, alone = next(iter(reports.items()))
    print(f"{'':20s} seconds faster  walk  CPU s  peak MB  same files  same codes  perplexity  load")
    for name, report in reports.items():
        print(
            f"{name:20s} {report['seconds']:7.1f} {alone['seconds'] / report['seconds']:5.2f}×"
            f" {report['seconds_by_phase']['walk']:5.1f} {report['cpu']:6.1f}"
            f" {report['peak_memory_bytes'] / 1e6:8.0f}"
            f" {'yes' if same_files(outputs[first], outputs[name]) else 'no':>11s}"
            f" {same_codes(outputs[first], outputs[name]):11.1%}"
            f" {perplexity(outputs[name], job):11.4f}  {report['load']:4.1f}"
        )
    expected = two_processes(alone, FACTOR_FLOPS)
    print(f"expected of 2 processes: {expected:.1f} s, {alone['seconds'] / expected:.2f}× faster")
    for name, report in reports.items():
        phases = ", ".join(f"{phase} {value:.1f}" for phase, value in report["seconds_by_phase"].items())
        print(f"{name}: {phases}")


if __name__ == "__main__":
    main()
