"""Quantize a folder with GPTQModel on given token ids: one row of benchmarks/accuracy.py.

    GPTQMODEL-PYTHON benchmarks/gptqmodel_baseline.py MODEL TOKENS.json OUT --bits 4 --group-size 64

runs in an environment of its own (`python -m venv V && V/bin/pip install gptqmodel==7.7.0`; its torch and
fewbit's may differ) and imports nothing of fewbit. TOKENS.json holds a list of equally long lists of ids.
GPTQModel gets them as they are; what its processor prepares is compared with them, id by id, so that a
sequence that it drops, cuts, joins or reorders ends the run instead of passing for its result.

Everything that is not an option here is GPTQModel's default: damp 0.05, group-aware order, v1 format for
symmetric grids. Asymmetric grids are written in its v2 format, which stores zero points as they are: its
v1 writer cannot hold a zero point of 0.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

# Without it GPTQModel starts one worker on two cores, and its calibration needs two.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")


def same_tokens(prepared: list[dict[str, Any]], tokens: list[list[int]]) -> bool:
    """Whether prepared batches of one sequence are exactly `tokens`, in order and without masking."""
    rows = [batch["input_ids"].tolist() for batch in prepared]
    masked = sum(int((batch["attention_mask"] == 0).sum()) for batch in prepared)
    return rows == [[sequence] for sequence in tokens] and not masked


def quantize(arguments: argparse.Namespace, tokens: list[list[int]]) -> dict[str, Any]:
    """Load, quantize, save; what was used and how long it took."""
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    settings: dict[str, Any] = {"bits": arguments.bits, "group_size": arguments.group_size}
    settings["sym"] = not arguments.asym
    settings["format"] = "gptq_v2" if arguments.asym else "gptq"
    settings["mse"] = arguments.mse
    if arguments.desc_act:
        settings["desc_act"] = True
    if arguments.desc_act or arguments.group_size == -1:
        settings["act_group_aware"] = False  # it refuses its own default there
    torch.manual_seed(0)
    started = time.perf_counter()
    config = QuantizeConfig(**settings, offload_to_disk=False)
    model = GPTQModel.load(arguments.model, config, dtype=getattr(torch, arguments.dtype), device="cpu")
    calibration = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in tokens]
    if not same_tokens(model.prepare_dataset(calibration, batch_size=1), tokens):
        raise SystemExit("GPTQModel does not calibrate on the tokens it was given: no fair comparison")
    log = model.quantize(calibration, batch_size=1)
    used = {int(layer["samples"]) for layers in log.values() for layer in layers}
    if used != {sum(map(len, tokens))}:
        raise SystemExit(f"GPTQModel calibrated on {used} tokens per layer: no fair comparison")
    model.save(arguments.output)
    return {
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "tokens": sum(map(len, tokens)),
        "layers": sum(map(len, log.values())),
        "settings": settings,
    }


def main() -> None:
    """Read the ids, quantize, print one JSON line last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("tokens", type=Path)
    parser.add_argument("output")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--mse", type=float, default=0.0, help="its grid search; 2.4 is its usual value")
    parser.add_argument("--desc-act", action="store_true")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    arguments = parser.parse_args()
    print(json.dumps(quantize(arguments, json.loads(arguments.tokens.read_text()))))


if __name__ == "__main__":
    main()
