"""A model shaped like Llama 3.1 8B, from end to end: forecast, memory, time, a kill, and generated tokens.

    python benchmarks/eight_billion.py --folder /a/disk/with/60/GB
    python benchmarks/eight_billion.py --folder F --blocks 4 --kill  # a run that is killed half way, and another

Random weights (16 GB of safetensors, written block by block and kept in the folder), 4 bits, groups of 128, 8 × 512
tokens, the defaults otherwise. Every step is a process of its own. With --kill a second run is killed after half of the
blocks and resumed, and its files are compared with those of the first: use few blocks, because both runs are needed.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import shutil
import time
from pathlib import Path
from typing import Any

from streaming import in_child, peak, random_llama

SAMPLES, SEQ_LEN, GROUP_SIZE, NEW_TOKENS = 8, 512, 128, 20
SHAPE = {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
}


def settings() -> dict[str, Any]:
    """What `fewbit.plan` and `fewbit.quantize` are called with."""
    ids = [{"input_ids": [(row * 31 + i * 7919) % 128_000 for i in range(SEQ_LEN)]} for row in range(SAMPLES)]
    shape = {"bits": 4, "group_size": GROUP_SIZE, "num_samples": SAMPLES, "seq_len": SEQ_LEN}
    return {"config": shape, "dataset": ids}


def forecast(model: Path) -> dict[str, Any]:
    import fewbit

    start = time.perf_counter()
    found = fewbit.plan(model, **settings())
    return {**found.summary(), **found.details(), "took": time.perf_counter() - start}


def quantize(model: Path, output: Path) -> dict[str, Any]:
    import fewbit

    report = fewbit.quantize(model, **settings(), output=output, progress=False)
    return {**report.to_dict(), "peak": peak()}


def generate(output: Path) -> dict[str, Any]:
    """Load the result and generate; token ids, because there is no tokenizer."""
    import torch

    import fewbit

    start = time.perf_counter()
    model = fewbit.load(output)
    loaded = time.perf_counter()
    prompt = torch.arange(32)[None]
    ids = model.generate(prompt, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    return {
        "tokens": ids.shape[1] - prompt.shape[1],
        "load": loaded - start,
        "generate": time.perf_counter() - loaded,
        "peak": peak(),
    }


def killed(model: Path, output: Path, blocks: int) -> None:
    """Start a run, and kill it as soon as half of the blocks are in its journal."""
    process = multiprocessing.get_context("spawn").Process(target=quantize, args=(model, output))
    process.start()
    while process.is_alive() and len(list(output.glob(".fewbit/block-*"))) < blocks // 2:
        time.sleep(0.5)
    process.kill()
    process.join()


def digests(folder: Path) -> dict[str, str]:
    """Hashes of the weight files."""
    return {
        path.name: hashlib.file_digest(path.open("rb"), "sha256").hexdigest()
        for path in sorted(folder.glob("*.safetensors"))
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--kill", action="store_true", help="only compare a killed run with another one")
    arguments = parser.parse_args()
    model, output = arguments.folder / f"model-{arguments.blocks}", arguments.folder / "out"
    if not (model / "model.safetensors.index.json").exists():
        shutil.rmtree(model, ignore_errors=True)
        size = in_child(_write, model, arguments.blocks)
        print(f"{size / 1e9:.1f} GB of random weights written", flush=True)
    for folder in (output, arguments.folder / "killed"):
        shutil.rmtree(folder, ignore_errors=True)
    if not arguments.kill:
        plan = in_child(forecast, model)
        memory = plan["peak_memory_bytes"]
        print(f"forecast in {plan['took']:.0f} s: {plan['seconds']:.0f} s, {memory / 1e9:.2f} GB", flush=True)
        print(
            "  " + ", ".join(f"{phase} {seconds:.0f}" for phase, seconds in plan["seconds_by_phase"].items())
        )
        print("  " + ", ".join(f"{part} {value}" for part, value in plan["memory"].items()), flush=True)
    report = in_child(quantize, model, output)
    print(f"quantized in {report['seconds']:.0f} s, peak {report['peak'] / 1e9:.2f} GB", flush=True)
    for phase, seconds in sorted(report["seconds_by_phase"].items(), key=lambda item: -item[1]):
        print(f"  {phase:12s} {seconds:7.1f} s")
    if arguments.kill:
        other = arguments.folder / "killed"
        killed(model, other, arguments.blocks)
        again = in_child(quantize, model, other)
        same = digests(other) == digests(output)
        print(f"killed and resumed: {again['resumed_layers']} layers kept, the same bytes: {same}")
        return
    print(
        f"forecast / measured: memory {memory / report['peak']:.2f}, time {plan['seconds'] / report['seconds']:.2f}"
    )
    found = in_child(generate, output)
    print(
        f"loaded in {found['load']:.1f} s, {found['tokens']} tokens in {found['generate']:.1f} s, peak "
        f"{found['peak'] / 1e9:.2f} GB"
    )


def _write(model: Path, blocks: int) -> int:
    return random_llama(model, blocks, hidden=4096, intermediate=14336, **SHAPE)


if __name__ == "__main__":
    main()
