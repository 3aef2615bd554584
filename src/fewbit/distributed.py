"""Distributed runs: ranks share the calibration batches and the rows of every weight matrix.

Contract: this is the only file that imports torch.distributed. Everything else sees a `Communicator`. In a single
process its methods are trivial; in several, every rank calls the same methods in the same order. Ranks exchange sums of
integers, rows, and small values, in batch order and row order, so the result does not depend on the number of ranks.

    batches    consecutive shares in rank order              share
    Hessians   integer sums over the shares                  all_reduce_, all_reduce_sum, all_gather_rows
    rows of W  consecutive shards, one rank solves each      row_shard
    disk       rank 0 reads and writes                       broadcast_object, broadcast_tensors

A rank that fails posts its error in the group's key-value store and closes its connections. This breaks the pending
collectives of the other ranks, which read the error from the store and raise it too. A rank that is killed posts
nothing: the others report which rank did not answer.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import errors, native
from .errors import ConfigError, FewbitError, RankError
from .torch_internals import default_store

T = TypeVar("T")

# Row shards are multiples of this many rows. A matrix product with fewer rows takes another code path and rounds in
# another order; from here on, each row of a product is the same whatever rows are beside it.
ROW_MULTIPLE = 32

# A rank waits this long for the others, which may be busy with long local work (writing, measuring). The end of a
# process is noticed at once; only a machine that falls silent takes the whole timeout.
_TIMEOUT = timedelta(hours=2)
_ANSWER_SECONDS = 3.0  # for the remaining ranks to post that they are alive
_LEADER_SECONDS = 10.0  # for rank 0 to notice a failure, so that it reports the error
_INTERRUPTED_SECONDS = 1.0  # the same, when all processes receive SIGTERM
_CPU = torch.device("cpu")
_LAST = torch.iinfo(torch.int64).max  # after every position


@dataclass(frozen=True)
class RowShard:
    """This rank's rows of a matrix.

    Attributes:
        rows: slice of the matrix rows that this rank solves.
        reduce: function that sums per-row statistics of this shard, (rows, ...), over all rows of the matrix, in row
            order.
        gather: function that concatenates the shards of all ranks, (all rows, ...).
    """

    rows: slice
    reduce: Callable[[Tensor], Tensor]
    gather: Callable[[Tensor], Tensor]


class Communicator:
    """The ranks of one run. This base class is a single process.

    Attributes:
        rank: rank of this process, 0 ... world_size − 1.
        world_size: number of ranks.
    """

    rank = 0
    world_size = 1

    @property
    def is_leader(self) -> bool:
        """True on rank 0, which owns the output folder and the console."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this rank's consecutive items; empty if there are fewer items than ranks."""
        bounds = _bounds(len(items), self.world_size)
        return items[bounds[self.rank] : bounds[self.rank + 1]]

    def all_reduce_min(self, position: int | None) -> int | None:
        """Return the smallest position of all ranks; None where every rank passes None."""
        return position

    def all_reduce_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over all ranks, in place."""

    def all_reduce_sum(self, *counts: int) -> list[int]:
        """Return the sum of each count over all ranks."""
        return list(counts)

    def all_reduce_and(self, *flags: bool) -> list[bool]:
        """Return, for each flag, whether it is True on all ranks."""
        return list(flags)

    def all_gather_rows(self, rows: Tensor) -> Tensor:
        """Concatenate the rows (any number, ...) of all ranks, in rank order."""
        return rows

    def row_shard(self, rows: int, multiple: int = ROW_MULTIPLE) -> RowShard:
        """Divide a matrix of this many rows over the ranks, in whole multiples.

        Every rank gets at least `multiple` rows. A matrix too small for that is solved whole on every rank.
        """
        return RowShard(slice(0, rows), _summed, _same)

    def all_gather_object(self, value: T) -> list[T]:
        """Return the picklable values of all ranks, in rank order."""
        return [value]

    def broadcast_object(self, value: T) -> T:
        """Return rank 0's picklable value on all ranks."""
        return value

    def broadcast_tensors(self, read: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return the CPU tensors that `read` returns on rank 0, by name. `read` is called on rank 0 only."""
        return dict(read())

    def assert_same(self, **facts: str) -> None:
        """Check that all ranks have the same facts and run on machines that round alike.

        Decisions made from identical sums (does this matrix factor?) must come out the same on every rank.

        Raises:
            RankError: a rank has other facts.
        """
        mine = {**facts, **_machine()}
        for rank, others in enumerate(self.all_gather_object(mine)):
            different = [name.replace("_", " ") for name, value in mine.items() if others[name] != value]
            if different:
                raise RankError(
                    f"rank {rank} has another {' and another '.join(different)} than rank {self.rank}: start all "
                    "processes with the same command and files, on machines of one kind"
                )


class _Group(Communicator):
    """Several connected processes; the base class documents the methods."""

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        # A separate group can be closed to wake up the other ranks. CPU tensors always go through gloo.
        backend = "cpu:gloo,cuda:nccl" if "nccl" in str(dist.get_backend_config()) else "gloo"
        self._group: Any = dist.new_group(backend=backend, timeout=_TIMEOUT)
        self._board = _ErrorBoard(self._group.group_name, self.rank, self.world_size)
        self.all_reduce_sum(0)  # barrier: no rank may end before all are connected

    def all_reduce_min(self, position: int | None) -> int | None:
        lowest = torch.tensor(_LAST if position is None else position)
        self._exchange(dist.all_reduce, lowest, op=dist.ReduceOp.MIN)
        return None if int(lowest) == _LAST else int(lowest)

    def all_reduce_(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            self._exchange(dist.all_reduce, tensor, device=tensor.device)

    def all_reduce_sum(self, *counts: int) -> list[int]:
        sums = torch.tensor(counts, dtype=torch.int64)
        self.all_reduce_(sums)
        return [int(value) for value in sums]

    def all_reduce_and(self, *flags: bool) -> list[bool]:
        return [count == 0 for count in self.all_reduce_sum(*(not flag for flag in flags))] if flags else []

    def all_gather_rows(self, rows: Tensor) -> Tensor:
        return self._gather(
            rows, self.all_reduce_sum(*(rows.shape[0] * (r == self.rank) for r in range(self.world_size)))
        )

    def row_shard(self, rows: int, multiple: int = ROW_MULTIPLE) -> RowShard:
        if rows < self.world_size * multiple:
            return super().row_shard(rows)
        bounds = row_bounds(rows, self.world_size, multiple)
        sizes = [b - a for a, b in pairwise(bounds)]

        def gather(part: Tensor) -> Tensor:
            return self._gather(part, sizes)

        return RowShard(
            slice(bounds[self.rank], bounds[self.rank + 1]), lambda part: _summed(gather(part)), gather
        )

    def all_gather_object(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.world_size
        self._exchange(dist.all_gather_object, values, value)
        return values

    def broadcast_object(self, value: T) -> T:
        values: list[Any] = [value if self.is_leader else None]
        self._exchange(dist.broadcast_object_list, values, group_src=0)
        told: T = values[0]
        return told

    def broadcast_tensors(self, read: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        tensors = {name: tensor.contiguous() for name, tensor in read().items()} if self.is_leader else {}
        shapes = self.broadcast_object({name: (t.shape, t.dtype) for name, t in tensors.items()})
        for name, (shape, dtype) in shapes.items():
            tensor = tensors.setdefault(name, torch.empty(shape, dtype=dtype))
            self._exchange(dist.broadcast, _bytes(tensor), group_src=0)
        return tensors

    def failed(self, error: BaseException) -> None:
        """Post why this rank fails, and close its connections."""
        self._board.post(error)
        self.close()

    def close(self) -> None:
        """Leave the group; this breaks the pending collectives of the other ranks."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _gather(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """Concatenate the rows of all ranks, ``sizes[r]`` of rank r. Sent as bytes, padded to one size."""
        largest = max(sizes)
        if largest == 0:
            return rows
        mine = rows.new_zeros(largest, *rows.shape[1:])
        mine[: rows.shape[0]] = rows
        received = [torch.empty_like(mine) for _ in sizes]
        every = [_bytes(tensor) for tensor in received]
        self._exchange(dist.all_gather, every, _bytes(mine), device=rows.device)
        return torch.cat([tensor[:size] for tensor, size in zip(received, sizes, strict=True)])

    def _exchange(
        self, collective: Callable[..., Any], *args: Any, device: torch.device = _CPU, **kwargs: Any
    ) -> None:
        try:
            if device.type != "cpu":
                # NCCL only queues its work and would wait the whole timeout for a dead rank; gloo notices it.
                dist.all_reduce(torch.zeros(1), group=self._group)
            collective(*args, group=self._group, **kwargs)
        except RuntimeError as error:  # torch's communication errors share no narrower class
            # The traceback would keep the group, and so its connections, alive.
            raise self._board.reason(str(error)) from error.with_traceback(None)


class _ErrorBoard:
    """Error messages that the ranks of a group post in its key-value store when it breaks."""

    def __init__(self, group: str, rank: int, world: int) -> None:
        self._store = default_store()
        self._keys = [f"fewbit/{group}/{rank}" for rank in range(world)]
        self._rank, self._world = rank, world

    def post(self, error: BaseException) -> None:
        """Post why this rank ends."""
        _tell(self._store, self._keys[self._rank], json.dumps([type(error).__name__, str(error)]))

    def reason(self, symptom: str) -> FewbitError:
        """Return the error that broke the group, as far as the remaining ranks know it."""
        _tell(self._store, self._keys[self._rank], json.dumps(None))
        notes: dict[int, list[str] | None] = {}
        _until(lambda: self._read(notes), _ANSWER_SECONDS)
        for rank, note in notes.items():
            if _is_cause(note):
                return _raised_elsewhere(rank, *note)
        gone = [rank for rank in range(self._world) if rank not in notes and rank != self._rank]
        if notes and not gone:
            return RankError(f"the run was interrupted. {_GO_ON}")
        who = f"{_numbered(gone)} of {self._world} did not answer" if notes else "another process has ended"
        left = _numbered(sorted({*notes, self._rank}))
        return RankError(
            f"{who}: killed, out of memory, or on a machine that is gone; {left} left "
            f"({_shortened(symptom)}). {_GO_ON}"
        )

    def _read(self, notes: dict[int, list[str] | None]) -> bool:
        """Add new notes; True once one of them tells the cause, or every rank has posted."""
        for rank, key in enumerate(self._keys):
            if rank not in notes and self._store.check([key]):
                notes[rank] = json.loads(self._store.get(key))
        return len(notes) == self._world or any(map(_is_cause, notes.values()))


def _is_cause(note: list[str] | None) -> TypeGuard[list[str]]:
    """Whether a rank failed first, rather than being interrupted because another one failed."""
    return note is not None and note[0] != KeyboardInterrupt.__name__


def _until(done: Callable[[], bool], seconds: float) -> bool:
    """Poll until `done`; False after the timeout, or if the store is gone."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if done():
                return True
            time.sleep(0.05)
        except KeyboardInterrupt:  # torchrun stops all processes when one has ended: be quick
            end = min(end, time.monotonic() + _INTERRUPTED_SECONDS)
        except RuntimeError:  # the process that held the store is gone
            return False
    return False


def _tell(store: Any, key: str, value: str) -> None:
    try:
        store.set(key, value)
    except RuntimeError:  # the process that held the store is gone
        return


def _shortened(symptom: str) -> str:
    """Strip the source location and the advice from one of torch's messages."""
    return symptom.splitlines()[0].partition("] ")[2].partition(". ")[0] or symptom


_GO_ON = (
    "If an output folder was given, finished blocks are safe in it: start the same command again to go on, with as "
    "many processes as you like."
)


def _raised_elsewhere(rank: int, kind: str, message: str) -> FewbitError:
    """Rebuild the error of another rank, in its own class if it is one of fewbit's."""
    found = getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, FewbitError):
        return found(message)
    return RankError(f"rank {rank} failed: {kind}: {message}. {_GO_ON}")


@contextmanager
def open_communicator() -> Iterator[Communicator]:
    """Yield a communicator over torch.distributed's default process group, or of a single process if there is none.

    An error inside the context ends all ranks, each with that error.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield Communicator()
        return
    group = _Group()
    try:
        yield group
    except BaseException as error:
        group.failed(error)
        raise
    else:
        group.close()


def launched_rank() -> int | None:
    """Return the rank that torchrun gave this process; None without torchrun, or if it is the only process."""
    if launched_processes() == 1 or "RANK" not in os.environ:
        return None
    return int(os.environ["RANK"])


def row_bounds(rows: int, world: int, multiple: int = ROW_MULTIPLE) -> list[int]:
    """Return the boundaries of the row shards: world + 1 numbers, whole multiples except for the last."""
    return [multiple * bound for bound in _bounds(rows // multiple, world)[:-1]] + [rows]


def largest_shard(rows: int, world: int) -> int:
    """Return the size of the largest row shard."""
    if rows < world * ROW_MULTIPLE:
        return rows
    return max(b - a for a, b in pairwise(row_bounds(rows, world)))


def launched_processes() -> int:
    """Return the number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def threads_per_process(processes: int) -> int | None:
    """Return the threads for each process on this machine; None if the user set OMP_NUM_THREADS."""
    # torchrun sets 1 if the user set nothing.
    if os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes)


@contextmanager
def torchrun_session(device: str) -> Iterator[bool]:
    """Join the process group of a torchrun launch while entered; yields whether this process is the leader.

    The process takes the GPU of its local rank, or its share of the CPU cores. SIGTERM, which torchrun sends to the
    remaining processes when one ends, is handled like Ctrl-C. If rank 0 reports an error, the other ranks exit silently
    with the command's error code.

    Args:
        device: "auto", "cpu" or "cuda": without a number.

    Raises:
        ConfigError: a device with a number.
        RankError: the processes cannot reach each other.
    """
    rank = launched_rank()
    if rank is None:
        yield True
        return
    _take_device(device)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"rank {rank} cannot reach the others at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: "
            f"{str(error).splitlines()[0]}. Check the address and the firewall, then start again"
        ) from error
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with _leader_reports(rank):
            yield rank == 0
    finally:
        signal.signal(signal.SIGTERM, before)
        dist.destroy_process_group()


@contextmanager
def _leader_reports(rank: int) -> Iterator[None]:
    """Let rank 0 report the error, if it has one to report too."""
    store, key = default_store(), "fewbit/reported"
    try:
        yield
    except FewbitError:
        if rank == 0:
            _tell(store, key, "")
        elif _until(lambda: store.check([key]), _LEADER_SECONDS):
            raise SystemExit(2) from None
        raise


def _take_device(device: str) -> None:
    """Make the GPU of this local rank the current one, or take this process's share of the cores."""
    if ":" in device:
        raise ConfigError(
            f"device {device!r} would be every process's: with torchrun give cuda (or auto), each process takes the "
            "GPU of its number"
        )
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device in ("auto", "cuda") and torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local} of this machine has no GPU of its own, there are {torch.cuda.device_count()}: start "
                "fewer processes, or give --device cpu"
            )
        torch.cuda.set_device(local)
        return
    threads = threads_per_process(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if threads is not None:
        torch.set_num_threads(threads)


def _machine() -> dict[str, str]:
    """Return what determines the rounding of this process."""
    return {
        "version of torch": torch.__version__,
        "kind of processor": torch.backends.cpu.get_cpu_capability(),
        "kind of GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "solver (compiled or not)": str(native.available()),
    }


def _bounds(count: int, world: int) -> list[int]:
    """Return the boundaries of consecutive shares of `count` items: world + 1 numbers."""
    return [count * rank // world for rank in range(world + 1)]


def _bytes(tensor: Tensor) -> Tensor:
    """View a contiguous tensor as one-dimensional uint8."""
    return tensor.reshape(-1).view(torch.uint8)


def _numbered(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _summed(rows: Tensor) -> Tensor:
    return rows.sum(0)
