"""Matrix products with quantized weights on a GPU: fewbit's kernel, the 16-bit layer, torch's int4 operator, Marlin.

    python benchmarks/kernels_gpu.py --results kernels.json [--device cuda] [--shapes 1b,8b,70b]
    python benchmarks/kernels_gpu.py --results kernels.json --into docs/gpu.md

Candidates take turns, and caches are emptied before each call (`machine_limits`). Bandwidth is measured
with a large copy and the peak with a large product, in the same run. Marlin and Machete come from GPTQModel where it is
installed. Targets on 4096 × 14336: 75% of the copy bandwidth and 2.5 times the 16-bit layer at one token, twice at 16,
and 0.8 times at 2048.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import layer_speed
import performance_tables
import torch
from layer_speed import Candidate, Method, Shape
from machine_limits import check_device, cuda_clock, measure_gpu, measure_machine

from fewbit.bench.timing import seconds_per_call
from fewbit.errors import FewbitError

TOKENS = (1, 16, 64, 256, 2048)
GROUP = 128
LABELS = {
    "triton": "**fewbit** (`triton`)",
    "reference": "fewbit's reference kernel",
    "Linear": "16-bit Linear",
    "torch operator": "torch's int4 operator",
    "marlin": "Marlin, through GPTQModel",
    "machete": "Machete, through GPTQModel",
}
# Tokens → target speed of the largest layer of an 8B model, relative to the 16-bit layer.
WANTED = {1: 2.5, 16: 2.0, 2048: 0.8}


def shapes_called(names: list[str]) -> list[Shape]:
    """The layers of the models in 4 bits, and the widest layer of 8B in 2, 3 and 8 bits."""
    found = dict.fromkeys(shape for name in names for shape in layer_speed.llama_shapes(name, 4, GROUP))
    others = [Shape(4096, 14336, bits, GROUP) for bits in (2, 3, 8)] if "8b" in names else []
    return [*found, *others]


def candidates(dtype: torch.dtype, device: torch.device) -> dict[str, Candidate]:
    """Every candidate, by name; on a CPU, which only serves to test this script, fewbit's CPU kernel."""
    if device.type == "cpu":
        return {"cpu": layer_speed.registered("cpu"), "Linear": layer_speed.dense(dtype)}
    return {
        "triton": layer_speed.registered("triton"),
        "Linear": layer_speed.dense(dtype),
        "torch operator": layer_speed.torch_operator,
        "marlin": layer_speed.registered("marlin"),
        "machete": layer_speed.registered("machete"),
    }


def measure(
    shapes: list[Shape], tokens: tuple[int, ...], dtype: torch.dtype, device: torch.device, rounds: int
) -> dict[str, Any]:
    """Measure all shapes, in plain JSON types: the machine, and shape → tokens → name → seconds and error."""
    on_gpu = device.type == "cuda"
    clock = cuda_clock(device) if on_gpu else seconds_per_call
    machine = measure_gpu(device, clock) if on_gpu else measure_machine(rounds=1)
    results: dict[str, Any] = {
        "machine": asdict(machine),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {"torch": torch.__version__},
        "shapes": {},
    }
    for shape in shapes:
        method = Method(rounds=rounds, device=device, stopwatch=clock)
        found, refused = layer_speed.measure_shape(shape, tokens, candidates(dtype, device), dtype, method)
        name = f"{shape.out_features} × {shape.in_features}, {shape.bits} bits, groups of {shape.group_size}"
        results["shapes"][name] = {"shape": asdict(shape), "nbytes": shape.nbytes, "refused": refused, "tokens": {
            str(count): {who: {"seconds": one.times.minimum, "error": one.error} for who, one in row.items()}
            for count, row in found.items()
        }}  # fmt: skip
        print(name, "; ".join(f"{who}: {why}" for who, why in refused.items()), file=sys.stderr)
    return results


def tables(results: dict[str, Any]) -> str:
    """Markdown: the machine, and one table per shape."""
    machine, dtype = results["machine"], results["dtype"]
    parts = [
        f"{machine['name']}, torch {results['versions']['torch']}, {dtype}. Measured limits: a copy moves "
        f"{machine['read_bandwidth'] / 1e12:.2f} TB/s, a product reaches {machine['peaks'][dtype] / 1e12:.0f} TFLOP/s. "
        "Microseconds; in brackets, times as fast as the 16-bit layer."
    ]
    for name, found in results["shapes"].items():
        counts = sorted(found["tokens"], key=int)
        lines = [
            f"**{name}**",
            "",
            "| | " + " | ".join(f"{count} token{'s' if count != '1' else ''}" for count in counts)
            + " | of the bandwidth, 1 token | of the peak, most tokens | error |",
            "|---|" + "---|" * (len(counts) + 3),
        ]  # fmt: skip
        for who in found["tokens"][counts[0]]:
            lines.append(_row(who, found, counts, results))
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, _verdict(results)])


def _row(who: str, found: dict[str, Any], counts: list[str], results: dict[str, Any]) -> str:
    rows = found["tokens"]
    cells = []
    for count in counts:
        seconds, base = rows[count][who]["seconds"], rows[count]["Linear"]["seconds"]
        ratio = "" if who == "Linear" else f" ({base / seconds:.2f}×)"
        cells.append(f"{seconds * 1e6:.1f}{ratio}")
    machine, shape = results["machine"], Shape(**found["shape"])
    nbytes = 2 * shape.out_features * shape.in_features if who == "Linear" else found["nbytes"]
    most = counts[-1]
    rate = shape.operations(int(most)) / rows[most][who]["seconds"] / machine["peaks"][results["dtype"]]
    bandwidth = f"{nbytes / rows['1'][who]['seconds'] / machine['read_bandwidth']:.0%}" if "1" in rows else ""
    error = max(rows[count][who]["error"] for count in counts)
    return f"| {LABELS.get(who, who)} | {' | '.join(cells)} | {bandwidth} | {rate:.0%} | {error:.1e} |"


def _verdict(results: dict[str, Any]) -> str:
    """The targets on 4096 × 14336, and whether they are reached."""
    found = next(
        (f for name, f in results["shapes"].items() if name.startswith("4096 × 14336, 4 bits")), None
    )
    if found is None:
        return ""
    lines = ["Asked for on 4096 × 14336 at 4 bits:", ""]
    who = "triton" if "triton" in found["tokens"]["1"] else next(iter(found["tokens"]["1"]))
    share = found["nbytes"] / found["tokens"]["1"][who]["seconds"] / results["machine"]["read_bandwidth"]
    lines.append(
        f"- 1 token: 75% of the copy bandwidth; measured {share:.0%}{'' if share >= 0.75 else ', missed'}"
    )
    for tokens, wanted in WANTED.items():
        row = found["tokens"].get(str(tokens))
        if row:
            ratio = row["Linear"]["seconds"] / row[who]["seconds"]
            missed = "" if ratio >= wanted else ", missed"
            lines.append(f"- {tokens} tokens: {wanted}× the 16-bit layer; measured {ratio:.2f}×{missed}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True, help="JSON to write, or with --into to read")
    parser.add_argument("--into", type=Path, help="write the tables into this document")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--shapes", default="1b,8b,70b")
    parser.add_argument("--dtype", default="bfloat16", choices=["float16", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.into:
        performance_tables.put(arguments.into, "kernels", tables(json.loads(arguments.results.read_text())))
        return
    try:
        if arguments.device.type != "cpu":
            check_device(arguments.device)
        shapes = shapes_called(arguments.shapes.split(","))
    except FewbitError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error
    results = measure(shapes, TOKENS, getattr(torch, arguments.dtype), arguments.device, arguments.rounds)
    arguments.results.write_text(json.dumps(results, indent=1))
    print(tables(results))


if __name__ == "__main__":
    main()
