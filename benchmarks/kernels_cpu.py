"""Matrix products with quantized weights on this CPU: fewbit's kernels and those of other packages, in one run.

    python benchmarks/kernels_cpu.py --results kernels.json [--threads 2] [--only cpu,cpu_a8,Linear] [--shapes main]
    python benchmarks/kernels_cpu.py --results kernels.json --table
    python benchmarks/kernels_cpu.py --results kernels.json --into PAGE --plot docs/kernels.svg

--shapes takes sets of shapes (main, bits, small, sweep), Llama models (1b, 8b, 70b) and folders of checkpoints.
Candidates take turns, with cold caches (`layer_speed`). A later run with --only or other shapes adds to the results and
replaces what it measures again. GPTQModel's kernels run in an environment of their own (--gptqmodel-python); that
process also measures the bfloat16 Linear, and its ratios refer to this measurement. Packages that are not installed
are left out with a message.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import layer_speed
import performance_tables
import torch
from baselines import GPTQMODEL, all_baselines
from layer_speed import Candidate, Method, Shape
from machine_limits import measure_machine

from fewbit.checkpoint.reader import open_checkpoint

# (out, in): Llama-2-7B and -3-8B, then SmolLM2-135M.
MAIN = ((4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096))
SMALL = ((576, 576), (192, 576), (1536, 576), (576, 1536))
TOKEN_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


def shapes_called(name: str) -> list[tuple[Shape, tuple[int, ...]]]:
    """Shapes and numbers of tokens of one entry of --shapes."""
    tokens = (1, 4, 16, 512)
    if name == "main":
        return [(Shape(n, k, 4, g), tokens) for n, k in MAIN for g in (128, 32)]
    if name == "bits":
        return [(Shape(4096, 4096, bits, g), tokens) for bits in (2, 3, 8) for g in (128, 32)]
    if name == "small":
        return [(Shape(n, k, bits, 64), tokens) for n, k in SMALL for bits in (2, 3, 4, 8)]
    if name == "sweep":
        return [(Shape(4096, 4096, 4, 128), TOKEN_COUNTS)]
    if Path(name).is_dir():
        shapes = layer_speed.shapes_of(open_checkpoint(Path(name)).layers.values())
    else:
        shapes = layer_speed.llama_shapes(name, bits=4, group_size=128)
    return [(shape, tokens) for shape in shapes]


def candidates(arguments: argparse.Namespace) -> dict[str, Candidate]:
    """Every candidate, by name."""
    everything: dict[str, Candidate] = {
        "cpu": layer_speed.registered("cpu"),
        "cpu_a16": layer_speed.registered("cpu_a16"),
        "cpu_a8": layer_speed.registered("cpu_a8"),
        "float32 Linear": layer_speed.dense(torch.float32),
        "Linear": layer_speed.dense(torch.bfloat16),
        "torch operator": layer_speed.torch_operator,
        "dequantize": dequantize_every_time,
        **all_baselines(arguments.ggml_folder),
    }
    if arguments.only is None:
        return {name: found for name, found in everything.items() if name not in GPTQMODEL}
    unknown = set(arguments.only) - everything.keys()
    if unknown:
        raise SystemExit(f"no candidate {', '.join(unknown)}; there are {', '.join(everything)}")
    return {name: everything[name] for name in everything if name in arguments.only or name == "Linear"}


def dequantize_every_time(codes: Any, dtype: torch.dtype) -> layer_speed.Run:
    """Dequantize the whole weight to bfloat16 at every call, then multiply with oneDNN."""
    layer = layer_speed.registered("reference")(codes, dtype)
    return _Dequantizing(layer)


class _Dequantizing(torch.nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.layer.dequantize(x.dtype))


def measure(shape: Shape, tokens: tuple[int, ...], arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one shape, in plain JSON types: tokens → name → seconds (minimum, median), rounds and error."""
    found, refused = layer_speed.measure_shape(
        shape, tokens, candidates(arguments), method=Method(arguments.rounds, arguments.budget)
    )
    rows = {
        str(count): {
            name: {
                "minimum": one.times.minimum,
                "median": one.times.median,
                "rounds": len(one.times.seconds),
                "error": one.error,
            }
            for name, one in row.items()
        }
        for count, row in found.items()
    }
    return {"shape": asdict(shape), "nbytes": shape.nbytes, "tokens": rows, "refused": refused}


def measure_gptqmodel(
    shape: Shape, tokens: tuple[int, ...], arguments: argparse.Namespace
) -> dict[str, Any] | None:
    """Measure GPTQModel's kernels in its environment, with its own ``Linear`` under another name."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            arguments.gptqmodel_python, __file__, "--results", f"{folder}/found.json", "--only", ",".join(GPTQMODEL),
            "--threads", str(arguments.threads), "--rounds", str(arguments.rounds), "--budget", str(arguments.budget),
            "--one", json.dumps([asdict(shape), tokens]),
        ]  # fmt: skip
        source = str(Path(__file__).parents[1] / "src")
        environment = dict(os.environ, PYTHONPATH=source, GPTQMODEL_CPU_WORKERS="2")
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            print(f"  GPTQModel: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            return None
        found = json.loads(Path(folder, "found.json").read_text())["shapes"]
    one: dict[str, Any] = next(iter(found.values()))
    for row in one["tokens"].values():
        row["Linear (GPTQModel's torch)"] = row.pop("Linear")
    return one


def key(shape: Shape) -> str:
    """A name for a shape in the results."""
    return f"{shape.out_features}x{shape.in_features} {shape.bits} bits g{shape.group_size}"


def merge(results: dict[str, Any], name: str, found: dict[str, Any] | None) -> None:
    """Add one shape's measurements to the results."""
    if found is None:
        return
    kept = results["shapes"].setdefault(name, found | {"tokens": {}, "refused": {}})
    for tokens, row in found["tokens"].items():
        kept["tokens"].setdefault(tokens, {}).update(row)
    kept["refused"].update(found["refused"])


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True, help="JSON to add to, or to read")
    parser.add_argument("--only", type=lambda text: text.split(","), help="these candidates (and Linear)")
    parser.add_argument(
        "--shapes", default="main,bits,small,sweep", help="sets, models or checkpoints; see above"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=10.0, help="seconds per shape and number of tokens")
    parser.add_argument("--ggml-folder", type=Path, help="folder of libggml-base.so and libggml-cpu.so")
    parser.add_argument("--gptqmodel-python", help="python of an environment with GPTQModel")
    parser.add_argument(
        "--table", action="store_true", help="print the tables of docs/performance-measurements.md"
    )
    parser.add_argument("--into", type=Path, help="write the tables into this document")
    parser.add_argument("--plot", type=Path, help="write the sweep as SVG")
    return parser.parse_args()


def show(results: dict[str, Any], arguments: argparse.Namespace) -> None:
    """The tables on the screen or in a document, and the plot, which the document then shows."""
    tables = performance_tables.kernels(results)
    if arguments.plot:
        arguments.plot.write_text(performance_tables.sweep_svg(results))
        tables += f"\n\n![speed by number of tokens]({arguments.plot.name})"
    if arguments.into:
        performance_tables.put(arguments.into, "kernels", tables)
    if arguments.table:
        print(tables)


def best_of(known: dict[str, Any] | None, found: dict[str, Any]) -> dict[str, Any]:
    """The machine's limits: the best of all runs with the same number of threads."""
    if known is None or known["threads"] != found["threads"]:
        return found
    return {
        "threads": found["threads"],
        "read_bandwidth": max(known["read_bandwidth"], found["read_bandwidth"]),
        "peaks": {name: max(rate, known["peaks"].get(name, 0.0)) for name, rate in found["peaks"].items()},
    }


def main() -> None:
    arguments = options()
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {"shapes": {}}
    if arguments.table or arguments.into or arguments.plot:
        show(results, arguments)
        return
    torch.set_num_threads(arguments.threads)
    results["machine"] = best_of(results.get("machine"), asdict(measure_machine()))
    wanted = [entry for name in arguments.shapes.split(",") for entry in shapes_called(name)]
    if arguments.one:
        fields, tokens = json.loads(arguments.one)
        wanted = [(Shape(**fields), tuple(tokens))]
    for shape, tokens in wanted:
        found = measure(shape, tokens, arguments)
        merge(results, key(shape), found)
        if arguments.gptqmodel_python and arguments.only is None:
            merge(results, key(shape), measure_gptqmodel(shape, tokens, arguments))
        arguments.results.write_text(json.dumps(results, indent=1))
        print(performance_tables.shape_lines(key(shape), results), file=sys.stderr)


if __name__ == "__main__":
    main()
