"""The constants of loss-aware rounding, one changed at a time: KL divergence of the rescaled SmolLM2-135M at 3 bits.

    python benchmarks/prepare.py
    python benchmarks/loss_aware.py                       # hours on two cores: 9 settings, 5 to 10 minutes each
    python benchmarks/loss_aware.py --only "DAMP=0.1" "CHUNK=32"

Settings, tokens and evaluation are those of pareto.py, in float32. The first line is the baseline without feedback.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import accuracy
import pareto
import prepare

CHANGES = (
    "off",
    *("DAMP=0.01", "DAMP=0.1", "DAMP=0.3", "DAMP=1.0", "DAMP=3.0"),
    *("CHUNK=32", "LARGEST_BLOCK=64", "LARGEST_BLOCK=192"),
)


def quantize(job: accuracy.Job, change: str) -> dict[str, Any]:
    from fewbit.gptq import output_feedback

    if change == "off":
        return pareto.with_fewbit(job, pareto.Setting("fewbit", "default", "3"))
    name, value = change.split("=")
    old = getattr(output_feedback, name)
    setattr(output_feedback, name, type(old)(value))
    return pareto.with_fewbit(job, pareto.Setting("fewbit", f"default, {pareto.LOSS_AWARE}", "3"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME=VALUE", default=CHANGES)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=16)
    arguments = parser.parse_args()
    job = pareto.prepared_job(pareto.protocol_of(prepare.RESCALED.name, arguments.samples, arguments.windows))
    first: float | None = None
    for change in arguments.only:
        with TemporaryDirectory() as folder:
            one = replace(job, work=Path(folder))
            accuracy.in_child(quantize, one, change)
            found = accuracy.in_child(accuracy.score, one, accuracy.Cell("default", 0, 64, True, 0))
        wiki, austen = (found["texts"][text]["kl"] for text in ("wiki", "austen"))
        first = first or wiki
        print(f"{change}: KL {wiki:.4f} (× {wiki / first:.2f}), {austen:.4f}", flush=True)


if __name__ == "__main__":
    main()
