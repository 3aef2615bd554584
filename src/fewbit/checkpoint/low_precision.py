"""Models that are published in 8 or 4 bits: their tensors are dequantized while they are read.

Formats, by the ``quant_method`` in config.json:

- ``fp8`` (DeepSeek-V3, Qwen3-FP8, MiniMax-M2): ``X`` in float8 and ``X_scale_inv``, one scale for each block of
  ``weight_block_size``; the last block of a row or column may be smaller;
- ``mxfp4`` (gpt-oss): ``X_blocks``, two FP4 values per byte in groups of 32, and ``X_scales``, the exponent of each
  group plus 127 (OCP Microscaling specification);
- ``compressed-tensors`` (Kimi-K2, RedHat): ``X_packed``, ``X_scale``, ``X_shape`` and ``X_zero_point`` for integers of
  2 to 8 bits; ``X`` in float8 or int8 with ``X_scale`` for others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from .layout import unpack_rows
from .safetensors_file import FileTensor, TensorInfo

DTYPE = torch.bfloat16  # of a dequantized tensor
METHODS = ("fp8", "mxfp4", "compressed-tensors")

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # e2m1, followed by the same with a sign
_EXPONENT_BIAS = 127
_NARROW = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)

Decode = Callable[[Sequence[Tensor]], Tensor]
Found = tuple[
    dict[str, FileTensor], set[str]
]  # the tensors described, and the names of the tensors that do so


@dataclass(frozen=True)
class DequantizedTensor(FileTensor):
    """A tensor that several tensors of a file describe. Reading it dequantizes it to bfloat16.

    Attributes:
        parts: tensors of the file, in the order that `decode` takes.
        decode: maps the parts of one matrix to its values, float32.
    """

    parts: tuple[FileTensor, ...] = ()
    decode: Decode = lambda parts: parts[0]

    def read(self, *, pinned: bool = False) -> Tensor:
        """Read and dequantize the whole tensor.

        Raises:
            ModelError: a file cannot be read any more.
        """
        parts = [part.read() for part in self.parts]
        values = torch.empty(self.info.shape, dtype=DTYPE, pin_memory=pinned)
        if values.ndim == 2:
            return values.copy_(self.decode(parts))
        for number, matrix in enumerate(values):  # the float32 of one expert at a time
            matrix.copy_(self.decode([part[number] for part in parts]))
        return values


def method_of(quantization: Mapping[str, Any]) -> str:
    """Return the name of the method in a ``quantization_config``."""
    return str(getattr(quantization.get("quant_method"), "value", quantization.get("quant_method")))


def dequantized(tensors: Mapping[str, FileTensor], quantization: Mapping[str, Any]) -> dict[str, FileTensor]:
    """Replace the tensors of a low-precision format by the ones that they describe.

    Args:
        tensors: every tensor of the source by its name.
        quantization: the ``quantization_config`` of the source.

    Raises:
        ModelError: the tensors do not fit the format, or its settings are not supported.
    """
    method = method_of(quantization)
    find = {"fp8": _fp8, "mxfp4": _mxfp4, "compressed-tensors": _compressed}[method]
    found, used = find(tensors, quantization)
    if not found:
        raise ModelError(
            f"config.json says that the model is quantized ({method}), but its files have no such tensors"
        )
    others = {name: tensor for name, tensor in tensors.items() if name not in used and name not in found}
    return {**others, **found}


def _fp8(tensors: Mapping[str, FileTensor], quantization: Mapping[str, Any]) -> Found:
    size = quantization.get("weight_block_size")
    found: dict[str, FileTensor] = {}
    used: set[str] = set()
    for scale_name in tensors:
        name = scale_name.removesuffix("_scale_inv")
        if name == scale_name or name not in tensors:
            continue
        weight, scale = tensors[name], tensors[scale_name]
        found[name] = _scaled(name, weight, scale, size)
        used.add(scale_name)
    return found, used


def _scaled(
    name: str, weight: FileTensor, scale: FileTensor, size: Sequence[int] | None
) -> DequantizedTensor:
    """Combine a narrow weight, (out, in) or (experts, out, in), with its scales: one, one per row, or one per block."""
    shape, grid = weight.info.shape, scale.info.shape
    if len(grid) < 2 == len(shape):
        grid = (*(grid or (1,)), 1)
    fits = len(grid) == len(shape) in (2, 3) and grid[:-2] == shape[:-2]
    block = [_block(shape[axis], grid[axis], size[axis] if size else None) for axis in (-2, -1) if fits]
    if not fits or None in block:
        raise ModelError(
            f"{name} of shape {shape} cannot be dequantized with scales of shape {scale.info.shape} in blocks of {size}"
        )

    def decode(parts: Sequence[Tensor]) -> Tensor:
        values, scales = parts[0].float(), _scale_values(parts[1]).view(grid[-2:])
        for axis, count in zip((-2, -1), block, strict=True):
            scales = scales.repeat_interleave(int(count or 1), dim=axis).narrow(axis, 0, values.shape[axis])
        return values * scales

    return _tensor(shape, (weight, scale), decode)


def _block(length: int, scales: int, size: int | None) -> int | None:
    """Return how many neighbors share one of `scales` along an axis; None if they do not fit."""
    if scales == 1:
        return length
    size = size or -(-length // scales)
    return size if -(-length // size) == scales else None


def _scale_values(scales: Tensor) -> Tensor:
    """Scales as float32; bytes are exponents."""
    if scales.dtype is torch.uint8:
        return torch.ldexp(torch.ones(()), scales.int() - _EXPONENT_BIAS)
    return scales.float()


def _mxfp4(tensors: Mapping[str, FileTensor], quantization: Mapping[str, Any]) -> Found:
    found: dict[str, FileTensor] = {}
    used: set[str] = set()
    for blocks_name, blocks in tensors.items():
        name = blocks_name.removesuffix("_blocks")
        scales = tensors.get(f"{name}_scales")
        if name == blocks_name or scales is None:
            continue
        *outer, groups, half = blocks.info.shape
        if tuple(scales.info.shape) != (*outer, groups) or len(outer) != 2:
            raise ModelError(
                f"{blocks_name} {blocks.info.shape} and its scales {scales.info.shape} do not fit together"
            )
        experts, rows = outer
        # transformers holds these experts as (experts, in, out).
        found[name] = _tensor((experts, groups * half * 2, rows), (blocks, scales), _decode_mxfp4)
        used |= {blocks_name, f"{name}_scales"}
    return found, used


def _decode_mxfp4(parts: Sequence[Tensor]) -> Tensor:
    blocks, scales = parts
    table = torch.tensor([*_FP4, *(-value for value in _FP4)])
    values = torch.stack([table[(blocks & 15).int()], table[(blocks >> 4).int()]], dim=-1).flatten(-2)
    values = torch.ldexp(values, scales.int()[..., None] - _EXPONENT_BIAS)
    return values.flatten(-2).transpose(-1, -2)


def _compressed(tensors: Mapping[str, FileTensor], quantization: Mapping[str, Any]) -> Found:
    found: dict[str, FileTensor] = {}
    used: set[str] = set()
    for scale_name, scale in tensors.items():
        name = scale_name.removesuffix("_scale")
        if name == scale_name:
            continue
        parts = {
            key: f"{name}_{key}"
            for key in ("packed", "shape", "zero_point", "g_idx")
            if f"{name}_{key}" in tensors
        }
        if "packed" in parts and "shape" in parts:
            found[name] = _packed(
                name, {key: tensors[part] for key, part in parts.items()}, scale, _stated_bits(quantization)
            )
        elif name in tensors and tensors[name].info.dtype in _NARROW and "zero_point" not in parts:
            found[name] = _scaled(name, tensors[name], scale, None)
        else:
            raise ModelError(
                f"{name}: this form of compressed-tensors is not supported; quantize the original model instead"
            )
        used |= {scale_name, *parts.values()}
        used |= {f"{name.rpartition('.')[0]}.input_scale"} & set(tensors)
    return found, used


def _stated_bits(quantization: Mapping[str, Any]) -> int | None:
    """Return the bits of all groups of layers; None if they differ or are not stated."""
    groups = (quantization.get("config_groups") or {}).values()
    found = {(group.get("weights") or {}).get("num_bits") for group in groups}
    return found.pop() if len(found) == 1 else None


def _packed(
    name: str, parts: Mapping[str, FileTensor], scale: FileTensor, bits: int | None
) -> DequantizedTensor:
    """Integers packed along the inputs, one row of words per output, with groups of inputs."""
    shape, words, scales = (
        parts["shape"].read().flatten().tolist(),
        parts["packed"].info.shape,
        scale.info.shape,
    )
    order = ["packed", *(key for key in ("zero_point", "g_idx") if key in parts)]
    groups = scales[1] if len(scales) == 2 else 1
    if len(shape) != 2 or min(shape) < 1 or len(words) != 2 or shape[1] % max(groups, 1):
        raise ModelError(f"{name} of shape {shape} does not fit words {words} and scales of shape {scales}")
    out_features, in_features = shape
    bits = bits or 32 * words[1] // in_features
    if (
        bits not in range(2, 9)
        or words != (out_features, -(-in_features * bits // 32))
        or scales[0] != out_features
    ):
        raise ModelError(f"{name} of shape {shape} does not fit words {words} and scales of shape {scales}")

    def decode(read: Sequence[Tensor]) -> Tensor:
        values = dict(zip([*order, "scale"], read, strict=True))
        q = unpack_rows(values["packed"], bits, in_features).float()
        in_order = torch.arange(in_features) // (in_features // groups)
        group = values["g_idx"].long() if "g_idx" in values else in_order
        z = torch.full((out_features, groups), 2.0 ** (bits - 1))
        if "zero_point" in values:
            z = unpack_rows(values["zero_point"].t().contiguous(), bits, out_features).t().float()
        return values["scale"].float().view(out_features, groups)[:, group] * (q - z[:, group])

    return _tensor((out_features, in_features), (*(parts[key] for key in order), scale), decode)


def _tensor(shape: Sequence[int], parts: tuple[FileTensor, ...], decode: Decode) -> DequantizedTensor:
    info = TensorInfo(DTYPE, tuple(shape), 0, DTYPE.itemsize * torch.Size(shape).numel())
    return DequantizedTensor(parts[0].path, info, parts, decode)
