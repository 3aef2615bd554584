"""Activations of paused batches, offloaded to disk or, from a GPU, to pinned host memory.

Whenever the pass pauses, each batch holds its activations, so with many calibration tokens they take most of the
memory. `Offloader` keeps as many in memory as fit: on the CPU the activations of the running job, on a GPU as many as
its budget allows. Other storages that a job's operations made, and that are alive when it pauses, are evicted to a
store. The first operation that touches an evicted tensor reloads it.

`Offloader` sees every operation of torch: outputs are what a job made, inputs are what must be in memory. Eviction
resizes the storage below a tensor to zero bytes. The tensor, its views, its identity and its version stay, wherever
references to it are (local variables, containers, Python's stack).

On the CPU every access to a tensor goes through torch. So a storage is reloaded when an operation needs it, and
written again only if an operation changed it. On other devices kernels are also launched by address. There a job gets
all of its storages back before it runs, and they count as changed afterwards.

Jobs run in the same order again and again. So the storages that came into memory last are evicted first: the first
jobs stay in memory, and only the others are moved.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn

from ..formatting import size
from ..internals import TorchDispatchMode, is_mutating
from ..profiling import Profiler
from .memory import RESIDENT_STORAGES, ActivationBudget
from .offload_store import DiskStore, HostStore, is_on_cpu
from .streaming import release_freed_memory

_SMALLEST = 1 << 16  # bytes; smaller storages stay in memory
_FREED = 1 << 25  # bytes after which freed memory is returned to the system


class NoOffload:
    """Activations stay where they are."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def running(self, job: int) -> AbstractContextManager[None]:
        """Return a context for the time in which the job with number `job` computes."""
        return nullcontext()

    def paused(self) -> AbstractContextManager[None]:
        """Return a context in which new tensors do not belong to the job, such as weights that are loaded."""
        return nullcontext()

    def notes(self) -> list[str]:
        """Return sentences about what was offloaded."""
        return []


def make_offloader(
    folder: str | Path | None, profiler: Profiler, budget: ActivationBudget | None = None
) -> NoOffload:
    """Choose where the activations of paused jobs are kept.

    Args:
        folder: Folder for evicted storages; None for host memory, which is used if the device lacks memory.
        profiler: Gets the seconds of synchronous stores, as "offload".
        budget: Budget of the device; None on the CPU, where only a folder is of use, and gets all activations.

    Raises:
        OutputError: `folder` cannot be written.
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
    """A storage that a job made.

    Attributes:
        storage: Reference to the storage, which does not keep it alive.
        on_cpu: True if all accesses to the storage go through torch.
        bytes: Size of the storage while it is resident.
        slot: Slot in the store; None if the storage was never evicted.
        resident: True if the bytes are in the storage.
        clean: True if the slot has the same bytes as the storage.
    """

    storage: weakref.ref[UntypedStorage]
    on_cpu: bool
    bytes: int
    slot: Any = None
    resident: bool = True
    clean: bool = False


class Offloader(NoOffload):
    """Evicts activations of paused jobs to a store, as far as they exceed a budget.

    Enter it around the whole pass. On exit, everything that is still alive is restored and the store is closed, after
    errors too.

    Args:
        store: Store for evicted storages.
        profiler: Gets the seconds of a synchronous store, as "offload".
        budget: Bytes that may stay in memory while a job is paused.

    Attributes:
        written: Bytes written to the store so far.
        read: Bytes read from the store so far.

    Raises:
        FewbitError: The errors of the store.
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
        self._touched: dict[
            int, _Record
        ] = {}  # storages of the running job that must be restored before it runs again
        self._paused: dict[int, list[_Record]] = {}  # the same for paused jobs
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
            record.clean = record.clean and not is_mutating(func)
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
                reference = weakref.ref(storage, self._forgetting(key))
                record = _Record(reference, is_on_cpu(storage), storage.nbytes())
                self._records[key] = record
                self._add_resident(record, storage)
                self._touch(record)

    def _touch(self, record: _Record) -> None:
        storage = record.storage()
        if not record.on_cpu and storage is not None:
            self._touched[id(storage)] = record

    def _forgetting(self, key: int) -> Callable[[object], None]:
        return lambda _: self._forget(key)

    def _forget(self, key: int) -> None:
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


class EveryOperation(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls `before` and `after` around every operation of torch, with the storages that it uses."""

    def __init__(
        self,
        before: Callable[[Any, list[UntypedStorage]], None],
        after: Callable[[list[UntypedStorage], list[UntypedStorage]], None],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._before, self._after = before, after

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = list(_storages((*args, *kwargs.values())))
        self._before(func, inputs)
        result = func(*args, **kwargs)
        self._after(inputs, list(_storages((result,))))
        return result


def _storages(values: Iterable[object]) -> Iterator[UntypedStorage]:
    """Yield the storages of all plain tensors; tensor subclasses have none."""
    for value in values:
        if isinstance(value, Tensor):
            if type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided:
                yield value.untyped_storage()
        elif isinstance(value, (list, tuple)):
            yield from _storages(value)
