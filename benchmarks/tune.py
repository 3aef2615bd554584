"""What tuning gains and costs: the same run without and with it, at 2 and 3 bits.

    python benchmarks/tune.py                 # the model in the package, 1.8M parameters
    python benchmarks/tune.py --smollm2       # SmolLM2-135M, bfloat16: an hour on two cores
    python benchmarks/tune.py --smollm2 --bits 2 --steps 60

Prints, for every bit width, perplexity, KL divergence from the original and seconds of both runs, the share of blocks
that tuning improved, and the ratio of the KL divergences. The evaluation texts are not the calibration text.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prepare
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fewbit
from fewbit import demo
from fewbit.evaluation import Evaluation, evaluate, windows


@dataclass(frozen=True)
class Subject:
    """A model with its texts: calibration, and name → evaluation text."""

    model: Path
    calibration: Path
    texts: dict[str, Path]
    seq_len: int
    samples: int


def subject(smollm2: bool) -> Subject:
    if not smollm2:
        return Subject(
            demo.model_path(), demo.calibration_text(), {"austen": demo.evaluation_text()}, 256, 64
        )
    prepare.ensure()
    texts = {"wiki": prepare.TEST} | ({"austen": prepare.AUSTEN_TEST} if prepare.ensure_austen() else {})
    return Subject(prepare.MODEL, prepare.TRAIN, texts, 512, 32)


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()


def quantized(which: Subject, **options: Any) -> Any:
    """The model quantized in memory; its report is `model.fewbit_report`."""
    model, tokenizer = load(which.model), AutoTokenizer.from_pretrained(which.model)
    config = fewbit.QuantConfig(group_size=64, num_samples=which.samples, seq_len=which.seq_len, **options)
    return fewbit.quantize(model, config, dataset=str(which.calibration), tokenizer=tokenizer)


def measure(which: Subject, model: Any, count: int) -> dict[str, Evaluation]:
    base, tokenizer = load(which.model), AutoTokenizer.from_pretrained(which.model)
    return {
        name: evaluate(model, windows(str(path), tokenizer, which.seq_len, count), against=base)
        for name, path in which.texts.items()
    }


def compare(which: Subject, bits: int, sym: bool, steps: int, count: int) -> None:
    print(f"{bits} bits, groups of 64, {'symmetric' if sym else 'asymmetric'}")
    kl: dict[str, list[float]] = {name: [] for name in which.texts}
    for tune in (False, True):
        model = quantized(which, bits=bits, sym=sym, tune=tune, tune_steps=steps)
        report = model.fewbit_report
        line = f"  {'tuned' if tune else 'untuned':8s}{report.seconds:7.0f} s"
        for name, score in measure(which, model, count).items():
            kl[name].append(score.kl or 0.0)
            line += f"   {name}: perplexity {score.perplexity:.2f}, KL {score.kl:.4f} ± {score.kl_stderr:.4f}"
        print(line, flush=True)
    blocks = {layer["block"]: layer["tuned"] for layer in report.layers}
    ratios = ", ".join(f"{name} {after / before:.2f}" for name, (before, after) in kl.items())
    print(
        f"  KL tuned / untuned: {ratios}; {sum(blocks.values())} of {len(blocks)} blocks improved", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smollm2", action="store_true")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--windows", type=int, default=16)
    arguments = parser.parse_args()
    for bits in arguments.bits:
        # Two bits leave no level over for a zero in the middle: asymmetric, as anybody would.
        compare(subject(arguments.smollm2), bits, bits > 2, arguments.steps, arguments.windows)


if __name__ == "__main__":
    main()
