"""``fewbit inspect``: what a checkpoint is, what can run it here, and which engines load it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .. import formatting
from ..errors import CheckpointError
from .display import NO, engine_reasons, engine_table, examples, plain, quiet_libraries
from .options import AsJson, Engines

if TYPE_CHECKING:
    from ..checkpoint.reader import Checkpoint, LayerSpec
    from ..engines import Contents


@examples(
    "fewbit inspect out",
    "fewbit inspect out --for vllm --for onnxruntime",
    "fewbit inspect out --json",
)
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a GPTQ checkpoint, from any tool.")],
    for_: Engines = None,
    as_json: AsJson = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="List every layer.")] = False,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="Print nothing: is it a checkpoint that can be opened?")
    ] = False,
) -> None:
    """Show bits, groups, format, sizes and origin of a checkpoint, and which kernels here can run it.

    Reads headers only; `fewbit verify` checks the contents. Exit code 1 if an engine named by --for cannot load it.
    """
    from ..checkpoint.reader import open_checkpoint
    from ..engines import of_checkpoint

    opened = open_checkpoint(checkpoint)
    if quiet and not as_json and not for_:
        return
    quiet_libraries()
    kinds = _kinds(opened)
    contents = of_checkpoint(opened, kinds)
    answers = engine_reasons(contents)
    if as_json:
        counts = Counter(kinds.get(name, "unknown") for name in opened.layers)
        found = {"kinds": dict(counts), "kernels": _kernels(opened, contents), "readers": answers}
        print(json.dumps(_facts(opened) | found))
    elif not quiet:
        console = Console()
        console.print(_summary(opened))
        if verbose:
            console.print(_layers(opened))
        console.print(_kernel_table(opened, contents, kinds))
        console.print(engine_table(answers, for_, verbose))
    if any(answers[name] for name in for_ or ()):
        raise typer.Exit(NO)


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """The facts about the checkpoint, in plain JSON types."""
    specs = checkpoint.layers.values()
    weights = sum(spec.in_features * spec.out_features for spec in specs)
    nbytes = sum(spec.nbytes for spec in specs)
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    settings = checkpoint.settings
    return {
        "model_type": checkpoint.config.get("model_type"),
        "format": settings.format,
        "bits": settings.bits,
        "group_size": settings.group_size,
        "sym": settings.sym,
        "desc_act": settings.desc_act,
        "assumed": list(settings.assumed),
        "made_by": list(settings.quantizers),
        "modules": len(checkpoint.layers),
        "layouts": dict(Counter(map(_layout_text, specs))),
        "padded_modules": sum(spec.padded for spec in specs),
        "quantized_weights": weights,
        "bits_per_weight": nbytes * 8 / weights if weights else None,
        "quantized_bytes": nbytes,
        "other_bytes": total - nbytes,
        "files": len(checkpoint.weights.files),
    }


def _summary(checkpoint: Checkpoint) -> Table:
    facts = _facts(checkpoint)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("model", plain(facts["model_type"] or "unknown"))
    table.add_row("format", facts["format"])
    table.add_row("made by", plain(", ".join(facts["made_by"]) or "not stated"))
    for text, count in facts["layouts"].items():
        table.add_row(f"{count} layers", text)
    if facts["assumed"]:
        table.add_row("not stated", f"{', '.join(facts['assumed'])}: read as the default")
    if facts["padded_modules"]:
        table.add_row("padded", f"{facts['padded_modules']} layers do not fill their last words")
    if facts["bits_per_weight"] is not None:
        per_weight = f"{facts['bits_per_weight']:.2f}, with scales, zero points and g_idx"
        table.add_row("bits per weight", per_weight)
    quantized, other = formatting.size(facts["quantized_bytes"]), formatting.size(facts["other_bytes"])
    table.add_row("size", f"{quantized} quantized, {other} not, in {facts['files']} file(s)")
    return table


def _layout_text(spec: LayerSpec) -> str:
    groups = "one group per row" if spec.group_size == -1 else f"groups of {spec.group_size}"
    order = ", act-order" if spec.desc_act else ""
    return f"{spec.bits} bits, {groups}, {'symmetric' if spec.sym else 'asymmetric'}{order}"


def _layers(checkpoint: Checkpoint) -> Table:
    table = Table("layer", "out x in", "layout", "size", box=None, padding=(0, 2, 0, 0))
    for spec in checkpoint.layers.values():
        shape = f"{spec.out_features} x {spec.in_features}"
        table.add_row(plain(spec.name), shape, _layout_text(spec), formatting.size(spec.nbytes))
    return table


def _kernels(checkpoint: Checkpoint, contents: Contents) -> list[dict[str, Any]]:
    """For every kernel: the number of layers that it can run here, and the first reason why it cannot run others."""
    import torch

    from ..kernels import registry

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stated = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float16"
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    dtype = dtypes.get(str(stated), torch.float16)
    able: Counter[str] = Counter()
    reasons: dict[str, str] = {}
    for _, spec in contents.layers:
        for name, reason in registry.explain(spec, device, dtype):
            able[name] += reason is None
            if reason is not None:
                reasons.setdefault(name, reason)
    return [
        {"kernel": name, "device": device.type, "modules": count, "why_not": reasons.get(name)}
        for name, count in able.items()
    ]


def _kinds(checkpoint: Checkpoint) -> dict[str, str]:
    """Layer → "linear" or "conv2d", from the model; empty where transformers cannot build it."""
    from ..hf.model_check import expected

    try:
        model = expected(checkpoint.path, checkpoint.config, checkpoint.tensors)
    except CheckpointError:
        return {}  # `fewbit verify` says what is wrong
    return model.kinds if model else {}


def _kernel_table(checkpoint: Checkpoint, contents: Contents, kinds: dict[str, str]) -> Table:
    found = _kernels(checkpoint, contents)
    table = Table("kernel", "layers", "why not", box=None, padding=(0, 2, 0, 0))
    unknown = "" if kinds.keys() >= checkpoint.layers.keys() else ", if all layers are linear"
    table.title, table.title_justify = f"kernels on {found[0]['device']}{unknown}", "left"
    for row in found:
        table.add_row(row["kernel"], f"{row['modules']} of {len(checkpoint.layers)}", row["why_not"] or "")
    return table
