"""How far results differ by rounding alone: several processes, and one that sums in other orders.

    python benchmarks/rounding.py

The demo model, 32 × 128 tokens, 4 bits g64, float32: quantized by one process, by 2 to 5 ranks, and by one process that
adds its batches to every Hessian in another order. Scored on 64 × 128 other tokens against the original.
"""

from __future__ import annotations

import random
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ranks
import torch

import fewbit
from fewbit.evaluate import evaluate, windows
from fewbit.walk.hessians import HessianPool
from fewbit.walk.lockstep import Arrival


@contextmanager
def shuffled(seed: int) -> Iterator[None]:
    """While entered, the batches that enter a Hessian are added in an order of this seed."""
    in_order = HessianPool._sums

    def sums(
        self: Any, name: str, module: Any, arrivals: Sequence[Arrival], full: Mapping, **options: Any
    ) -> Any:
        count = len(self._batches)
        summed = [a for a in arrivals if a.job < count and self._batches[a.job].held_out == 0]
        others = [a for a in arrivals if a not in summed]
        random.Random(seed).shuffle(summed)
        entry = in_order(self, name, module, [*summed, *others], full, **options)
        entry.inputs = [(a.job, weakref.ref(a.x), a.x._version) for a in arrivals]
        return entry

    HessianPool._sums = sums
    try:
        yield
    finally:
        HessianPool._sums = in_order


def main() -> None:
    """Quantize and score."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    job = ranks.jobs(demo=True)
    ranks.RUNS.update({f"{count} ranks": (count, 1) for count in range(2, 6)})
    base = AutoModelForCausalLM.from_pretrained(job.model).eval()
    text = windows(str(job.test), AutoTokenizer.from_pretrained(job.model), job.seq_len, 64)

    def show(name: str, folder: Path, layers: Sequence[Mapping[str, Any]]) -> None:
        scores = evaluate(fewbit.load(folder, device="cpu"), text, against=base)
        error = sum(layer["true_error"] for layer in layers) / len(layers)
        print(
            f"{name:12s} perplexity {scores.perplexity:.2f}  KL {scores.kl:.4f}  mean true error {error:.2%}"
        )

    with tempfile.TemporaryDirectory() as folder:
        for name in ("1 process", *(f"{count} ranks" for count in range(2, 6))):
            output = Path(folder) / name
            show(name, output, ranks.run(name, job, output, ["--dtype", "float32"])["layers"])
        config = fewbit.QuantConfig(group_size=64, num_samples=job.samples, seq_len=job.seq_len)
        for seed in range(2):
            output = Path(folder) / str(seed)
            with shuffled(seed):
                report = fewbit.quantize(job.model, config, dataset=str(job.train), output=output)
            show(f"order {seed}", output, report.layers)


if __name__ == "__main__":
    main()
