"""Bits chosen per layer against the same bits everywhere, at the same stored size.

    python benchmarks/mixed_precision.py
    python benchmarks/mixed_precision.py --fast --uniform 3:64 --text benchmarks/data/austen.test.txt

SmolLM2-135M, bfloat16, 32 × 512 tokens of Wikipedia for calibration. For every uniform setting (bits:group size) one
run with it and one with `target_bits` at the stored bits per weight of the first. Perplexity and KL divergence from
the original on 16 × 512 tokens of other articles; the difference of the two KL values has a standard error of its
own, because both were measured on the same windows.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from typing import Any

import prepare
import torch

SAMPLES, SEQ_LEN, EVAL_WINDOWS = 32, 512, 16


def quantized(options: dict[str, Any]) -> tuple[Any, Any]:
    """A model quantized in memory, and its report."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import fewbit

    tokenizer = AutoTokenizer.from_pretrained(prepare.MODEL)
    model = AutoModelForCausalLM.from_pretrained(prepare.MODEL, dtype=torch.bfloat16).eval()
    config = fewbit.QuantConfig(num_samples=SAMPLES, seq_len=SEQ_LEN, **options)
    fewbit.quantize(model, config, dataset=str(prepare.TRAIN), tokenizer=tokenizer)
    return model, model.fewbit_report


def measure(model: Any, base: Any, text: torch.Tensor) -> list[dict[str, Any]]:
    """Scores window by window."""
    from fewbit.evaluation import evaluate

    return [evaluate(model, window[None], against=base).to_dict() for window in text]


def row(name: str, report: Any, scores: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of the table."""
    measuring = [phase["seconds"] for phase in report.phases if phase["name"] == "measure"]
    return {
        "name": name,
        "bits": report.bits_per_weight,
        "perplexity": math.exp(_mean([score["nll"] for score in scores])),
        "kl": [score["kl"] for score in scores],
        "seconds": report.seconds,
        "measure_seconds": sum(measuring),
        "layers": dict(Counter(f"{layer['bits']}g{layer['group_size']}" for layer in report.layers)),
    }


def show(uniform: dict[str, Any], mixed: dict[str, Any]) -> None:
    """Both lines and the ratio."""
    for line in (uniform, mixed):
        kl, error = _mean(line["kl"]), _error(line["kl"])
        print(
            f"{line['name']:16s} {line['bits']:6.3f} bits  perplexity {line['perplexity']:8.3f}  "
            f"KL {kl:.4f} ± {error:.4f}  {line['seconds']:6.1f} s, {line['measure_seconds']:.1f} of them measuring"
        )
    differences = [b - a for a, b in zip(uniform["kl"], mixed["kl"], strict=True)]
    ratio = _mean(mixed["kl"]) / _mean(uniform["kl"])
    print(f"{'':16s} KL ratio {ratio:.3f}, difference {_mean(differences):+.4f} ± {_error(differences):.4f}")
    print(f"{'':16s} {mixed['layers']}", flush=True)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _error(values: list[float]) -> float:
    mean = _mean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--uniform", nargs="+", default=["3:64", "4:128"], help="bits:group size")
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--text", default=str(prepare.TEST))
    arguments = parser.parse_args()
    prepare.ensure()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fewbit.evaluation import windows

    text = windows(
        arguments.text,
        AutoTokenizer.from_pretrained(prepare.MODEL),
        seq_len=SEQ_LEN,
        num_windows=EVAL_WINDOWS,
    )
    base = AutoModelForCausalLM.from_pretrained(prepare.MODEL, dtype=torch.bfloat16).eval()
    results = []
    for setting in arguments.uniform:
        bits, group_size = map(int, setting.split(":"))
        model, report = quantized({"fast": arguments.fast, "bits": bits, "group_size": group_size})
        uniform = row(f"{bits} bits g{group_size}", report, measure(model, base, text))
        target = math.ceil(1e4 * report.bits_per_weight) / 1e4
        model, report = quantized({"fast": arguments.fast, "target_bits": target})
        mixed = row(f"target {target}", report, measure(model, base, text))
        show(uniform, mixed)
        results += [uniform, mixed]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
