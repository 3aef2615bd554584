"""Tensors read from safetensors files one by one, without mapping the files, and looked at.

Contract: a header that `header.read_header` has checked is believed; what is read through it is whole or an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ModelError
from .header import TensorInfo, read_header

_CHUNK = 1 << 24  # bytes; a multiple of every dtype's size


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a safetensors file. ``file_tensor[...]`` reads it; nothing is memory-mapped."""

    path: Path
    info: TensorInfo

    def __getitem__(self, index: object) -> Tensor:
        """The whole tensor, read anew. Raises ModelError if the file cannot be read any more."""
        return self.read()

    def read(self, *, pinned: bool = False) -> Tensor:
        """The whole tensor, read anew; `pinned`: into memory that a CUDA device can copy from by itself.

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
    """Add every byte of a safetensors file to `digest`, and look at its values on the way.

    A thread hashes what was read last while the next bytes are read and looked at.

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
    """Raises ModelError if a weight has NaN or infinite values."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    values = tensor.detach()
    if values.dtype.itemsize == 1:  # no reduction knows the 8-bit floats
        values = values.float()
    low, high = (float(value) for value in values.aminmax())
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        kind = "NaN" if low != low or high != high else "infinite"
        raise ModelError(
            f"the weight {name} holds {kind} values: the model is damaged, or does not fit the dtype it is read in; "
            "download or save it again, or choose another --dtype"
        )


def check_all_finite(tensors: Mapping[str, Tensor]) -> None:
    """`check_finite` for each of these weights, by name; a GPU that holds them is waited for once.

    Raises:
        ModelError: a weight has NaN or infinite values.
    """
    floats = [tensor for tensor in tensors.values() if tensor.is_floating_point() and tensor.numel()]
    wide = [tensor.float() if tensor.dtype.itemsize == 1 else tensor for tensor in floats]
    extremes = [extreme.float() for tensor in wide for extreme in tensor.detach().aminmax()]
    if extremes and not bool(torch.isfinite(torch.stack(extremes)).all()):
        for name, tensor in tensors.items():
            check_finite(name, tensor)
