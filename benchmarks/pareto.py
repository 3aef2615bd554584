"""KL divergence against size: fewbit's presets beside other tools, on one model and the same evaluation tokens.

    python benchmarks/prepare.py
    python benchmarks/pareto.py --tools fewbit gguf
    python benchmarks/pareto.py --tools gptqmodel --gptqmodel-python V/bin/python
    python benchmarks/pareto.py --chart docs/pareto.svg --table docs/accuracy.md
    python benchmarks/pareto.py --model smollm2 --samples 64 --only 'fewbit/best, 300000/3'

A point is a tool, a setting and a size. Each is quantized in a process of its own, on the calibration tokens that
fewbit draws, and its dequantized weights are scored in float32 by fewbit.evaluation. Size is the mean number of stored
bits of a weight of the decoder's linear layers: embeddings and output layer stay as they are, for every tool. The
model is SmolLM2-135M with rescaled features (prepare.py): its own weights come from a GGUF file, and lie on a grid that
GGUF types find again. The last command measures one point on the model itself, with more training. Points are appended
to benchmarks/results/pareto.jsonl at once, and what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import accuracy
import pareto_chart
import prepare

RESULTS = Path(__file__).with_name("results") / "pareto.jsonl"
GROUP_SIZE = 64
DISTILL_TOKENS = 100_000  # a fifth of the default, to end within half an hour a point
ASYMMETRIC = "asymmetric, 32"  # the defaults with the kind of grid that most GGUF types have
# Modes with options: --loss-aware; --rotate, whose output layer no longer shares its matrix with the embeddings; and
# --distill. A number at the end is that of the tokens to distill on.
LOSS_AWARE, ROTATED, DISTILLED = "loss-aware", "rotated", "distilled"
GGUF_TYPES = (
    *("Q2_K", "Q3_K", "Q4_0", "Q4_K", "Q5_0", "Q5_K", "Q6_K", "Q8_0"),
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
)


@dataclass(frozen=True)
class Setting:
    """A point of the chart before it is measured.

    Attributes:
        tool: "fewbit", "gguf", "gptqmodel" and so on.
        mode: how the tool is used, for example a preset.
        size: bits, a budget of bits, or the name of a type.
    """

    tool: str
    mode: str
    size: str


def settings(tools: list[str]) -> Iterator[Setting]:
    for tool in tools:
        if tool == "gguf":
            yield from (Setting(tool, "imatrix", name) for name in GGUF_TYPES)
        elif tool == "gptqmodel":
            yield from (
                Setting(tool, mode, bits) for mode in ("default", "mse") for bits in ("2", "3", "4", "8")
            )
        else:
            for mode in ("fast", "default", "best"):
                yield from (Setting(tool, mode, size) for size in ("8", "4", "3", "2", "3.5", "2.5"))
            for mode in ("default", "best", ASYMMETRIC):
                yield from (Setting(tool, f"{mode}, {ROTATED}", size) for size in ("4", "3", "2"))
            for more in ("", f", {ROTATED}", f", {DISTILLED}", f", {ROTATED}, {DISTILLED}"):
                yield from (Setting(tool, f"default, {LOSS_AWARE}{more}", size) for size in ("4", "3", "2"))
            for mode in (ASYMMETRIC, f"{ASYMMETRIC}, {LOSS_AWARE}, {ROTATED}", f"best, {LOSS_AWARE}"):
                yield from (Setting(tool, mode, size) for size in ("4", "3", "2"))


# Each of these leaves a model in job.output and returns facts, among them the bits of a weight.


def with_fewbit(job: accuracy.Job, one: Setting) -> dict[str, Any]:
    import fewbit

    protocol, options = job.protocol, one.mode.split(", ")
    asymmetric = one.mode.startswith(ASYMMETRIC)
    trains = "best" in options or DISTILLED in options
    size: dict[str, Any] = {"target_bits": float(one.size)} if "." in one.size else {"bits": int(one.size)}
    config = fewbit.QuantConfig(
        **size,
        quality="default" if asymmetric else options[0],
        sym=not asymmetric,
        group_size=32 if asymmetric else GROUP_SIZE,
        loss_aware=LOSS_AWARE in options,
        rotate=ROTATED in options,
        num_samples=protocol.samples,
        seq_len=protocol.seq_len,
        # Training takes hours in float32, and gains nothing from it.
        dtype="bfloat16" if trains else protocol.dtype,
        distill_tokens=int(options[-1]) if options[-1].isdigit() and trains else DISTILL_TOKENS,
        **({"distill": True} if DISTILLED in options else {}),
    )
    report = fewbit.quantize(job.model, config, dataset=str(job.calibration), output=job.output)
    return {"bits": report.bits_per_weight, "seconds": report.seconds}


def with_gguf(job: accuracy.Job, one: Setting) -> dict[str, Any]:
    import torch
    from ggml_types import Ggml, importance_matrix
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).eval()
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    ]
    start = time.perf_counter()
    importance = importance_matrix(model, layers, accuracy.calibration_batches(job, 0))
    ggml, stored, weights = Ggml(job.ggml_folder), 0, 0
    for name in layers:
        weight = model.get_submodule(name).weight
        rounded, nbytes = ggml.round_trip(weight.detach(), one.size, importance[name])
        weight.data.copy_(rounded)
        stored, weights = stored + nbytes, weights + weight.numel()
    seconds = time.perf_counter() - start
    model.save_pretrained(job.output)
    return {"bits": 8 * stored / weights, "seconds": seconds}


def with_gptqmodel(job: accuracy.Job, one: Setting) -> dict[str, Any]:
    import fewbit

    row = {"default": "gptqmodel", "mse": "gptqmodel-mse"}[one.mode]
    cell = accuracy.Cell(row, int(one.size), GROUP_SIZE, True, 0)
    found = accuracy.quantize_with_gptqmodel(job, cell)
    return found if "error" in found else found | {"bits": fewbit.inspect(job.output).bits_per_weight}


TOOLS: dict[str, Callable[[accuracy.Job, Setting], dict[str, Any]]] = {
    "fewbit": with_fewbit,
    "gguf": with_gguf,
    "gptqmodel": with_gptqmodel,
}


def measure(job: accuracy.Job, one: Setting, keep: Path | None) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        job = replace(job, work=Path(folder) if keep is None else keep / f"{one.tool}-{one.mode}-{one.size}")
        found = accuracy.in_child(TOOLS[one.tool], job, one)
        row = "plain" if one.tool == "gguf" else "default"  # a dense model, or a checkpoint that fewbit reads
        cell = accuracy.Cell(row, 0, GROUP_SIZE, True, 0)
        return found if "error" in found else found | accuracy.in_child(accuracy.score, job, cell)


def prepared_job(
    protocol: accuracy.Protocol, gptqmodel_python: Path | None = None, ggml_folder: Path | None = None
) -> accuracy.Job:
    """What all points of a protocol share; the original's logits are computed if they are missing."""
    texts = (prepare.TEST, prepare.AUSTEN_TEST)
    model = prepare.DATA / protocol.model
    job = accuracy.Job(
        protocol, model, prepare.TRAIN, texts, gptqmodel_python, say=False, ggml_folder=ggml_folder
    )
    if not all(job.logits(text).exists() for text in texts):
        accuracy.in_child(accuracy.score_original, job)
    return job


def protocol_of(model: str, samples: int, windows: int) -> accuracy.Protocol:
    return accuracy.Protocol(model, "wiki", "wiki, austen", samples, 512, windows, "float32")


def key(record: dict[str, Any]) -> tuple[str, ...]:
    """Tool, mode and size."""
    return tuple(record["setting"].values())


def draw(chart: Path, table: Path | None, protocol: accuracy.Protocol) -> None:
    """Draw the points of the chart that were measured under this protocol."""
    chosen = {tuple(asdict(one).values()) for one in settings(list(TOOLS))}
    records = [
        record for record in read() if record["protocol"] == asdict(protocol) and key(record) in chosen
    ]
    pareto_chart.write(chart, records)
    if table:
        pareto_chart.write_table(table, records)


def read() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS))
    parser.add_argument("--only", metavar="TOOL/MODE/SIZE", help="a single point, of the chart or not")
    parser.add_argument(
        "--model", choices=(prepare.RESCALED.name, prepare.MODEL.name), default=prepare.RESCALED.name
    )
    parser.add_argument("--gptqmodel-python", type=Path)
    parser.add_argument(
        "--ggml-folder", type=Path, help="folder of libggml-base.so, without llama-cpp-python"
    )
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the quantized models here")
    parser.add_argument("--chart", type=Path, metavar="FILE.svg", help="only draw what was measured")
    parser.add_argument(
        "--table", type=Path, metavar="PAGE.md", help="with --chart: also list the points there"
    )
    arguments = parser.parse_args()
    protocol = protocol_of(arguments.model, arguments.samples, arguments.windows)
    if arguments.chart:
        draw(arguments.chart, arguments.table, protocol)
        return
    only = settings(arguments.tools)
    if arguments.only:
        parts = arguments.only.split("/")
        if len(parts) != 3 or parts[0] not in TOOLS:
            parser.error(f"--only takes TOOL/MODE/SIZE, with a tool of {', '.join(TOOLS)}")
        only = iter([Setting(*parts)])
    job = prepared_job(protocol, arguments.gptqmodel_python, arguments.ggml_folder)
    RESULTS.parent.mkdir(exist_ok=True)
    done = {key(record) for record in read() if record["protocol"] == asdict(protocol)}
    for one in only:
        if tuple(asdict(one).values()) in done:
            continue
        found = measure(job, one, arguments.keep)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"protocol": asdict(protocol), "setting": asdict(one), **found}) + "\n")
        kl = {text: score["kl"] for text, score in found.get("texts", {}).items()}
        print(
            f"{one.tool}/{one.mode}/{one.size}: {found.get('bits')} bits per weight, KL {kl or found['error']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
