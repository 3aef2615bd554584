"""Does `fewbit plan` foresee what a run takes? Predicted against measured time and peak memory.

    python benchmarks/plan.py                         # SmolLM2-135M: dtypes, streams, more and longer sequences
    python benchmarks/plan.py --only bf16-fast llama  # some of the jobs; llama: random weights, 0.5 GB
    python benchmarks/plan.py --cpu-clock             # on a machine that others use too

Each estimate and each run is a process of its own with one thread, one right after the other. With --cpu-clock
both count the processor seconds of their thread instead of those on the wall, so that what other programs take
does not count. Goal: time within 30%, memory within 15%.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prepare
from streaming import random_llama

LLAMA = "llama"
# Name → (model or LLAMA, dtype, fast, sequences, tokens in each).
JOBS: dict[str, tuple[str, str, bool, int, int]] = {
    "bf16-fast": ("smollm2", "bfloat16", True, 32, 512),
    "bf16": ("smollm2", "bfloat16", False, 32, 512),
    "f32-fast": ("smollm2", "float32", True, 32, 512),
    "f32": ("smollm2", "float32", False, 32, 512),
    "bf16-fast-long": ("smollm2", "bfloat16", True, 32, 2048),
    "bf16-fast-many": ("smollm2", "bfloat16", True, 128, 512),
    "llama": (LLAMA, "bfloat16", True, 16, 512),
}


def start(cpu_clock: bool) -> None:
    """What both kinds of process do first."""
    import torch

    torch.set_num_threads(1)
    if cpu_clock:
        time.perf_counter = time.process_time


def arguments_of(model: str, text: str, options: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """What `estimate` and `quantize` are called with."""
    import fewbit

    # Random weights come without a tokenizer; token ids need none.
    ids = {"input_ids": [i * 7919 % 1000 for i in range(options["seq_len"])]}
    dataset: Any = text or [ids] * options["num_samples"]
    return model, fewbit.QuantConfig(group_size=64, **options), {"dataset": dataset}


def predict(model: str, text: str, options: dict[str, Any], output: str, cpu_clock: bool) -> dict[str, Any]:
    """The estimate, and the seconds that it took."""
    start(cpu_clock)
    from fewbit.estimate import estimate

    began = time.perf_counter()
    name, config, arguments = arguments_of(model, text, options)
    found = estimate(name, config, **arguments, output=output)
    return {**found.summary(), **found.details(), "took": time.perf_counter() - began}


def measure(model: str, text: str, options: dict[str, Any], output: str, cpu_clock: bool) -> dict[str, Any]:
    """What the run took."""
    start(cpu_clock)
    import fewbit

    name, config, arguments = arguments_of(model, text, options)
    report: Any = fewbit.quantize(name, config, **arguments, output=output)
    size = sum(path.stat().st_size for path in Path(output).iterdir())
    return {**report.summary(), "phases": report.seconds_by_phase, "size": size}


def child(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The result of `function` in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--cpu-clock", action="store_true")
    parser.add_argument("--phases", action="store_true", help="also print the phases of both")
    arguments = parser.parse_args()
    if any(JOBS[name][0] != LLAMA for name in arguments.only):
        prepare.ensure()
    print(
        f"{'job':16s} {'time predicted':>14s} {'measured':>9s} {'ratio':>6s} {'memory predicted':>17s} "
        f"{'measured':>9s} {'ratio':>6s} {'size':>6s} {'plan took':>10s}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only:
            model, dtype, fast, samples, length = JOBS[name]
            options = {"dtype": dtype, "fast": fast, "num_samples": samples, "seq_len": length}
            path, text = str(prepare.MODEL), str(prepare.TRAIN)
            if model == LLAMA:
                path, text = f"{folder}/weights", ""
                random_llama(Path(path), blocks=24, hidden=1024, intermediate=2816)
            job = (path, text, options, f"{folder}/{name}", arguments.cpu_clock)
            show(name, child(predict, *job), child(measure, *job), arguments.phases)


def show(name: str, predicted: dict[str, Any], measured: dict[str, Any], phases: bool) -> None:
    """One row."""
    seconds = predicted["seconds"], measured["seconds"]
    peaks = predicted["peak_memory_bytes"], measured["peak_memory_bytes"]
    print(
        f"{name:16s} {seconds[0]:12.1f} s {seconds[1]:7.1f} s {seconds[0] / seconds[1]:6.2f} "
        f"{peaks[0] / 1e6:14.0f} MB {peaks[1] / 1e6:6.0f} MB {peaks[0] / peaks[1]:6.2f} "
        f"{predicted['output_bytes'] / measured['size']:6.3f} {predicted['took']:8.1f} s",
        flush=True,
    )
    if phases:
        print(f"  predicted {predicted['seconds_by_phase']}\n  measured  {measured['phases']}")
        print(f"  memory    {predicted['memory']}", flush=True)


if __name__ == "__main__":
    main()
