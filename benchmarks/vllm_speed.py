"""vLLM on this CPU: its own 4-bit kernel against fewbit's plugin, in one run, taking turns.

    python benchmarks/vllm_speed.py --python V/bin/python [--threads 1] [--model smollm2 | 1b] [--rounds 5]

runs in fewbit's environment; V is vLLM's, with fewbit installed. The model has random weights of the true shapes, in
groups of 64. vLLM's own kernel takes 4 bits only. vLLM compiles the models, which takes a minute for each; --eager
saves that and is slower.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import prepare
import random_models

from fewbit.bench.models import Candidate, Result, measure_models

WORKER = str(Path(__file__).with_name("vllm_worker.py"))
GROUP_SIZE = 64
BASE = "vLLM's own, 4 bits"


def candidates(folder: Path, requests: int, arguments: argparse.Namespace) -> dict[str, Candidate]:
    """What is measured, by name."""

    def candidate(bits: int, method: str) -> Candidate:
        options = {"requests": requests, "enforce_eager": arguments.eager}
        command = (arguments.python, WORKER)
        return Candidate(str(folder / f"{bits}"), arguments.dtype, method, options, command=command)

    return {BASE: candidate(4, "gptq")} | {
        f"fewbit, {b} bits": candidate(b, "fewbit") for b in arguments.bits
    }


def table(results: dict[str, Result], requests: int) -> str:
    """Tokens/s, and how many times vLLM's own."""
    base = results[BASE]
    lines = [
        f"| | prompt, tokens/s | × own | {requests} × decode, tokens/s | × own | memory |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        prefill, decode = (
            base.prefill.median / result.prefill.median,
            base.decode.median / result.decode.median,
        )
        lines.append(
            f"| {name} | {1 / result.prefill.median:.0f} | {prefill:.2f} | {1 / result.decode.median:.1f} | "
            f"{decode:.2f} | {result.memory_bytes / 2**30:.2f} GiB |"
        )
    return "\n".join(lines)


def main() -> None:
    """Write the checkpoints, measure, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", required=True, help="of vLLM's environment")
    parser.add_argument("--model", default="smollm2", help="smollm2, 1b, or a folder with a config.json")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2, 8])
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    config = random_models.config_of(str(prepare.MODEL) if arguments.model == "smollm2" else arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        for bits in {4, *arguments.bits}:
            random_models.write(config, Path(folder) / f"{bits}", bits, GROUP_SIZE)
        for requests in arguments.requests:
            wanted = candidates(Path(folder), requests, arguments)
            results, refused = measure_models(wanted, threads=arguments.threads, rounds=arguments.rounds)
            print(table(results, requests), *refused.items(), sep="\n", flush=True)


if __name__ == "__main__":
    main()
