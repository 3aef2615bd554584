"""What distillation gains and costs: KL divergence and perplexity before and after, on text that it never saw.

    python benchmarks/distill.py                                  # the model in the package, minutes
    python benchmarks/distill.py --smollm2 --bits 3 --tokens 500000   # SmolLM2-135M: about an hour on two cores

Quantizes (groups of 64, symmetric, the defaults), distills the checkpoint, and prints for each evaluation text the KL
divergence and the perplexity of both, and their ratio. The time is a multiple of a plain forward pass of the original
over the same tokens, measured in the same run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from tune import Subject, subject

import fewbit
from fewbit.evaluation import Evaluation, evaluate, windows


def measure(which: Subject, folder: Path, count: int) -> dict[str, Evaluation]:
    """Score a checkpoint in float32 on every evaluation text, against the original in float32."""
    model = fewbit.load(folder, dtype=torch.float32, kernel="reference")
    base = AutoModelForCausalLM.from_pretrained(which.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(which.model)
    return {
        name: evaluate(model, windows(str(path), tokenizer, which.seq_len, count), against=base)
        for name, path in which.texts.items()
    }


def forward_seconds(which: Subject, tokens: int) -> float:
    """Seconds of a plain bfloat16 forward pass over `tokens` tokens, from a few windows."""
    model = AutoModelForCausalLM.from_pretrained(which.model, dtype=torch.bfloat16).eval()
    ids = torch.randint(5, 1000, (2, which.seq_len))
    with torch.inference_mode():
        model(ids)
        start = time.perf_counter()
        for _ in range(3):
            model(ids)
    return (time.perf_counter() - start) / (3 * ids.numel()) * tokens


def compare(
    which: Subject, bits: int, config: fewbit.DistillConfig, count: int, quantized: Path | None
) -> None:
    with tempfile.TemporaryDirectory() as work:
        folder = quantized or Path(work) / "quantized"
        if quantized is None:
            settings = fewbit.QuantConfig(
                bits=bits, group_size=64, num_samples=which.samples, seq_len=which.seq_len, dtype="float32"
            )
            fewbit.quantize(which.model, settings, dataset=str(which.calibration), output=folder)
        before = measure(which, folder, count)
        out = Path(work) / "distilled"
        start = time.perf_counter()

        def shown(phase: str, done: int, total: int) -> None:
            if done % 20 == 0:
                print(f"  step {done} of {total}, {time.perf_counter() - start:.0f} s", flush=True)

        result = fewbit.distill(folder, which.model, str(which.calibration), out, config, progress=shown)
        after = measure(which, out, count)
    plain = forward_seconds(which, result.tokens)
    print(
        f"{bits} bits: {result.tokens:,} tokens in {result.seconds:.0f} s, {result.seconds / plain:.1f} × a forward "
        "pass of the same tokens"
    )
    for point in result.curve:
        train = "—" if point.train is None else f"{point.train:.4f}"
        print(f"  {point.tokens:9,} tokens: training {train}, held out {point.held_out:.4f}")
    for name, one in before.items():
        other = after[name]
        print(
            f"  {name}: KL {one.kl:.4f} → {other.kl:.4f} (× {other.kl / one.kl:.3f}), "
            f"perplexity {one.perplexity:.2f} → {other.perplexity:.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smollm2", action="store_true")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--quantized", type=Path, help="distill this checkpoint instead of a new one")
    arguments = parser.parse_args()
    which = subject(arguments.smollm2)
    config = fewbit.DistillConfig(
        tokens=arguments.tokens,
        seq_len=which.seq_len,
        batch_size=arguments.batch_size,
        rate=arguments.rate,
        seed=arguments.seed,
    )
    for bits in arguments.bits:
        compare(which, bits, config, arguments.windows, arguments.quantized)


if __name__ == "__main__":
    main()
