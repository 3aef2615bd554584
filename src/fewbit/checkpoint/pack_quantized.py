"""Checkpoints of compressed-tensors, format pack-quantized, read as if they were GPTQ's.

Both formats pack the codes of a row along the inputs in the same way, so words are only transposed:

    weight_packed      int32 (out, words)     qweight is its transpose
    weight_zero_point  int32 (words, groups)  qzeros of format gptq_v2 is its transpose; absent in symmetric layers
    weight_scale       (out, groups)          scales is its transpose
    weight_shape       int64 (2,): out, in

Bits and groups of a layer follow from the shapes. Other forms of compressed-tensors are refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..config import BITS, LayerSettings, QuantConfig
from ..errors import CheckpointError
from . import layout, quantization_config
from .layout import G_IDX, PARTS, QWEIGHT, QZEROS, SCALES
from .reader import Checkpoint, WeightFiles, layer_spec, open_checkpoint, open_weights
from .safe_io import read_json
from .safetensors_file import TensorInfo
from .writer import CONFIG

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
_PACKED, _ZEROS, _SCALE, _SHAPE = "weight_packed", "weight_zero_point", "weight_scale", "weight_shape"


def open_any(folder: Path) -> Checkpoint:
    """Open a checkpoint of GPTQ, or of compressed-tensors.

    Raises:
        CheckpointError: it is neither, is unfinished, or contradicts itself.
    """
    file = folder / CONFIG
    config = read_json(file) if file.exists() else {}
    found = config.get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != METHOD:
        return open_checkpoint(folder)
    _check_form(found, file)
    files = open_weights(folder)
    layers = {
        name.removesuffix(f".{_PACKED}"): _layer(name.removesuffix(f".{_PACKED}"), files)
        for name in files.tensors
        if name.endswith(f".{_PACKED}")
    }
    if not layers:
        raise CheckpointError(f"{folder} says it is quantized, but has no tensor named *.{_PACKED}")
    weights = _Weights(
        folder, files.index, files.files, _tensors(files, layers), files.file_of, packed=files, layers=layers
    )
    quantization = _quantization(layers)
    settings = quantization_config.parse(quantization, str(file))
    specs = {name: layer_spec(name, settings, weights.tensors) for name in layers}
    return Checkpoint(folder, config, quantization, settings, weights, specs)


@dataclass(frozen=True)
class _Layer:
    """One layer: its widths, and how it is quantized."""

    out_features: int
    in_features: int
    bits: int
    group_size: int
    sym: bool


@dataclass(frozen=True)
class _Weights(WeightFiles):
    """The tensors of GPTQ's layers, made from the files' own when they are asked for."""

    packed: WeightFiles = field(kw_only=True)
    layers: Mapping[str, _Layer] = field(kw_only=True)

    def tensor(self, name: str) -> Tensor:
        layer, _, part = name.rpartition(".")
        if layer not in self.layers or part not in PARTS:
            return self.packed.tensor(name)
        spec = self.layers[layer]
        if part == SCALES:
            return self.packed.tensor(f"{layer}.{_SCALE}").t().contiguous()
        expected = layout.empty_layer(spec.bits, spec.group_size, spec.in_features, spec.out_features)[part]
        if part == G_IDX:
            size = spec.in_features if spec.group_size == -1 else spec.group_size
            return torch.arange(spec.in_features, dtype=torch.int32) // size
        if part == QWEIGHT:
            words = self.packed.tensor(f"{layer}.{_PACKED}")
            return pad(words, (0, expected.shape[0] - words.shape[1])).t().contiguous()
        if spec.sym:
            middle = torch.full((spec.out_features, expected.shape[0]), 2 ** (spec.bits - 1))
            return layout.pack_zeros(middle, spec.bits, "gptq_v2")
        words = self.packed.tensor(f"{layer}.{_ZEROS}").t()
        return pad(words, (0, expected.shape[1] - words.shape[1])).contiguous()


def _check_form(found: Mapping[str, Any], file: Path) -> None:
    if found.get("format") != FORMAT:
        raise CheckpointError(
            f"{file} says format {found.get('format')!r}; of {METHOD}, fewbit reads {FORMAT}"
        )
    for group in (found.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        if weights.get("type") != "int" or weights.get("actorder") or group.get("input_activations"):
            raise CheckpointError(
                f"{file} has layers with act-order, floating-point codes or quantized activations, which GPTQ's format "
                "does not say: quantize the original model instead"
            )


def _layer(name: str, files: WeightFiles) -> _Layer:
    parts = {part: files.tensors.get(f"{name}.{part}") for part in (_PACKED, _SCALE, _SHAPE)}
    missing = [part for part, info in parts.items() if info is None]
    if missing:
        raise CheckpointError(f"layer {name} has no {' and no '.join(missing)}")
    out, n = files.tensor(f"{name}.{_SHAPE}").tolist()
    words, scales = files.tensors[f"{name}.{_PACKED}"].shape, files.tensors[f"{name}.{_SCALE}"].shape
    groups = scales[1] if len(scales) == 2 else 1
    bits = next((bits for bits in BITS if words == (out, -(-n * bits // 32))), None)
    if bits is None or n % groups or scales != (out, groups):
        raise CheckpointError(
            f"layer {name} of shape ({out}, {n}) does not fit words {words} and scales {scales}"
        )
    sym = f"{name}.{_ZEROS}" not in files.tensors
    return _Layer(out, n, bits, -1 if groups == 1 else n // groups, sym)


def _tensors(files: WeightFiles, layers: Mapping[str, _Layer]) -> dict[str, TensorInfo]:
    """The tensors of the GPTQ checkpoint, each where the one that it is made from lies."""
    result: dict[str, TensorInfo] = {}
    for name, info in files.tensors.items():
        layer, _, part = name.rpartition(".")
        if layer not in layers or part not in (_PACKED, _SCALE, _SHAPE, _ZEROS):
            result[name] = info
            continue
        spec = layers[layer]
        empty = layout.empty_layer(spec.bits, spec.group_size, spec.in_features, spec.out_features)
        made = {_PACKED: (QWEIGHT, QZEROS, G_IDX), _SCALE: (SCALES,)}.get(part, ())
        for short in made:
            dtype = info.dtype if short == SCALES else empty[short].dtype
            nbytes = empty[short].numel() * dtype.itemsize
            result[f"{layer}.{short}"] = TensorInfo(dtype, tuple(empty[short].shape), 0, nbytes)
    return result


def _quantization(layers: Mapping[str, _Layer]) -> dict[str, Any]:
    """The configuration of GPTQ that says the same."""
    formats = {name: (spec.bits, spec.group_size, spec.sym) for name, spec in layers.items()}
    usual = Counter(formats.values()).most_common(1)[0][0]
    config = QuantConfig(bits=usual[0], group_size=usual[1], sym=usual[2], act_order="none", format="gptq_v2")
    settings = {
        name: LayerSettings(bits, group_size, sym, "none", config.damp, config.method)
        for name, (bits, group_size, sym) in formats.items()
    }
    return quantization_config.build(config, settings, (), {})
