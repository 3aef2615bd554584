"""Whole models on this CPU: tokens/s in prefill and decode, memory and load time, all in one run, taking turns.

    python benchmarks/decode_cpu.py --results decode.json [--threads 2] [--models smollm2,1b] [--only REGEX]
    python benchmarks/decode_cpu.py --results decode.json --table
    python benchmarks/decode_cpu.py --results decode.json --into docs/performance-measurements.md

Models have random weights of the true shapes (`random_models`), made once under --folder. Each runs in a process of its
own, all alive at once. transformers in bfloat16 is in every run, because ratios refer to it; --only chooses among the
others, and adds to the results.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import performance_tables
import prepare
import random_models
import torch

from fewbit.bench.models import Candidate, measure_models

BASE = "transformers bfloat16"
GROUP_SIZE = 64
FASTER = {"fuse": True, "lm_head_runtime": 8}
GPTQMODEL_WORKER = str(Path(__file__).with_name("gptqmodel_worker.py"))


def candidates(model: str, folder: Path, gptqmodel_python: str | None) -> dict[str, Candidate]:
    """Everything that could be measured of one model, by name."""
    dense = str(folder / f"{model}-dense")
    found = {BASE: Candidate(dense, "bfloat16"), "transformers float32": Candidate(dense, "float32")}
    for bits in (4, 3, 2, 8):
        path = str(folder / f"{model}-{bits}bit")
        for dtype in ("bfloat16", "float32"):
            note = "" if dtype == "bfloat16" else " float32"
            found[f"fewbit {bits} bits{note}"] = Candidate(path, dtype, "cpu")
            found[f"fewbit {bits} bits{note}, fused, 8-bit head"] = Candidate(path, dtype, "cpu", FASTER)
            found[f"fewbit {bits} bits{note} a8, fused, 8-bit head"] = Candidate(
                path, dtype, "cpu_a8", FASTER
            )
        if gptqmodel_python:
            command = (gptqmodel_python, GPTQMODEL_WORKER)
            found[f"GPTQModel {bits} bits"] = Candidate(path, "bfloat16", "auto", command=command)
    if gptqmodel_python:
        path = str(folder / f"{model}-4bit")
        command = (gptqmodel_python, GPTQMODEL_WORKER)
        found["GPTQModel 4 bits avx512"] = Candidate(
            path, "bfloat16", "gptq_torch_cpu_avx512", command=command
        )
    return found


def ensure_model(model: str, folder: Path, wanted: dict[str, Candidate]) -> None:
    """Write what is missing of the folders that are needed."""
    paths = {Path(candidate.model) for candidate in wanted.values()}
    missing = [path for path in paths if not (path / "config.json").exists()]
    if missing:
        prepare.ensure()
    for path in missing:
        config = random_models.config_of("1b" if model == "1b" else str(prepare.MODEL))
        bits = re.fullmatch(rf"{model}-(\d)bit", path.name)
        random_models.write(config, path, int(bits[1]) if bits else None, GROUP_SIZE)
        for file in prepare.MODEL.glob(
            "tokenizer*"
        ):  # GPTQModel does not load a folder without one; any will do
            shutil.copy(file, path)


def measure(model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Name → seconds per token (of the least disturbed round), load time, memory."""
    everything = candidates(model, arguments.folder, arguments.gptqmodel_python)
    wanted = {
        name: candidate
        for name, candidate in everything.items()
        if name == BASE or re.search(arguments.only, name)
    }
    ensure_model(model, arguments.folder, wanted)
    found, refused = measure_models(
        wanted,
        threads=arguments.threads,
        prefill_tokens=arguments.prefill,
        decode_tokens=arguments.decode,
        rounds=arguments.rounds,
        progress=lambda phase, done, total: print(
            f"\r{model}: {phase} {done}/{total}   ", end="", file=sys.stderr
        ),
    )
    for name, why in refused.items():
        print(f"\n{name}: {why}", file=sys.stderr)
    return {
        name: {
            "prefill": one.prefill.minimum,
            "prefill_median": one.prefill.median,
            "decode": one.decode.minimum,
            "decode_median": one.decode.median,
            "load_seconds": one.load_seconds,
            "memory_bytes": one.memory_bytes,
            "peak_bytes": one.peak_bytes,
            "kernels": one.kernels,
        }
        for name, one in found.items()
    }


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True, help="JSON to add to, or to read")
    parser.add_argument("--models", default="smollm2,1b", help="of smollm2, 1b")
    parser.add_argument("--only", default="", help="REGEX of names")
    parser.add_argument("--folder", type=Path, default=prepare.DATA / "random", help="where models are made")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prefill", type=int, default=512, help="tokens")
    parser.add_argument("--decode", type=int, default=32, help="tokens")
    parser.add_argument("--gptqmodel-python", help="python of an environment with GPTQModel")
    parser.add_argument(
        "--table", action="store_true", help="print the tables of docs/performance-measurements.md"
    )
    parser.add_argument("--into", type=Path, help="write the tables into this document")
    return parser.parse_args()


def main() -> None:
    arguments = options()
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {"models": {}}
    if arguments.into:
        performance_tables.put(arguments.into, "models", performance_tables.decode(results))
    if arguments.table:
        print(performance_tables.decode(results))
    if arguments.table or arguments.into:
        return
    results |= {"threads": arguments.threads, "prefill": arguments.prefill, "decode": arguments.decode}
    for model in arguments.models.split(","):
        results["models"].setdefault(model, {}).update(measure(model, arguments))
        arguments.results.write_text(json.dumps(results, indent=1))
    print("\n" + performance_tables.decode(results))


if __name__ == "__main__":
    main()
