"""Rewriting a checkpoint without changing a weight: v1 ↔ v2, AutoGPTQ folders, pickles, compressed-tensors.

One tensor or layer is in memory at a time. Only ``qzeros`` differ between the formats. Format "gptq" cannot store zero
point 0; the grid of such groups is reversed (see `layout.without_zero_point_0`), which is exact.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..config import FORMATS, Format
from ..errors import CheckpointError, ConfigError
from . import layout, manifest
from .layout import PARTS, QWEIGHT, QZEROS, SCALES, Shaped
from .pack_quantized import open_any
from .quantization_config import CheckpointSettings
from .reader import (
    Checkpoint,
    LayerSpec,
    WeightFiles,
    layer_names,
    layer_spec,
    read_config,
    read_weight_map,
    refuse_lost_zeros,
    unpack_layer,
)
from .safe_io import files_beside_weights
from .safetensors_file import TensorInfo
from .writer import CONFIG, QUANTIZE_CONFIG, CheckpointWriter, refuse_non_empty

_PICKLE_INDEX = "pytorch_model.bin.index.json"
_REWRITTEN = (CONFIG, QUANTIZE_CONFIG, manifest.NAME)
# Paths on the machine of the writer, which are private and useless elsewhere.
_PRIVATE_KEYS = ("model_name_or_path", "model_file_base_name", "is_marlin_format")


@dataclass(frozen=True)
class ConvertResult:
    """What `convert` did.

    Attributes:
        output: Folder of the result.
        format: "gptq" or "gptq_v2".
        layers: Number of layers rewritten.
        turned_groups: Number of groups whose grid was reversed because of a zero point of 0.
    """

    output: Path
    format: str
    layers: int
    turned_groups: int


@dataclass(frozen=True)
class _Pickles(WeightFiles):
    """The tensors of pickle files, which are in memory."""

    loaded: Mapping[str, Tensor] = field(kw_only=True)

    def tensor(self, name: str) -> Tensor:
        return self.loaded[name]


@dataclass
class _Seen:
    """Counts over the layers that were read."""

    turned_groups: int = 0
    all_sym: bool = True
    any_act_order: bool = False


def convert(
    path: str | Path,
    output: str | Path,
    fmt: Format,
    *,
    max_shard_size: int | str = "5GB",
    allow_pickle: bool = False,
) -> ConvertResult:
    """Write the checkpoint in the folder `path` to the folder `output` in format `fmt`.

    Args:
        path: a GPTQ checkpoint from any tool, or one of compressed-tensors (pack-quantized).
        output: missing, empty, or left by an interrupted conversion.
        fmt: "gptq" (v1) or "gptq_v2".
        max_shard_size: of each weight file.
        allow_pickle: also read .bin and .pt files, with torch's restricted unpickler.

    Raises:
        ConfigError: `fmt` is not known.
        CheckpointError: the source is damaged, or would need `allow_pickle`.
        OutputError: the output is not empty, or cannot be written.
    """
    source_folder, output_folder = Path(path), Path(output)
    if fmt not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}; got {fmt!r}")
    source = _open_source(source_folder, allow_pickle)
    if not source.config:
        raise CheckpointError(f"{source_folder} has no {CONFIG}; copy the original model's into it")
    refuse_non_empty(output_folder)
    specs, settings = source.layers, source.settings
    seen = _Seen()
    with CheckpointWriter(output_folder, _planned(source, specs), max_shard_size) as writer:
        for name in source.tensors:
            layer, _, part = name.rpartition(".")
            if layer not in specs or part not in PARTS:
                writer.add(name, source.tensor(name))
            elif part == QWEIGHT:  # the layer's other parts are written with it
                for short, tensor in _converted(source, specs[layer], settings, fmt, seen).items():
                    writer.add(f"{layer}.{short}", tensor)
        restated = _restated(source.quantization, settings, fmt, seen)
        others = files_beside_weights(source_folder)
        writer.finish(source.config, restated, {n: path for n, path in others.items() if n not in _REWRITTEN})
    return ConvertResult(output_folder, fmt, len(specs), seen.turned_groups)


def _planned(source: Checkpoint, specs: Mapping[str, LayerSpec]) -> dict[str, Shaped]:
    """Dtype and shape of every tensor of the result, in its order."""
    planned: dict[str, Shaped] = {}
    for name, info in source.tensors.items():
        layer, _, part = name.rpartition(".")
        if layer not in specs or part not in PARTS:
            planned[name] = info
        elif part == QWEIGHT:
            spec = specs[layer]
            packed = layout.empty_layer(spec.bits, spec.group_size, spec.in_features, spec.out_features)
            planned |= {f"{layer}.{short}": tensor for short, tensor in packed.items()}
            planned[f"{layer}.{SCALES}"] = source.tensors[f"{layer}.{SCALES}"]
    return planned


def _converted(
    source: Checkpoint, spec: LayerSpec, settings: CheckpointSettings, fmt: str, seen: _Seen
) -> dict[str, Tensor]:
    """Pack the layer in format `fmt`; where the format cannot store zero point 0, the grid is turned round."""
    codes = unpack_layer(spec, source.tensor, f"layer {spec.name}")
    refuse_lost_zeros(source.tensor(f"{spec.name}.{QZEROS}"), spec, settings)
    seen.all_sym &= bool((codes.zeros == 2 ** (spec.bits - 1)).all())
    seen.any_act_order |= codes.has_act_order
    if fmt == "gptq":
        seen.turned_groups += int((codes.zeros == 0).sum())
        codes = layout.without_zero_point_0(codes)
    return layout.pack(codes, fmt)


def _restated(
    found: Mapping[str, Any], settings: CheckpointSettings, fmt: str, seen: _Seen
) -> dict[str, Any]:
    """Restate the source's quantization configuration; the tensors supply what it leaves out."""
    kept = {key: value for key, value in found.items() if key not in _PRIVATE_KEYS}
    meta: Any = found.get("meta")
    quantizers = [name for name in settings.quantizers if not name.startswith("fewbit:")]
    return {
        **kept,
        "quant_method": "gptq",
        "sym": seen.all_sym if "sym" in settings.assumed else settings.sym,
        "desc_act": seen.any_act_order if "desc_act" in settings.assumed else settings.desc_act,
        "checkpoint_format": fmt,
        "format": fmt,
        "meta": {
            **(meta if isinstance(meta, dict) else {}),
            "quantizer": [*quantizers, f"fewbit:{__version__}"],
        },
    }


def _open_source(folder: Path, allow_pickle: bool) -> Checkpoint:
    pickles = _find_pickles(folder) if allow_pickle and not any(folder.glob("*.safetensors")) else []
    if not pickles:
        return open_any(folder)
    config, found, settings, _ = read_config(folder)
    loaded: dict[str, Tensor] = {}
    for path in pickles:
        loaded.update(_load_pickle(path))
    tensors = {name: _describe(tensor) for name, tensor in loaded.items()}
    layers = {name: layer_spec(name, settings, tensors) for name in layer_names(tensors)}
    weights = _Pickles(folder, None, tuple(pickles), tensors, {}, loaded=loaded)
    return Checkpoint(folder, config, found, settings, weights, layers)


def _find_pickles(folder: Path) -> list[Path]:
    index = folder / _PICKLE_INDEX
    if index.exists():
        return [folder / file for file in sorted(set(read_weight_map(index).values()))]
    found = sorted(path for ending in ("*.bin", "*.pt", "*.pth") for path in folder.glob(ending))
    found = [path for path in found if path.name != "training_args.bin"]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise CheckpointError(f"{folder} has several weight files and no {_PICKLE_INDEX}: {names}; keep one")
    return found


def _load_pickle(path: Path) -> dict[str, Tensor]:
    """Memory-mapped where the file's age allows it; only tensors and plain containers are unpickled."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"cannot read {path} as tensors: {error}") from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{path} holds no state dict (names → tensors)")
    return loaded


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _describe(tensor: Tensor) -> TensorInfo:
    return TensorInfo(tensor.dtype, tuple(tensor.shape), 0, tensor.numel() * tensor.element_size())
