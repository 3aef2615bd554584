"""Where activations are put while they are not where they are computed with: a file, or memory of the host.

Contract: a place is made by the first `put` of a storage and kept with it until `release`; `put` again writes over it.
Storages may be on any device. Whatever is still there at `close` is lost.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import UntypedStorage
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import CalibrationError, OutputError
from ..formatting import size


class Store(Protocol):
    """Takes the bytes of storages and gives them back.

    Attributes:
        size: bytes of all places at most so far.
        waits: whether `put` and `get` are done when they return; otherwise the device does them in its own time, in
            order with what it is told before and after.
        name: of where it is, in words.
    """

    size: int
    waits: bool
    name: str

    def takes(self, storage: UntypedStorage) -> bool:
        """Whether it makes sense to put this storage here."""

    def put(self, storage: UntypedStorage, place: Any) -> Any:
        """Copy the bytes of `storage` to `place`, or where that is None to a new one. Returns the place."""

    def get(self, place: Any, storage: UntypedStorage) -> None:
        """Copy the bytes at `place` into `storage`, which has as many."""

    def release(self, place: Any) -> None:
        """Let these bytes be written over."""

    def close(self) -> None:
        """Give everything back."""


class HostMemory:
    """Memory of the host, for storages of a GPU: pinned, so that the copies need nobody to wait.

    Raises:
        CalibrationError: there is not enough of it.
    """

    waits = False
    name = "in host memory"

    def __init__(self, *, pinned: bool) -> None:
        self.size = self._held = 0
        self._pinned = pinned

    def takes(self, storage: UntypedStorage) -> bool:
        """What is on the host already gains nothing."""
        return not is_on_cpu(storage)

    def put(self, storage: UntypedStorage, place: UntypedStorage | None) -> UntypedStorage:
        """Have the device copy `storage` here."""
        count = storage.nbytes()
        with _disable_current_modes():
            if place is None or place.nbytes() != count:
                if place is not None:
                    self.release(place)
                place = self._new(count)
            place.copy_(storage, True)
        return place

    def get(self, place: UntypedStorage, storage: UntypedStorage) -> None:
        """Have the device copy the bytes back."""
        with _disable_current_modes():
            storage.copy_(place, True)

    def release(self, place: UntypedStorage) -> None:
        """Nobody has this memory any more; torch frees it once the device is done with it."""
        self._held -= place.nbytes()

    def close(self) -> None:
        """Nothing is left to give back."""
        self._held = 0

    def _new(self, count: int) -> UntypedStorage:
        try:
            held = torch.empty(count, dtype=torch.uint8, pin_memory=self._pinned)
        except RuntimeError as error:  # torch has no closer class for memory of the host
            raise CalibrationError(
                f"the activations of paused batches fit neither on the device nor in host memory, of which they had "
                f"{size(self._held)}: {str(error).splitlines()[0]}. Use fewer calibration sequences (--num-samples), "
                "--fast, or keep them on disk (--offload-dir FOLDER)"
            ) from error
        self._held += count
        self.size = max(self.size, self._held)
        return held.untyped_storage()


class File:
    """A file without a name: it is gone as soon as it is closed or the process ends, however that happens.

    Places are used again for the same size: the same shapes come again in every block.

    Raises:
        OutputError: it cannot be made, written or read.
    """

    waits = True
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

    def takes(self, storage: UntypedStorage) -> bool:
        """Anything."""
        return True

    def put(self, storage: UntypedStorage, place: tuple[int, int] | None) -> tuple[int, int]:
        """Write the bytes: a place is where they begin, and how many."""
        count = storage.nbytes()
        if place is not None and place[1] != count:
            self.release(place)
            place = None
        if place is None:
            place = self._take(count), count
        with _disable_current_modes():
            held: UntypedStorage = storage if is_on_cpu(storage) else storage.cpu()  # type: ignore[no-untyped-call]
        self._write(place[0], _memory(held))
        return place

    def get(self, place: tuple[int, int], storage: UntypedStorage) -> None:
        """Read the bytes."""
        start, count = place
        if is_on_cpu(storage):
            self._read(start, _memory(storage))
            return
        with _disable_current_modes():
            held = torch.empty(count, dtype=torch.uint8).untyped_storage()
            self._read(start, _memory(held))
            storage.copy_(held)

    def release(self, place: tuple[int, int]) -> None:
        """Let them be written over."""
        start, count = place
        self._free[count].append(start)

    def close(self) -> None:
        """The file is gone."""
        self._file.close()

    def _take(self, count: int) -> int:
        """Where `count` bytes can be written."""
        if self._free[count]:
            return self._free[count].pop()
        start, self.size = self.size, self.size + count
        return start

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
    """Whether the bytes are in the host's memory."""
    return storage.device.type == "cpu"


def _memory(storage: UntypedStorage) -> memoryview:
    """The bytes of a storage on the CPU, while the caller keeps it. Through numpy it could not be resized any more."""
    return memoryview((ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())).cast("B")
