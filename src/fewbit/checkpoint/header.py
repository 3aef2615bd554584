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

_LARGEST_HEADER = 100_000_000  # the limit of the safetensors library


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
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= min(size - 8, _LARGEST_HEADER) else b""
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if size < 8 or len(text) != length:
        raise CheckpointError(f"{path} is cut short or no safetensors file: {size} bytes, header of {length}")
    try:
        entries = json.loads(text, object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged header: {error}") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path} has a damaged header: not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path} has a damaged header: __metadata__ is not an object")
    infos = {name: _tensor_info(path, name, entry, 8 + length) for name, entry in entries.items()}
    _check_contiguous(path, infos, 8 + length, size)
    return infos, metadata


def _tensor_info(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    dtype = DTYPES.get(str(entry.get("dtype"))) if isinstance(entry, Mapping) else None
    if not isinstance(entry, Mapping) or dtype is None:
        kind = entry.get("dtype") if isinstance(entry, Mapping) else entry
        raise CheckpointError(f"{path}: tensor {name} has the unknown dtype {kind!r}")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{path}: tensor {name} has shape {shape!r} and data_offsets {offsets!r}")
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"{path}: tensor {name} of shape {shape} and dtype {entry['dtype']} "
            f"cannot lie in {offsets[1] - offsets[0]} bytes"
        )
    return TensorInfo(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _whole_numbers(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


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
