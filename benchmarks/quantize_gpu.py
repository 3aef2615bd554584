"""How long a model of Llama-3-8B's shape takes to quantize on a GPU, phase by phase, against the least it could take.

    python benchmarks/quantize_gpu.py --results quantize.json [--folder /mnt/disk] [--device cuda]
    python benchmarks/quantize_gpu.py --results quantize.json --into docs/gpu.md

Random weights and random tokens (time does not depend on them): from safetensors on disk to a finished checkpoint,
4 bits in groups of 128, 128 × 2048 tokens, with `--fast` (one stream) and with the defaults (two). The floor is
arithmetic alone at the rate of a large product measured in the same run: one forward pass, and the Hessians with
symmetric halves computed once and shared by layers of one input. Writing the random model is not counted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import performance_tables
import random_models
import torch
from machine_limits import check_device, cuda_clock, measure_gpu, measure_machine
from transformers import LlamaConfig

from fewbit.errors import FewbitError

EIGHT_BILLION = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
BATCH = 8
WANTED = 90  # seconds for the walk and the solver


def floor(config: LlamaConfig, tokens: int, seq_len: int) -> dict[str, float]:
    """Operations that cannot be avoided: of one forward pass through the blocks, and of the Hessians.

    A block has inputs of three kinds that its layers share: two of the hidden size beside that of o_proj, as wide, and
    one of the inner size. H = Σ x xᵀ is symmetric: tokens · n² operations, half of a product's.
    """
    hidden, inner, blocks = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    kv = hidden * config.num_key_value_heads // config.num_attention_heads
    weights = hidden * (2 * hidden + 2 * kv + 3 * inner)
    attention = 2 * seq_len * hidden  # scores and their use, causal: half of 4 · seq_len · hidden
    return {
        "forward": blocks * tokens * (2.0 * weights + attention),
        "Hessians": blocks * tokens * (3.0 * hidden**2 + inner**2),
    }


def quantize(
    model: str, output: str, device: str, samples: int, seq_len: int, vocabulary: int, fast: bool
) -> Any:
    """One run in this process: its report, and the largest use of the device's memory."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    import fewbit

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (samples, seq_len), generator=generator)
    dataset = [{"input_ids": row.tolist()} for row in tokens]
    # Few samples at a time would launch many small kernels; results differ by rounding only.
    config = fewbit.QuantConfig(num_samples=samples, seq_len=seq_len, batch_size=BATCH, fast=fast)
    report = fewbit.quantize(model, config, dataset=dataset, output=output, device=device)
    gpu = torch.cuda.max_memory_allocated() if device.startswith("cuda") else None
    return {"report": report.to_dict(), "gpu_bytes": gpu}


def _child(function: Any, *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _peak(device: str) -> dict[str, Any]:
    where = torch.device(device)
    machine = (
        measure_gpu(where, cuda_clock(where), (torch.bfloat16,))
        if where.type == "cuda"
        else measure_machine(1)
    )
    return {"name": machine.name, "peak": machine.peaks["bfloat16"]}


def measure(
    shape: dict[str, Any], folder: Path, device: str, samples: int, seq_len: int, *, alone: bool = True
) -> dict[str, Any]:
    """Write the model, quantize it both ways, and put together what it took.

    Args:
        alone: each run in a process of its own, so that peak memory is its own.
    """
    run = _child if alone else lambda function, *arguments: function(*arguments)
    config = LlamaConfig(**shape)
    random_models.write(config, folder / "model", None, 128)
    results: dict[str, Any] = {
        "machine": run(_peak, device),
        "floor": floor(config, samples * seq_len, seq_len),
        "tokens": [samples, seq_len],
        "model_bytes": sum(path.stat().st_size for path in (folder / "model").iterdir()),
        "runs": {},
    }
    for name, fast in (("--fast, one stream", True), ("defaults, two streams", False)):
        output = folder / f"out-{fast}"
        found = run(
            quantize, str(folder / "model"), str(output), device, samples, seq_len, config.vocab_size, fast
        )
        report = found["report"]
        results["runs"][name] = {
            "seconds": report["seconds"],
            "by_phase": report["seconds_by_phase"],
            "process_bytes": report["peak_memory_bytes"],
            "gpu_bytes": found["gpu_bytes"],
            "written_bytes": sum(path.stat().st_size for path in output.iterdir()),
        }
        shutil.rmtree(output)
    return results


def tables(results: dict[str, Any]) -> str:
    """Markdown: what it took, beside the floor."""
    machine, (samples, seq_len) = results["machine"], results["tokens"]
    seconds = {part: operations / machine["peak"] for part, operations in results["floor"].items()}
    parts = ", ".join(
        f"{part} {results['floor'][part] / 1e15:.1f} PFLOP, {took:.1f} s" for part, took in seconds.items()
    )
    lines = [
        f"{machine['name']}, {samples} × {seq_len} tokens, {results['model_bytes'] / 1e9:.1f} GB of weights. "
        f"Floor at {machine['peak'] / 1e12:.0f} TFLOP/s: {parts}; together {sum(seconds.values()):.1f} s.",
        "",
        "| | " + " | ".join(results["runs"]) + " |",
        "|---|" + "---|" * len(results["runs"]),
    ]
    runs = list(results["runs"].values())

    def row(name: str, cells: list[str]) -> None:
        lines.append(f"| {name} | {' | '.join(cells)} |")

    row("**all**", [f"**{run['seconds']:.1f} s**" for run in runs])
    walks = [run["by_phase"].get("walk", run["seconds"]) for run in runs]
    row(
        f"walk and solver (asked for: {WANTED} s)",
        [f"{walk:.1f} s, {walk / sum(seconds.values()):.1f} × the floor" for walk in walks],
    )
    for phase in dict.fromkeys(phase for run in runs for phase in run["by_phase"]):
        row(phase, [f"{run['by_phase'].get(phase, 0.0):.1f} s" for run in runs])
    row(
        "GPU memory, most",
        ["" if run["gpu_bytes"] is None else f"{run['gpu_bytes'] / 1e9:.1f} GB" for run in runs],
    )
    row("memory of the process, most", [f"{run['process_bytes'] / 1e9:.1f} GB" for run in runs])
    row("written", [f"{run['written_bytes'] / 1e9:.2f} GB" for run in runs])
    return "\n".join([*lines, "", "Phases inside others (Hessians, solving) are counted in those, too."])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True, help="JSON to write, or with --into to read")
    parser.add_argument("--into", type=Path, help="write the table into this document")
    parser.add_argument("--folder", type=Path, help="where to put the models for the time being: 25 GB")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a toy model, to see whether this script works")
    arguments = parser.parse_args()
    if arguments.into:
        performance_tables.put(arguments.into, "quantize", tables(json.loads(arguments.results.read_text())))
        return
    if arguments.device != "cpu":
        try:
            check_device(torch.device(arguments.device))
        except FewbitError as error:
            print(error, file=sys.stderr)
            raise SystemExit(2) from error
    shape, samples, seq_len = (TINY, 4, 32) if arguments.tiny else (EIGHT_BILLION, 128, 2048)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        results = measure(shape, Path(folder), arguments.device, samples, seq_len)
    arguments.results.write_text(json.dumps(results, indent=1))
    print(tables(results))


if __name__ == "__main__":
    main()
