"""How long quantization takes, against one plain forward pass over the same tokens in the same run.

    python benchmarks/quantize_cpu.py --dtype bfloat16 --bits 4 --group-size 64

SmolLM2-135M, 32 × 512 tokens of Wikipedia; once with `--fast` (one stream) and once with the defaults (the
full-precision path beside the quantized one: two forward passes at least). The whole quantization is counted:
reading the text and the model, hashing the weights, calibration forward, Hessians, solving, writing and syncing
the checkpoint. Every part runs in a process of its own, so that peak memory is its own. Quality:
`benchmarks/accuracy.py`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time

import prepare

SAMPLES, SEQ_LEN = 32, 512


def plain_forward(dtype: str) -> dict[str, float]:
    """Seconds of one forward pass over the calibration tokens, with and without the output embedding."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fewbit.calibration import prepare as calibrate

    tokenizer = AutoTokenizer.from_pretrained(prepare.MODEL)
    model = AutoModelForCausalLM.from_pretrained(prepare.MODEL, dtype=getattr(torch, dtype)).eval()
    batches = calibrate(str(prepare.TRAIN), tokenizer, num_samples=SAMPLES, seq_len=SEQ_LEN).batches
    seconds = {}
    with torch.no_grad():
        for name, forward in (("body", model.model), ("whole", model)):
            forward(**batches[0], use_cache=False)
            start = time.perf_counter()
            for batch in batches:
                forward(**batch, use_cache=False)
            seconds[name] = time.perf_counter() - start
    return seconds


def quantize(output: str, options: dict) -> dict:
    """One run of the public API; its report. Importing libraries is not counted, here as in the forward pass."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    import fewbit
    import fewbit.quantization

    config = fewbit.QuantConfig(num_samples=SAMPLES, seq_len=SEQ_LEN, **options)
    return fewbit.quantize(prepare.MODEL, config, dataset=str(prepare.TRAIN), output=output).to_dict()


def _child(function, *arguments):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--repeat", type=int, default=1, help="times the job is timed")
    arguments = parser.parse_args()
    prepare.ensure()
    options = {
        "bits": arguments.bits,
        "group_size": arguments.group_size,
        "sym": not arguments.asym,
        "dtype": arguments.dtype,
    }
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(arguments.repeat):
            forward = _child(plain_forward, arguments.dtype)
            print(
                f"\n{arguments.dtype} forward pass: {forward['whole']:.1f} s whole model, {forward['body']:.1f} s "
                "without the head"
            )
            for name, fast in (("--fast", True), ("defaults", False)):
                report = _child(quantize, f"{folder}/{fast}{turn}", {**options, "fast": fast})
                print_times(name, forward, report)


def print_times(name: str, forward: dict[str, float], report: dict) -> None:
    """The ratio and where the time went."""
    total = report["seconds"]
    print(f"\n{name}: {total:.1f} s, peak {report['peak_memory_bytes'] / 1e9:.2f} GB")
    print(
        f"ratio: {total / forward['whole']:.2f} × the whole forward, {total / forward['body']:.2f} × without the head"
    )
    phases = dict(report["seconds_by_phase"])
    inside = sum(phases.get(phase, 0.0) for phase in ("hessian", "solve", "pack", "journal", "resume"))
    phases["forward in the walk"] = phases.pop("walk") - inside
    for phase, seconds in sorted(phases.items(), key=lambda item: -item[1]):
        print(f"  {phase:20s} {seconds:6.1f} s  {seconds / total:5.1%}")


if __name__ == "__main__":
    main()
