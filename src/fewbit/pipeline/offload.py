"""Activations elsewhere while the batch that they belong to is paused: on disk, or a GPU's in host memory.

At every pause of the walk each batch holds its activations, so with many calibration tokens they are the larger
part of memory. `Offloader` keeps no more of them where they are than fit: on the CPU those of the running job, on a
GPU as many as it has room for. Of others, what a job's operations made and is still alive when it pauses is put in a
store. Whoever uses such a tensor next gets its bytes back first.

`Offloader` sees every operation of torch, on the way in and on the way out: outputs are what a job made, inputs are
what must be in memory. Below a tensor it empties and fills the storage; the tensor itself, its views, its identity
and its version stay, wherever references to it are (local variables, containers, Python's stack).

On the CPU every access to a tensor goes through torch, and a tensor is read back when an operation needs it, and
written again only if one changed it. Elsewhere kernels are also launched by address. So there a job gets back all
it had before it runs on, and what it still has afterwards is taken to be changed.

Jobs run in the same order again and again. So when there is no room, it is the job that pauses which gives way: the
first ones stay, and only the others come and go.
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
from torch.utils._python_dispatch import TorchDispatchMode

from ..formatting import size
from ..profiling import Profiler
from .memory import RESIDENT_STORAGES, ActivationBudget
from .offload_slots import File, HostMemory, Store, is_on_cpu
from .streaming import release_freed_memory

_SMALLEST = 1 << 16  # bytes of a storage: smaller ones are not worth the trouble
_FREED = 1 << 25  # bytes after which freed memory is given back to the system


class NoOffload:
    """Activations stay where they are."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def running(self, job: int) -> AbstractContextManager[None]:
        """To be entered while job number `job` computes, and left when it pauses."""
        return nullcontext()

    def paused(self) -> AbstractContextManager[None]:
        """To be entered while a job computes something that is not its own, such as weights."""
        return nullcontext()

    def notes(self) -> list[str]:
        """Sentences about what was done."""
        return []


def make_offloader(
    folder: str | Path | None, profiler: Profiler, room: ActivationBudget | None = None
) -> NoOffload:
    """Where activations of paused jobs are kept.

    Args:
        folder: what has to give way goes there; None: into host memory, if the device has not enough `room`.
        room: of the device; None: on the CPU, where they give way only to a folder, and then all of them.

    Raises:
        OutputError: nothing can be written in `folder`.
    """
    budget = 0 if room is None else room.bytes
    if folder is not None:
        return Offloader(File(Path(folder)), profiler, budget)
    if room is None or room.needed <= budget:
        return NoOffload()
    return Offloader(HostMemory(pinned=room.pinned), profiler, budget)


def check_offload_dir(folder: str | Path) -> None:
    """Raises OutputError if nothing can be written in `folder`."""
    File(Path(folder)).close()


@dataclass(eq=False)
class _Record:
    """A storage that a job made.

    Attributes:
        on_cpu: whether all accesses to it go through torch. bytes: that it has.
        place: in the store; None: it was never put there.
        present: whether it is where it belongs. saved: whether the store has the very bytes that it has.
    """

    storage: weakref.ref[UntypedStorage]
    on_cpu: bool
    bytes: int
    place: Any = None
    present: bool = True
    saved: bool = False


class Offloader(NoOffload):
    """Activations of paused jobs are in a store, but for as many as there is room for.

    Must be entered around the whole walk. When it is left, what is still alive is brought back and the store is
    closed, whatever happened. Seconds of a store that has to be waited for are counted in the phase "offload".

    Args:
        budget: bytes that may stay while a job is paused.

    Attributes:
        written, read: bytes so far.

    Raises:
        FewbitError: the store's.
    """

    def __init__(self, store: Store, profiler: Profiler, budget: int = 0) -> None:
        self.written = self.read = 0
        self._store = store
        self._profiler = profiler
        self._budget = budget
        self._mode: Any = _EveryOperation(self._before, self._after)
        self._records: dict[int, _Record] = {}  # by id of the storage; those that died are not in it
        self._present: dict[int, _Record] = {}  # those that are where they belong, the last used at the end
        self._held = 0  # bytes of these
        self._touched: dict[int, _Record] = {}  # by the job that runs, where it must be given them back
        self._paused: dict[int, list[_Record]] = {}  # the same of jobs that do not run
        self._recording = False
        self._freed = 0  # bytes of the heap since memory was last given back

    def __enter__(self) -> None:
        self._mode.__enter__()

    def __exit__(self, *_: object) -> None:
        self._mode.__exit__(None, None, None)
        try:
            for record in list(self._records.values()):
                self._bring_back(record)
        finally:
            self._records.clear()
            self._present.clear()
            self._store.close()

    @property
    def peak(self) -> int:
        """Bytes in the store at a time."""
        return self._store.size

    @contextmanager
    def running(self, job: int) -> Iterator[None]:
        """To be entered while job number `job` computes, and left when it pauses."""
        with self._timed():
            self._make_room()
            for record in self._paused.pop(job, ()):
                self._bring_back(record)
                record.saved = False  # kernels that get an address change it unseen
                self._touch(record)
        self._recording = True
        try:
            yield
        finally:
            self._recording = False
        with self._timed():
            self._paused[job] = list(self._touched.values())
            self._make_room(first=self._paused[job])
            self._touched.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """To be entered while a job computes something that is not its own, such as weights."""
        before, self._recording = self._recording, False
        try:
            yield
        finally:
            self._recording = before

    def notes(self) -> list[str]:
        """Sentences about what was done."""
        if not self.written and not isinstance(self._store, File):  # a folder was asked for
            return []
        written, read, peak = (size(count) for count in (self.written, self.read, self.peak))
        which = "that had no room on the device " if self._budget else ""
        return [
            f"activations of paused batches {which}were kept {self._store.name}: {written} written, {read} read, "
            f"{peak} at a time"
        ]

    def _timed(self) -> AbstractContextManager[None]:
        return self._profiler.time("offload") if self._store.waits else nullcontext()

    def _before(self, func: Any, inputs: list[UntypedStorage]) -> None:
        """Have the inputs of an operation in memory."""
        known = [(id(storage), self._records.get(id(storage))) for storage in inputs]
        needed = {key: record for key, record in known if record is not None}
        if not needed:
            return
        if not all(record.present for record in needed.values()):
            with self._timed():
                for record in needed.values():
                    self._bring_back(record)
        for key, record in needed.items():
            self._present.pop(key, None)
            self._present[key] = record
            record.saved = record.saved and not func._schema.is_mutable
            if self._recording:
                self._touch(record)
        if not self._recording and len(self._present) > RESIDENT_STORAGES and self._held > self._budget:
            with self._timed():
                self._make_room(spare=max(RESIDENT_STORAGES, len(needed)))

    def _after(self, inputs: list[UntypedStorage], outputs: list[UntypedStorage]) -> None:
        """Remember what a job made anew; an output that shares an input's storage is not new."""
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
                and self._store.takes(storage)
            ):
                reference = weakref.ref(storage, self._forgetting(key))
                record = _Record(reference, is_on_cpu(storage), storage.nbytes())
                self._records[key] = record
                self._enter(record, storage)
                self._touch(record)

    def _touch(self, record: _Record) -> None:
        storage = record.storage()
        if not record.on_cpu and storage is not None:
            self._touched[id(storage)] = record

    def _forgetting(self, key: int) -> Callable[[object], None]:
        return lambda _: self._forget(key)

    def _forget(self, key: int) -> None:
        """The storage is gone: its place may be used again."""
        record = self._records.pop(key, None)
        self._touched.pop(key, None)
        if record is None:
            return
        self._leave(key)
        if record.place is not None:
            self._store.release(record.place)

    def _enter(self, record: _Record, storage: UntypedStorage) -> None:
        record.present, record.bytes = True, storage.nbytes()
        self._present[id(storage)] = record
        self._held += record.bytes

    def _leave(self, key: int) -> None:
        record = self._present.pop(key, None)
        self._held -= 0 if record is None else record.bytes

    def _make_room(self, *, spare: int = 0, first: Collection[_Record] = ()) -> None:
        """Put storages in the store until the others fit the budget, besides the `spare` ones that were used last.

        Those whose bytes it has already cost nothing; then come `first`, then those that were used longest ago.
        """
        if self._held <= self._budget:
            return
        known = list(self._present.items())
        leaving, staying = known[: max(0, len(known) - spare)], known[max(0, len(known) - spare) :]
        allowed = self._budget + sum(record.bytes for _, record in staying)
        if self._budget:
            turns = set(first)
            leaving.sort(key=lambda item: 0 if item[1].saved else 1 if item[1] in turns else 2)
        for key, record in leaving:
            if self._held <= allowed:
                break
            self._put_away(key, record)
        if self._freed >= _FREED:
            release_freed_memory()
            self._freed = 0

    def _put_away(self, key: int, record: _Record) -> None:
        """Put a storage in the store, and free its memory."""
        storage = record.storage()
        if storage is None:
            return
        if not storage.resizable():  # its memory was given to numpy or another process
            self._forget(key)
            return
        count = storage.nbytes()
        if not record.saved:
            record.place = self._store.put(storage, record.place)
            self.written += count
            record.saved = True
        # In this order: whatever is interrupted, `present` never says so of an empty storage.
        record.present = False
        self._leave(key)
        record.bytes = count
        self._freed += count if record.on_cpu else 0
        storage.resize_(0)

    def _bring_back(self, record: _Record) -> None:
        storage = record.storage()
        if storage is None or record.present:
            return
        storage.resize_(record.bytes)
        self._store.get(record.place, storage)
        self.read += record.bytes
        self._enter(record, storage)


class _EveryOperation(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, calls `before` and `after` around every operation of torch, with the storages it uses."""

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
    """Of all plain tensors: others have none of their own."""
    for value in values:
        if isinstance(value, Tensor):
            if type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided:
                yield value.untyped_storage()
        elif isinstance(value, (list, tuple)):
            yield from _storages(value)
