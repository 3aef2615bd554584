"""The header of a safetensors file: 8 bytes of length, JSON, then the tensors' bytes without holes.

`read_header` believes nothing: every size, offset and dtype is checked against the file's length before
anything is read through it. `encode_header` gives the same bytes for the same tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from ..errors import CheckpointError
from .safe_io import LARGEST_JSON, is_tensor_name, open_regular, parse_json, shown

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_MOST_AXES, _LARGEST = 64, 2**63  # what torch can count


@dataclass(frozen=True)
class TensorInfo:
    """One tensor in a file: dtype, shape, and its bytes from `start` to `end` in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.end - self.start


def encode_header(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """Length and JSON for `tensors` in the order of their data, padded to a multiple of 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of a file by name, and its ``__metadata__``.

    Raises:
        CheckpointError: the file is not a whole safetensors file; the message says what is wrong with it.
    """
    file, size = open_regular(path)
    with file:
        try:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= min(size - 8, LARGEST_JSON) else b""
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if size < 8 or len(text) != length:
        raise CheckpointError(f"{path} is cut short or no safetensors file: {size} bytes, header of {length}")
    entries = parse_json(text, f"the header of {path}", _refuse_duplicates)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path} has a damaged header: __metadata__ does not map texts to texts")
    infos = {name: _tensor_info(path, name, entry, 8 + length, size) for name, entry in entries.items()}
    _check_contiguous(path, infos, 8 + length, size)
    return infos, metadata


def _tensor_info(path: Path, name: str, entry: object, data_start: int, size: int) -> TensorInfo:
    if not is_tensor_name(name):
        raise CheckpointError(f"{path} has a damaged header: a tensor is called {shown(name)}")
    stated = entry.get("dtype") if isinstance(entry, Mapping) else entry
    dtype = DTYPES.get(stated) if isinstance(stated, str) else None
    if not isinstance(entry, Mapping) or dtype is None:
        raise CheckpointError(f"{path}: tensor {name} has the unknown dtype {shown(stated)}")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if (
        not _whole_numbers(shape)
        or not _whole_numbers(offsets)
        or len(offsets) != 2
        or len(shape) > _MOST_AXES
    ):
        raise CheckpointError(
            f"{path}: tensor {name} has shape {shown(shape)} and data_offsets {shown(offsets)}"
        )
    if offsets[1] > size or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"{path}: tensor {name} of shape {shape} and dtype {entry['dtype']} cannot lie in "
            f"{offsets[1] - offsets[0]} bytes of a file of {size}"
        )
    return TensorInfo(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _whole_numbers(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < _LARGEST for value in values)


def _check_contiguous(path: Path, infos: Mapping[str, TensorInfo], data_start: int, size: int) -> None:
    position = data_start
    for name, info in sorted(infos.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != position:
            raise CheckpointError(f"{path}: the data of tensor {name} overlaps another or leaves a hole")
        position = info.end
    if position != size:
        raise CheckpointError(
            f"{path} is damaged: its header describes {position} bytes, the file has {size}; get it again"
        )


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result
