"""One process against two: how much faster, and is it the same result?

    python benchmarks/ranks.py [--fast] [--dtype float32]

SmolLM2-135M, 32 × 512 tokens of Wikipedia, 4 bits g64; each process with one thread. Seconds are the reports' (the
whole run but starting Python). Codes depend on rounding: a sum taken in another order turns one code, and all that
the sweep decides after it in that row. So beside two processes stands one process with two threads, whose sums are
taken in another order too: as many codes differ there. Perplexity: 16 × 512 tokens of other articles.

Needs two cores with nothing else on them; the load at the start of each run is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import prepare

RUNS = {"1 process": (1, 1), "1 process, 2 threads": (1, 2), "2 processes": (2, 1)}


def run(name: str, output: Path, options: list[str]) -> dict[str, Any]:
    """One whole run as a user starts it; its report, and the CPU seconds of all its processes."""
    processes, threads = RUNS[name]
    start = ["-m", "fewbit"]
    if processes > 1:
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *start]
    text = ["--dataset", prepare.TRAIN, "--num-samples", "32", "--seq-len", "512", "--group-size", "64"]
    command = [sys.executable, *start, "quantize", prepare.MODEL, "-o", output, "-q", *text, *options]
    load = os.getloadavg()[0]
    before = os.times()
    subprocess.run(
        [str(part) for part in command], check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
    )
    after = os.times()
    report = json.loads((output / "fewbit_report.json").read_text())
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {**report, "cpu": cpu, "load": load}


def same_codes(one: Path, other: Path) -> float:
    """The share of codes that are the same in both checkpoints."""
    from fewbit.checkpoint.reader import open_checkpoint

    equal = total = 0
    with open_checkpoint(one) as first, open_checkpoint(other) as second:
        for name in first.layers:
            codes, others = first.codes(name).codes, second.codes(name).codes
            equal, total = equal + int((codes == others).sum()), total + codes.numel()
    return equal / total


def perplexity(folder: Path) -> float:
    """On the test articles."""
    from transformers import AutoTokenizer

    import fewbit
    from fewbit.evaluate import evaluate, windows

    text = windows(str(prepare.TEST), AutoTokenizer.from_pretrained(folder), 512, 16)
    return evaluate(fewbit.load(folder, device="cpu"), text).perplexity


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--fast", action="store_true", help="one stream, no correction")
    arguments = parser.parse_args()
    prepare.ensure()
    options = ["--dtype", arguments.dtype, *(["--fast"] if arguments.fast else [])]
    with tempfile.TemporaryDirectory() as folder:
        reports = {name: run(name, Path(folder) / name, options) for name in RUNS}
        first = "1 process"
        print(f"{arguments.dtype}, {'--fast' if arguments.fast else 'defaults'}")
        print(f"{'':22s} seconds  faster  walk  cpu s  peak MB  same codes  perplexity  load")
        for name, report in reports.items():
            output = Path(folder) / name
            print(
                f"{name:22s} {report['seconds']:7.1f} {reports[first]['seconds'] / report['seconds']:6.2f}×"
                f" {report['seconds_by_phase']['walk']:5.1f} {report['cpu']:6.1f}"
                f" {report['peak_memory_bytes'] / 1e6:8.0f}"
                f" {same_codes(Path(folder) / first, output):11.1%} {perplexity(output):11.4f}  {report['load']:4.1f}"
            )


if __name__ == "__main__":
    main()
