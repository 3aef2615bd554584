"""Stores for the bytes of evicted activations: a file, or host memory.

The first `put` of a storage makes a slot, which is used for the storage until `release`. `size` is the maximum of the
bytes in all slots so far. If a store is `synchronous`, `put` and `get` are finished when they return; otherwise the
device performs them in the order of its other work.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from torch import UntypedStorage

from ..errors import CalibrationError, OutputError
from ..formatting import size
from ..internals import without_dispatch_modes


class HostStore:
    """Host memory for storages of a GPU, pinned so that copies are asynchronous.

    Raises:
        CalibrationError: There is not enough host memory.
    """

    synchronous = False
    name = "in host memory"

    def __init__(self, *, pinned: bool) -> None:
        self.size = self._held = 0
        self._pinned = pinned

    def accepts(self, storage: UntypedStorage) -> bool:
        return not is_on_cpu(storage)

    def put(self, storage: UntypedStorage, slot: UntypedStorage | None) -> UntypedStorage:
        with without_dispatch_modes():
            slot = self._new(storage.nbytes()) if slot is None else slot
            slot.copy_(storage, True)
        return slot

    def get(self, slot: UntypedStorage, storage: UntypedStorage) -> None:
        with without_dispatch_modes():
            storage.copy_(slot, True)

    def release(self, slot: UntypedStorage) -> None:
        self._held -= slot.nbytes()  # torch frees the memory once the device is done with it

    def close(self) -> None:
        self._held = 0

    def _new(self, count: int) -> UntypedStorage:
        try:
            memory = torch.empty(count, dtype=torch.uint8, pin_memory=self._pinned)
        except RuntimeError as error:  # torch has no more specific class for host memory
            raise CalibrationError(
                f"the activations of paused batches fit neither on the device nor in host memory, of which they had "
                f"{size(self._held)}: {str(error).splitlines()[0]}. Use fewer calibration sequences (--num-samples), "
                "--fast, or keep them on disk (--offload-dir FOLDER)"
            ) from error
        self._held += count
        self.size = max(self.size, self._held)
        return memory.untyped_storage()


class DiskStore:
    """A file without a name, which disappears when it is closed or the process ends.

    A slot is an offset and a size. Released slots are used again for the same size: shapes repeat in every block.

    Raises:
        OutputError: The file cannot be made, written or read.
    """

    synchronous = True
    name = "on disk"

    def __init__(self, folder: Path) -> None:
        self.size = 0
        self._folder = folder
        self._free: defaultdict[int, list[int]] = defaultdict(list)
        try:
            self._file = tempfile.TemporaryFile(dir=folder, prefix="fewbit-", buffering=0)  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise OutputError(
                f"activations cannot be kept in {folder}: {error.strerror or error}. Create the folder, make it "
                "writable, or name another one (--offload-dir)"
            ) from error

    def accepts(self, storage: UntypedStorage) -> bool:
        return True

    def put(self, storage: UntypedStorage, slot: tuple[int, int] | None) -> tuple[int, int]:
        start, count = self._new(storage.nbytes()) if slot is None else slot
        with without_dispatch_modes():
            source: UntypedStorage = storage if is_on_cpu(storage) else storage.cpu()  # type: ignore[no-untyped-call]
        self._write(start, _memory(source))
        return start, count

    def get(self, slot: tuple[int, int], storage: UntypedStorage) -> None:
        start, count = slot
        if is_on_cpu(storage):
            self._read(start, _memory(storage))
            return
        with without_dispatch_modes():
            loaded = torch.empty(count, dtype=torch.uint8).untyped_storage()
            self._read(start, _memory(loaded))
            storage.copy_(loaded)

    def release(self, slot: tuple[int, int]) -> None:
        start, count = slot
        self._free[count].append(start)

    def close(self) -> None:
        self._file.close()

    def _new(self, count: int) -> tuple[int, int]:
        if self._free[count]:
            return self._free[count].pop(), count
        start, self.size = self.size, self.size + count
        return start, count

    def _write(self, start: int, data: memoryview) -> None:
        try:
            self._file.seek(start)
            done = 0
            while done < len(data):
                done += self._file.write(data[done:])
        except OSError as error:
            raise OutputError(
                f"activations cannot be written to {self._folder}: {error.strerror or error}, after "
                f"{size(self.size)}. Name a folder with more space (--offload-dir), or use fewer or shorter "
                "calibration sequences (--num-samples, --seq-len)"
            ) from error

    def _read(self, start: int, into: memoryview) -> None:
        try:
            self._file.seek(start)
            done = 0
            while done < len(into):
                count = self._file.readinto(into[done:])
                if not count:
                    raise OutputError(f"the activations in {self._folder} are shorter than they were written")
                done += count
        except OSError as error:
            raise OutputError(
                f"activations cannot be read back from {self._folder}: {error.strerror or error}. Name a folder on "
                "another disk (--offload-dir)"
            ) from error


def is_on_cpu(storage: UntypedStorage) -> bool:
    return storage.device.type == "cpu"


def _memory(storage: UntypedStorage) -> memoryview:
    """Return the bytes of a CPU storage, which the caller keeps alive. A numpy view would prevent resizing."""
    return memoryview((ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())).cast("B")
