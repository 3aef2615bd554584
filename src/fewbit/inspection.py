"""`inspect`: what a checkpoint is, which kernels can run it here, and which engines load it. Reads headers only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoint.reader import Checkpoint, LayerSpec, open_checkpoint
from .checkpoint.safe_io import read_card, read_json
from .checkpoint.writer import REPORT_NAME
from .engines import ENGINES, Contents, of_checkpoint, unsupported_reasons
from .errors import CheckpointError
from .kernels import registry

# Ends of the names of classes that read text alone: all their quantized layers are linear.
_LINEAR = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True)
class KernelUse:
    """What one kernel can do with a checkpoint on this machine.

    Attributes:
        kernel: its name.
        device: type of the device.
        modules: number of layers that it can run.
        used: number of layers that it runs with ``kernel="auto"``.
        why_not: the first reason why it cannot run others; None if it runs all.
    """

    kernel: str
    device: str
    modules: int
    used: int
    why_not: str | None


@dataclass(frozen=True)
class Inspection:
    """Result of `inspect`.

    Attributes:
        model_type: as config.json names it; None where it does not.
        base_model: name of the original model, from fewbit's report or the model card; None where neither has it.
        base_bytes: size of its weights in memory; None where unknown.
        format: "gptq" (v1) or "gptq_v2".
        bits: bits of layers without a rule for them, as the next three.
        group_size: inputs that share a scale; −1 for the whole row.
        sym: symmetric grids.
        desc_act: groups that are not consecutive inputs.
        assumed: settings that the files do not state, read as the default.
        made_by: the tools that wrote it, where stated.
        modules: number of quantized layers.
        layouts: layout of a layer in words → number of layers.
        padded_modules: number of layers that do not fill their last words.
        quantized_weights: number of quantized weights.
        bits_per_weight: stored bits for each, with scales, zero points and g_idx; None without quantized layers.
        quantized_bytes: size of the quantized layers.
        other_bytes: size of everything else.
        files: number of weight files.
        kinds: "linear", "conv2d" or "unknown" → number of layers.
        kernels: for every kernel, what it can do with the checkpoint here.
        engines: engine → reasons why it cannot load the checkpoint; empty where no reason is known.
        layers: every quantized layer.
    """

    model_type: str | None
    base_model: str | None
    base_bytes: int | None
    format: str
    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    assumed: list[str]
    made_by: list[str]
    modules: int
    layouts: dict[str, int]
    padded_modules: int
    quantized_weights: int
    bits_per_weight: float | None
    quantized_bytes: int
    other_bytes: int
    files: int
    kinds: dict[str, int]
    kernels: list[KernelUse]
    engines: dict[str, list[str]]
    layers: tuple[LayerSpec, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON that ``fewbit inspect --json`` prints: everything but the layers."""
        result = asdict(self)
        del result["layers"]
        result["readers"] = result.pop("engines")
        return result


def inspect(checkpoint: str | Path) -> Inspection:
    """Say what the GPTQ checkpoint in a folder is, from any tool. `verify` checks its contents.

    Args:
        checkpoint: a checkpoint's folder.

    Raises:
        CheckpointError: it is not a GPTQ checkpoint, or damaged.
    """
    opened = open_checkpoint(Path(checkpoint))
    kinds = _kinds(opened)
    contents = of_checkpoint(opened, kinds)
    specs, settings = opened.layers.values(), opened.settings
    weights = sum(spec.in_features * spec.out_features for spec in specs)
    nbytes = sum(spec.nbytes for spec in specs)
    base_model, base_bytes = _original(opened.path)
    return Inspection(
        model_type=opened.config.get("model_type"),
        base_model=base_model,
        base_bytes=base_bytes,
        format=settings.format,
        bits=settings.bits,
        group_size=settings.group_size,
        sym=settings.sym,
        desc_act=settings.desc_act,
        assumed=list(settings.assumed),
        made_by=list(settings.quantizers),
        modules=len(specs),
        layouts=dict(Counter(map(layout_text, specs))),
        padded_modules=sum(spec.padded for spec in specs),
        quantized_weights=weights,
        bits_per_weight=nbytes * 8 / weights if weights else None,
        quantized_bytes=nbytes,
        other_bytes=sum(info.nbytes for info in opened.tensors.values()) - nbytes,
        files=len(opened.weights.files),
        kinds=dict(Counter(kinds.get(name, "unknown") for name in opened.layers)),
        kernels=_kernels(opened.config, contents),
        engines=engine_reasons(contents),
        layers=tuple(specs),
    )


def engine_reasons(contents: Contents) -> dict[str, list[str]]:
    """Engine → reasons why it cannot load a checkpoint; empty where no reason is known."""
    return {entry.name: unsupported_reasons(entry, contents) for entry in ENGINES}


def layout_text(spec: LayerSpec) -> str:
    """Bits, groups and grid of a layer in words."""
    groups = "one group per row" if spec.group_size == -1 else f"groups of {spec.group_size}"
    order = ", act-order" if spec.desc_act else ""
    return f"{spec.bits} bits, {groups}, {'symmetric' if spec.sym else 'asymmetric'}{order}"


def _kinds(checkpoint: Checkpoint) -> dict[str, str]:
    """Layer → "linear" or "conv2d", from the model; empty where transformers cannot build it."""
    config, classes = checkpoint.config, checkpoint.config.get("architectures")
    parts = {key for key in config if key.endswith("_config")} - {
        "quantization_config"
    }  # of images, of sound …
    if not parts and isinstance(classes, list) and classes and all(str(c).endswith(_LINEAR) for c in classes):
        return dict.fromkeys(checkpoint.layers, "linear")
    from .hf.model_check import expected  # transformers takes seconds to import

    try:
        model = expected(checkpoint.path, checkpoint.config, checkpoint.tensors)
    except CheckpointError:
        return {}  # `verify` says what is wrong
    return model.kinds if model else {}


def _kernels(config: Mapping[str, Any], contents: Contents) -> list[KernelUse]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stated = config.get("dtype") or config.get("torch_dtype") or "float16"
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    dtype = dtypes.get(str(stated), torch.float16)
    able, used = Counter[str](), Counter[str]()
    reasons: dict[str, str] = {}
    for spec, count in Counter(spec for _, spec in contents.layers).items():
        for name, reason in registry.explain(spec, device, dtype):
            able[name] += count * (reason is None)
            if reason is not None:
                reasons.setdefault(name, reason)
        used[registry.choose(spec, device, dtype)[0].name] += count
    return [KernelUse(name, device.type, able[name], used[name], reasons.get(name)) for name in able]


def _original(folder: Path) -> tuple[str | None, int | None]:
    """Name and size of the original model, as fewbit's report or the model card state them; untrusted."""
    path = folder / REPORT_NAME
    stated: object = None
    if path.is_file():
        with suppress(CheckpointError):  # a damaged report is no reason to refuse the checkpoint
            stated = read_json(path).get("model")
    if not isinstance(stated, dict):
        named = read_card(folder).get("base_model")
        stated = {"name": named[0] if isinstance(named, list) and named else named}
    name, size = stated.get("name"), stated.get("bytes")
    return name if isinstance(name, str) else None, size if type(size) is int else None
