"""Activations of paused batches, offloaded to disk or, from a GPU, to pinned host memory.

`Offloader` sees every operation of torch. It records the storages that a job makes, and evicts them to a store when
the paused jobs exceed a budget. Eviction resizes a storage to zero bytes, so every tensor and view of it stays valid.
The first operation that needs an evicted storage reloads it. Jobs run in a fixed order. So the storages that came into
memory last are evicted first: the first jobs stay in memory.

On the CPU every access goes through torch, so a storage is written again only if an operation changed it. Other devices
also launch kernels by address. There a job gets all of its storages back before it runs, and they count as changed.
"""

from __future__ import annotations

import ctypes
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import UntypedStorage

from ..errors import CalibrationError, OutputError
from ..formatting import size
from ..profiling import Profiler
from ..torch_internals import EveryOperation, is_mutating, without_dispatch_modes
from .allocator import release_freed_memory
from .memory import RESIDENT_STORAGES, ActivationBudget

_SMALLEST = 1 << 16  # bytes; smaller storages stay in memory
_FREED = 1 << 25  # bytes after which freed memory is returned to the system


class HostStore:
    """Host memory for storages of a GPU, pinned so that copies are asynchronous.

    The first `put` of a storage makes a slot for it, until `release`. `size` is the maximum of the bytes in all slots.
    The device performs `put` and `get` in the order of its other work: they are not `synchronous`.
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
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise OutputError(
                f"activations cannot be written to {self._folder}: {error.strerror or error}, after "
                f"{size(self.size)}. Name a folder with more space (--offload-dir), or use fewer or shorter "
                "calibration sequences (--num-samples, --seq-len)"
            ) from error

    def _read(self, start: int, into: memoryview) -> None:
        try:
            self._file.seek(start)
            while into:
                if not (count := self._file.readinto(into)):
                    raise OutputError(f"the activations in {self._folder} are shorter than they were written")
                into = into[count:]
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


class NoOffload(nullcontext[None]):
    """Activations stay where they are."""

    def running(self, job: int) -> AbstractContextManager[None]:
        """Enter while the job with number `job` computes."""
        return nullcontext()

    def paused(self) -> AbstractContextManager[None]:
        """Enter to make tensors that do not belong to the job, such as weights."""
        return nullcontext()

    def notes(self) -> list[str]:
        """Return sentences about what was offloaded."""
        return []


def make_offloader(
    folder: str | Path | None, profiler: Profiler, budget: ActivationBudget | None = None
) -> NoOffload:
    """Choose where the activations of paused jobs are kept: in `folder`, in host memory, or where they are.

    `budget` is None on the CPU, where a folder gets all activations.
    """
    kept = 0 if budget is None else budget.bytes
    if folder is not None:
        return Offloader(DiskStore(Path(folder)), profiler, kept)
    if budget is None or budget.needed <= kept:
        return NoOffload()
    return Offloader(HostStore(pinned=budget.pinned), profiler, kept)


def check_offload_dir(folder: str | Path) -> None:
    """Raise OutputError if nothing can be written in `folder`."""
    DiskStore(Path(folder)).close()


@dataclass(eq=False)
class _Record:
    """A storage that a job made."""

    storage: weakref.ref[UntypedStorage]
    on_cpu: bool  # all accesses go through torch
    bytes: int  # while it is resident
    slot: Any = None  # in the store, after the first eviction
    resident: bool = True
    clean: bool = False  # the slot has the same bytes


class Offloader(NoOffload):
    """Evicts activations of paused jobs to a store, as far as they exceed a budget.

    Enter it around the whole pass. On exit, also after an error, everything alive is restored and the store is closed.
    `budget` is the number of bytes that may stay in memory while a job is paused.
    """

    def __init__(self, store: DiskStore | HostStore, profiler: Profiler, budget: int = 0) -> None:
        self.written = self.read = 0
        self._store: Any = store  # each store has its kind of slot
        self._profiler = profiler
        self._budget = budget
        self._mode: Any = EveryOperation(self._before, self._after)
        self._records: dict[int, _Record] = {}  # by id of the storage, for all that are alive
        self._resident: dict[int, _Record] = {}  # the last to come into memory is at the end
        self._held = 0  # bytes of the resident storages
        # Storages that must be restored before a job runs again: of the running job, and of each paused job.
        self._touched: dict[int, _Record] = {}
        self._paused: dict[int, list[_Record]] = {}
        self._recording = False
        self._freed = 0  # bytes evicted since freed memory was last returned to the system

    def __enter__(self) -> None:
        self._mode.__enter__()

    def __exit__(self, *_: object) -> None:
        self._mode.__exit__(None, None, None)
        try:
            for record in list(self._records.values()):
                self._restore(record)
        finally:
            self._records.clear()
            self._resident.clear()
            self._store.close()

    @contextmanager
    def running(self, job: int) -> Iterator[None]:
        with self._timed():
            self._evict_excess()
            for record in self._paused.pop(job, ()):
                self._restore(record)
                record.clean = False  # a kernel that gets an address changes the bytes unseen
                self._touch(record)
        self._recording = True
        try:
            yield
        finally:
            self._recording = False
        with self._timed():
            self._paused[job] = list(self._touched.values())
            self._evict_excess()
            self._touched.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        before, self._recording = self._recording, False
        try:
            yield
        finally:
            self._recording = before

    def notes(self) -> list[str]:
        if not self.written and not isinstance(self._store, DiskStore):  # a folder was asked for
            return []
        written, read, peak = (size(count) for count in (self.written, self.read, self._store.size))
        which = "that had no room on the device " if self._budget else ""
        return [
            f"activations of paused batches {which}were kept {self._store.name}: {written} written, {read} read, "
            f"{peak} at a time"
        ]

    def _timed(self) -> AbstractContextManager[None]:
        return self._profiler.time("offload") if self._store.synchronous else nullcontext()

    def _before(self, func: Any, inputs: list[UntypedStorage]) -> None:
        """Restore the inputs of an operation."""
        keys = {id(storage) for storage in inputs}
        needed = {key: record for key in keys if (record := self._records.get(key)) is not None}
        if not needed:
            return
        if not all(record.resident for record in needed.values()):
            with self._timed():
                for record in needed.values():
                    self._restore(record)
        for record in needed.values():
            record.clean &= not is_mutating(func)
            if self._recording:
                self._touch(record)
        if not self._recording and len(self._resident) > RESIDENT_STORAGES and self._held > self._budget:
            with self._timed():
                self._evict_excess(keep={*list(self._resident)[-RESIDENT_STORAGES:], *needed})

    def _after(self, inputs: list[UntypedStorage], outputs: list[UntypedStorage]) -> None:
        """Record the storages that a job's operation made; an output may share the storage of an input."""
        if not self._recording:
            return
        given = {id(storage) for storage in inputs}
        for storage in outputs:
            key = id(storage)
            if (
                key not in given
                and key not in self._records
                and storage.nbytes() >= _SMALLEST
                and storage.device.type != "meta"
                and storage.resizable()
                and self._store.accepts(storage)
            ):
                reference = weakref.ref(storage, partial(self._forget, key))
                record = _Record(reference, is_on_cpu(storage), storage.nbytes())
                self._records[key] = record
                self._add_resident(record, storage)
                self._touch(record)

    def _touch(self, record: _Record) -> None:
        storage = record.storage()
        if not record.on_cpu and storage is not None:
            self._touched[id(storage)] = record

    def _forget(self, key: int, _: object = None) -> None:
        """Release the slot of a storage that was freed."""
        record = self._records.pop(key, None)
        self._touched.pop(key, None)
        if record is not None:
            self._remove_resident(key)
            if record.slot is not None:
                self._store.release(record.slot)

    def _add_resident(self, record: _Record, storage: UntypedStorage) -> None:
        record.resident, record.bytes = True, storage.nbytes()
        self._resident[id(storage)] = record
        self._held += record.bytes

    def _remove_resident(self, key: int) -> None:
        record = self._resident.pop(key, None)
        self._held -= 0 if record is None else record.bytes

    def _evict_excess(self, keep: Collection[int] = ()) -> None:
        """Evict storages until the others fit the budget, not counting those to `keep`."""
        allowed = self._budget + sum(self._resident[key].bytes for key in keep if key in self._resident)
        for key, record in reversed(list(self._resident.items())):
            if self._held <= allowed:
                break
            if key not in keep:
                self._evict(key, record)
        if self._freed >= _FREED:
            release_freed_memory()
            self._freed = 0

    def _evict(self, key: int, record: _Record) -> None:
        storage = record.storage()
        if storage is None:
            return
        count = storage.nbytes()
        if not storage.resizable():  # its memory was given to numpy or another process
            self._forget(key)
            return
        if not record.clean:
            if count != record.bytes and record.slot is not None:  # an operation resized it
                self._store.release(record.slot)
                record.slot = None
            record.slot = self._store.put(storage, record.slot)
            self.written += count
            record.clean = True
        # The order matters after an interrupt: `resident` must never be True for an empty storage.
        record.resident = False
        self._remove_resident(key)
        record.bytes = count
        self._freed += count if record.on_cpu else 0
        storage.resize_(0)

    def _restore(self, record: _Record) -> None:
        storage = record.storage()
        if storage is None or record.resident:
            return
        storage.resize_(record.bytes)
        self._store.get(record.slot, storage)
        self.read += record.bytes
        self._add_resident(record, storage)
