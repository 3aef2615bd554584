"""Activations on disk while the batch that they belong to is paused.

At every pause of the walk each batch holds its activations, so with many calibration tokens they are the larger
part of memory. `Spill` keeps in memory only those of the one job that runs: what its operations made and is still
alive when it pauses goes to a scratch file. Whoever uses such a tensor next gets its bytes back first.

`Spill` sees every operation of torch, on the way in and on the way out: outputs are what a job made, inputs are
what must be in memory. Below a tensor it empties and fills the storage; the tensor itself, its views, its identity
and its version stay, wherever references to it are (local variables, containers, Python's stack).

On the CPU every access to a tensor goes through torch, and a tensor is read back when an operation needs it, and
written again only if one changed it. Elsewhere kernels are also launched by address. So there a job gets back all
it had before it runs on, and all of it is written again.
"""

from __future__ import annotations

import ctypes
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ..errors import OutputError
from ..report.words import size
from ..timers import Timers
from .heap import give_freed_memory_back

_SMALLEST = 1 << 16  # bytes of a storage: smaller ones are not worth the trouble
_FREED = 1 << 25  # bytes after which freed memory is given back to the system
KEPT_STORAGES = (
    8  # storages that stay when something outside of the jobs, such as a Hessian, goes through them all
)


class InMemory:
    """Activations stay where they are."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def running(self, job: int) -> AbstractContextManager[None]:
        """To be entered while job number `job` computes, and left when it pauses."""
        return nullcontext()

    def unrecorded(self) -> AbstractContextManager[None]:
        """To be entered while a job computes something that is not its own, such as weights."""
        return nullcontext()

    def notes(self) -> list[str]:
        """Sentences about what was done."""
        return []


def activations(folder: str | Path | None, timers: Timers) -> InMemory:
    """Where activations of paused jobs are kept: in `folder`, or in memory if there is none.

    Raises:
        OutputError: nothing can be written in `folder`.
    """
    return InMemory() if folder is None else Spill(Path(folder), timers)


def check_folder(folder: str | Path) -> None:
    """Raises OutputError if nothing can be written in `folder`."""
    _Scratch(Path(folder)).close()


@dataclass(eq=False)
class _Record:
    """A storage that a job made.

    Attributes:
        on_cpu: whether all accesses to it go through torch.
        place: where it has been written to, and how many bytes; None: not yet.
        present: whether it is in memory. saved: whether the file has the very bytes that it has.
    """

    storage: weakref.ref[UntypedStorage]
    on_cpu: bool
    place: tuple[int, int] | None = None
    present: bool = True
    saved: bool = False


class Spill(InMemory):
    """Activations of paused jobs are in a file in `folder`. Seconds are counted in the phase "offload".

    Must be entered around the whole walk. When it is left, what is still alive is brought back and the file is
    gone, whatever happened.

    Attributes:
        written, read: bytes so far. peak: the scratch file's size.

    Raises:
        OutputError: the file cannot be written or read; where it cannot even be made, at once.
    """

    def __init__(self, folder: Path, timers: Timers) -> None:
        self.written = self.read = self.peak = 0
        self._scratch = _Scratch(folder)
        self._timers = timers
        self._mode: Any = _EveryOperation(self._before, self._after)
        self._records: dict[int, _Record] = {}  # by id of the storage; those that died are not in it
        self._present: dict[int, _Record] = {}  # those in memory, the last used at the end
        self._paused: dict[int, list[_Record]] = {}  # what a job had, where it must be given back
        self._recording = False
        self._freed = 0  # bytes since memory was last given back

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
            self._scratch.close()

    @contextmanager
    def running(self, job: int) -> Iterator[None]:
        """To be entered while job number `job` computes, and left when it pauses."""
        with self._timers.time("offload"):
            self._put_away(keep=0)
            for record in self._paused.pop(job, ()):
                self._bring_back(record)
        self._recording = True
        try:
            yield
        finally:
            self._recording = False
        with self._timers.time("offload"):
            self._paused[job] = [record for record in self._present.values() if not record.on_cpu]
            self._put_away(keep=0)

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """To be entered while a job computes something that is not its own, such as weights."""
        before, self._recording = self._recording, False
        try:
            yield
        finally:
            self._recording = before

    def notes(self) -> list[str]:
        """Sentences about what was done."""
        written, read, peak = (size(count) for count in (self.written, self.read, self.peak))
        return [
            f"activations of paused batches were kept on disk: {written} written, {read} read, {peak} at a time"
        ]

    def _before(self, func: Any, inputs: list[UntypedStorage]) -> None:
        """Have the inputs of an operation in memory."""
        known = [(id(storage), self._records.get(id(storage))) for storage in inputs]
        needed = {key: record for key, record in known if record is not None}
        if not needed:
            return
        if not all(record.present for record in needed.values()):
            with self._timers.time("offload"):
                for record in needed.values():
                    self._bring_back(record)
        for key, record in needed.items():
            self._present.pop(key, None)
            self._present[key] = record
            record.saved = record.saved and not func._schema.is_mutable
        if not self._recording and len(self._present) > KEPT_STORAGES:
            with self._timers.time("offload"):
                self._put_away(keep=max(KEPT_STORAGES, len(needed)))

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
            ):
                reference = weakref.ref(storage, self._forgetting(key))
                self._records[key] = self._present[key] = _Record(reference, _is_cpu(storage))

    def _forgetting(self, key: int) -> Callable[[object], None]:
        return lambda _: self._forget(key)

    def _forget(self, key: int) -> None:
        """The storage is gone: its place may be used again."""
        record = self._records.pop(key, None)
        self._present.pop(key, None)
        if record is not None and record.place is not None:
            self._scratch.release(*record.place)

    def _put_away(self, keep: int) -> None:
        """Write what is in memory to the file, but for the `keep` storages used last, and free it."""
        for key, record in list(self._present.items())[: max(0, len(self._present) - keep)]:
            storage = record.storage()
            if storage is None:
                continue
            if not storage.resizable():  # its memory was given to numpy or another process
                self._forget(key)
                continue
            self._write(record, storage)
            # In this order: whatever is interrupted, `present` never says so of an empty storage.
            record.present = False
            self._present.pop(key, None)
            self._freed += storage.nbytes()
            storage.resize_(0)
        if self._freed >= _FREED:
            give_freed_memory_back()
            self._freed = 0

    def _write(self, record: _Record, storage: UntypedStorage) -> None:
        if record.saved and record.on_cpu:
            return
        count = storage.nbytes()
        if record.place is not None and record.place[1] != count:
            self._scratch.release(*record.place)
            record.place = None
        if record.place is None:
            record.place = (self._scratch.take(count), count)
        self._scratch.write(record.place[0], _memory(_on_cpu(storage)))
        self.written += count
        self.peak = self._scratch.size
        record.saved = True

    def _bring_back(self, record: _Record) -> None:
        storage = record.storage()
        if storage is None or record.present:
            return
        assert record.place is not None
        start, count = record.place
        storage.resize_(count)
        if record.on_cpu:
            self._scratch.read(start, _memory(storage))
        else:
            with _disable_current_modes():
                held = torch.empty(count, dtype=torch.uint8).untyped_storage()
                self._scratch.read(start, _memory(held))
                storage.copy_(held)
        self.read += count
        record.present = True
        self._present[id(storage)] = record


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


def _on_cpu(storage: UntypedStorage) -> UntypedStorage:
    if _is_cpu(storage):
        return storage
    with _disable_current_modes():
        copy: UntypedStorage = storage.cpu()  # type: ignore[no-untyped-call]
        return copy


def _is_cpu(storage: UntypedStorage) -> bool:
    return storage.device.type == "cpu"


def _memory(storage: UntypedStorage) -> memoryview:
    """The bytes of a storage on the CPU, while the caller keeps it. Through numpy it could not be resized any more."""
    return memoryview((ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())).cast("B")


class _Scratch:
    """A file without a name: it is gone as soon as it is closed or the process ends, however that happens.

    Places are used again for the same size: the same shapes come again in every block.
    """

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

    def take(self, count: int) -> int:
        """Where `count` bytes can be written."""
        if self._free[count]:
            return self._free[count].pop()
        start, self.size = self.size, self.size + count
        return start

    def release(self, start: int, count: int) -> None:
        """Let these bytes be written over."""
        self._free[count].append(start)

    def write(self, start: int, data: memoryview) -> None:
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

    def read(self, start: int, into: memoryview) -> None:
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

    def close(self) -> None:
        self._file.close()
