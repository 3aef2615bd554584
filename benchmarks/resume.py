"""What a kill costs: a run that is killed half way and resumed, against one that is left alone.

    python benchmarks/resume.py                                  # SmolLM2-135M, 32 × 512 tokens
    python benchmarks/resume.py --model src/fewbit/demo/model --text src/fewbit/demo/text/calibration.txt

Each run is a process of its own. The killed one gets SIGKILL as soon as half of the weights are quantized. "Replay"
is the time in which the resumed process gets from its start to the first layer that it has to solve: starting Python,
reading the text and the model, and the forward passes through the blocks that come from the journal.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import prepare

SAMPLES, SEQ_LEN = 32, 512


def work(arguments: argparse.Namespace) -> None:
    """In a process of its own: quantize, and print the share of weights that is done after every layer."""
    import fewbit

    config = fewbit.QuantConfig(
        num_samples=SAMPLES,
        seq_len=arguments.seq_len,
        group_size=64,
        dtype=arguments.dtype,
        fast=arguments.fast,
    )

    def progress(phase: str, done: int, total: int) -> None:
        if phase == "quantize":
            print(done / total, flush=True)

    fewbit.quantize(
        arguments.model, config, dataset=arguments.text, output=arguments.output, progress=progress
    )


def run(command: list[str], until: float = 2.0) -> list[tuple[float, float]]:
    """(seconds since the start, share of weights done) for every layer, and one for the end.

    The process is killed when the share reaches `until`.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    moments = []
    assert process.stdout is not None
    for line in process.stdout:
        moments.append((time.perf_counter() - start, float(line)))
        if moments[-1][1] >= until:
            os.kill(process.pid, signal.SIGKILL)
            break
    code = process.wait()
    if code != (-signal.SIGKILL if until <= 1 else 0):
        raise SystemExit(f"the run ended with {code}")
    return [*moments, (time.perf_counter() - start, moments[-1][1])]


def stored(output: Path) -> int:
    """The number of layers whose lines are in the journal."""
    lines = (output / ".fewbit" / "journal").read_text().splitlines()[1:]
    return sum(len(json.loads(line.split(" ", 1)[1])["layers"]) for line in lines)


def same_weights(a: Path, b: Path) -> bool:
    """Whether both folders hold the same weight files, byte for byte."""
    files = [{path.name: path.read_bytes() for path in out.glob("*.safetensors")} for out in (a, b)]
    return bool(files[0]) and files[0] == files[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(prepare.MODEL))
    parser.add_argument("--text", default=str(prepare.TRAIN))
    parser.add_argument("--seq-len", type=int, default=SEQ_LEN)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--output", help=argparse.SUPPRESS)  # given to the processes that do the work
    arguments = parser.parse_args()
    if arguments.output:
        work(arguments)
        return
    if arguments.model == str(prepare.MODEL):
        prepare.ensure()
    with tempfile.TemporaryDirectory() as folder:
        whole, out = Path(folder, "whole"), Path(folder, "out")
        command = [sys.executable, *sys.argv]
        alone = run([*command, "--output", str(whole)])
        killed = run([*command, "--output", str(out)], until=0.5)
        layers = stored(out)
        resumed = run([*command, "--output", str(out)])
        identical = same_weights(whole, out)
    # Layers from the journal are put in place one by one; the one after them is the first that is solved.
    replay = resumed[layers - 1][0] if layers else resumed[0][0]
    total = killed[-1][0] + resumed[-1][0]
    print(f"uninterrupted  {alone[-1][0]:7.1f} s")
    print(f"killed after   {killed[-1][0]:7.1f} s, with {layers} of {len(alone) - 1} layers in the journal")
    print(
        f"resumed        {resumed[-1][0]:7.1f} s, of which replay {replay:.1f} s ({replay / killed[-1][0]:.0%})"
    )
    print(f"total          {total:7.1f} s = {total / alone[-1][0]:.2f} × uninterrupted")
    print(f"same weights   {identical}")


if __name__ == "__main__":
    main()
