"""Safetensors files: 8 bytes of length, a JSON header, then the tensors' bytes without holes.

`read_header` trusts nothing: every size, offset and dtype is checked against the file's length before anything is read
through it. A `FileTensor` that comes from a checked header reads one tensor without mapping the file. `encode_header`
gives the same bytes for the same tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..errors import CheckpointError, ModelError
from .safe_io import LARGEST_JSON, is_tensor_name, open_regular, parse_json, shown

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
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

_MOST_AXES, _LARGEST = 64, 2**63  # torch cannot count more
_CHUNK = 1 << 24  # bytes read at a time; a multiple of every dtype's size


@dataclass(frozen=True)
class TensorInfo:
    """One tensor in a file.

    Attributes:
        dtype: Dtype of the tensor.
        shape: Sizes of its axes.
        start: Offset of its first byte in the file.
        end: Offset after its last byte in the file.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def encode_header(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: str = "pt") -> bytes:
    """Encode the length and the JSON, padded to a multiple of 8 bytes, for tensors in the order of their data.

    `metadata` says for which library the file is: "pt" or "mlx".
    """
    entries: dict[str, Any] = {"__metadata__": {"format": metadata}}
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read the tensors of a file by name, and its ``__metadata__``.

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


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a safetensors file. ``file_tensor[...]`` reads it; nothing is memory-mapped."""

    path: Path
    info: TensorInfo

    def __getitem__(self, index: object) -> Tensor:
        return self.read()

    def read(self, *, pinned: bool = False) -> Tensor:
        """Read the whole tensor.

        Args:
            pinned: True for page-locked memory, from which a CUDA device copies asynchronously.

        Raises:
            ModelError: the file cannot be read any more.
        """
        info = self.info
        if not info.nbytes:
            return torch.empty(info.shape, dtype=info.dtype)
        if pinned:
            data = torch.empty(info.nbytes, dtype=torch.uint8, pin_memory=True)
            self._fill(data.numpy().data)
            return data.view(info.dtype).reshape(info.shape)
        memory = bytearray(info.nbytes)
        self._fill(memoryview(memory))
        return torch.frombuffer(memory, dtype=info.dtype).reshape(info.shape)

    def _fill(self, memory: memoryview) -> None:
        done = 0
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.info.start)
                while done < self.info.nbytes:
                    count = file.readinto(memory[done:])
                    if not count:
                        raise ModelError(f"{self.path} became shorter while it was in use")
                    done += count
        except OSError as error:
            raise ModelError(f"cannot read {self.path}: {error.strerror or error}") from error


def scan(path: Path, digest: Any) -> None:
    """Add every byte of a safetensors file to `digest` and check that all weights are finite.

    A thread hashes one chunk while the next one is read and checked.

    Raises:
        ModelError: the file is damaged, or holds NaN or infinite values.
    """
    try:
        infos, _ = read_header(path)
    except CheckpointError as error:
        raise ModelError(f"cannot read the weights: {error}") from error
    in_order = sorted(infos.items(), key=lambda item: item[1].start)
    with open(path, "rb") as file, ThreadPoolExecutor(max_workers=1) as thread:
        header = file.read(min((info.start for info in infos.values()), default=-1))
        hashing: Future[None] = thread.submit(digest.update, header)
        for name, info in in_order:
            for start in range(info.start, info.end, _CHUNK):
                data = bytearray(file.read(min(_CHUNK, info.end - start)))
                hashing.result()
                hashing = thread.submit(digest.update, data)
                check_finite(name, torch.frombuffer(data, dtype=info.dtype))


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ModelError if a weight has NaN or infinite values."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    values = tensor.detach()
    if values.dtype.itemsize == 1:  # torch has no reductions for 8-bit floats
        values = values.float()
    low, high = (float(value) for value in values.aminmax())
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        kind = "NaN" if low != low or high != high else "infinite"
        raise ModelError(
            f"the weight {name} holds {kind} values: the model is damaged, or does not fit the dtype it is read in; "
            "download or save it again, or choose another --dtype"
        )


def check_all_finite(tensors: Mapping[str, Tensor]) -> None:
    """Check weights by name with `check_finite`, with one host-device synchronization for all of them.

    Raises:
        ModelError: a weight has NaN or infinite values.
    """
    floats = [tensor for tensor in tensors.values() if tensor.is_floating_point() and tensor.numel()]
    wide = [tensor.float() if tensor.dtype.itemsize == 1 else tensor for tensor in floats]
    extremes = [extreme.float() for tensor in wide for extreme in tensor.detach().aminmax()]
    if extremes and not bool(torch.isfinite(torch.stack(extremes)).all()):
        for name, tensor in tensors.items():
            check_finite(name, tensor)
