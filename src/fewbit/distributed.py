"""Several processes, one run: who walks which batches, who solves which rows, how they stay together.

Contract: the only file that imports torch.distributed. Everything else sees a `Communicator`: of one process, where
every method is trivial, or of several, where all of them call the same methods in the same order. What they
exchange are sums of integers, rows and small values, in the order of batches and of rows, so the result does not
depend on how these are shared.

    batches    consecutive shares, in rank order             share
    Hessians   sums over the shares                          add_, total, gather
    rows of W  consecutive shares, each solved by one rank   part
    disk       the leader (rank 0) reads and writes          from_leader, tensors_from_leader

A rank that fails says why in the group's key-value store and closes its connections. That breaks whatever the
others wait for; they find the reason in the store and raise it too. A rank that dies says nothing: the others
report who did not answer.
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

T = TypeVar("T")

# Rows of W are divided in multiples of this. With a few rows a matrix product takes other ways, and rounds in
# another order, than with many; from here on a row comes out the same, whatever rows are beside it.
ROWS_TOGETHER = 32

# How long a rank waits for the others, who may have long work of their own (writing, measuring). A process that
# ends is noticed at once; only a machine that falls silent is waited for so long.
_TIMEOUT = timedelta(hours=2)
_ANSWER_SECONDS = 3.0  # for those who are left to say so
_LEADER_SECONDS = 10.0  # for the leader to notice a failure, so that it reports it
_INTERRUPTED_SECONDS = 1.0  # the same, when all processes are told to end
_CPU = torch.device("cpu")
_LAST = torch.iinfo(torch.int64).max  # after every position


@dataclass(frozen=True)
class Part:
    """This rank's rows of a matrix.

    Attributes:
        rows: which ones. total: sums figures of these rows, (rows, …), over all rows of the matrix, in their order.
            gather: puts tensors with these rows of every part together, (all rows, …).
    """

    rows: slice
    total: Callable[[Tensor], Tensor]
    gather: Callable[[Tensor], Tensor]


class Communicator:
    """The ranks of one run: here a process on its own.

    Attributes:
        rank: of this process, 0 … world − 1. world: how many there are.
    """

    rank = 0
    world = 1

    @property
    def leader(self) -> bool:
        """Whether this process reads and writes the output folder, and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's items: consecutive ones, none where there are fewer than ranks before it."""
        bounds = _bounds(len(items), self.world)
        return items[bounds[self.rank] : bounds[self.rank + 1]]

    def first(self, position: int | None) -> int | None:
        """The smallest position of all ranks; None where nobody has one."""
        return position

    def add_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over all ranks."""

    def total(self, *counts: int) -> list[int]:
        """Each count summed over all ranks."""
        return list(counts)

    def all(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on all ranks."""
        return list(flags)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows (any number, …) of all ranks, in rank order."""
        return rows

    def part(self, rows: int) -> Part:
        """How a matrix with so many rows is divided. One that is too small for it is everybody's.

        Everybody has at least `ROWS_TOGETHER` rows.
        """
        return Part(slice(0, rows), _summed, _same)

    def collect(self, value: T) -> list[T]:
        """The values of all ranks, in rank order; any picklable ones."""
        return [value]

    def from_leader(self, value: T) -> T:
        """The leader's value, on all ranks; any picklable one."""
        return value

    def tensors_from_leader(self, read: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors, by name and on the CPU, that `read` returns on the leader; it is called there alone."""
        return dict(read())

    def alike(self, **facts: str) -> None:
        """Make sure that all ranks have the same facts, by name, and machines that compute alike.

        What follows from the same sums (does a matrix factor?) has to come out the same everywhere.

        Raises:
            RankError: a rank has others.
        """
        mine = {**facts, **_machine()}
        for rank, others in enumerate(self.collect(mine)):
            different = [name.replace("_", " ") for name, value in mine.items() if others[name] != value]
            if different:
                raise RankError(
                    f"rank {rank} has another {' and another '.join(different)} than rank {self.rank}: start all "
                    "processes with the same command and files, on machines of one kind"
                )


class _Group(Communicator):
    """Several processes, connected; what the methods do is said above."""

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        # A group of our own can be closed to let the others know; CPU tensors always go through gloo.
        backend = "cpu:gloo,cuda:nccl" if "nccl" in str(dist.get_backend_config()) else "gloo"
        self._group: Any = dist.new_group(backend=backend, timeout=_TIMEOUT)
        self._notes = _Notes(self._group.group_name, self.rank, self.world)
        self.total(0)  # nobody goes on, and perhaps ends, before all are connected

    def first(self, position: int | None) -> int | None:
        lowest = torch.tensor(_LAST if position is None else position)
        self._exchange(dist.all_reduce, lowest, op=dist.ReduceOp.MIN)
        return None if int(lowest) == _LAST else int(lowest)

    def add_(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            self._exchange(dist.all_reduce, tensor, device=tensor.device)

    def total(self, *counts: int) -> list[int]:
        sums = torch.tensor(counts, dtype=torch.int64)
        self.add_(sums)
        return [int(value) for value in sums]

    def all(self, *flags: bool) -> list[bool]:
        return [count == 0 for count in self.total(*(not flag for flag in flags))] if flags else []

    def gather(self, rows: Tensor) -> Tensor:
        return self._gather(rows, self.total(*(rows.shape[0] * (r == self.rank) for r in range(self.world))))

    def part(self, rows: int) -> Part:
        if rows < self.world * ROWS_TOGETHER:
            return super().part(rows)
        bounds = row_bounds(rows, self.world)
        sizes = [b - a for a, b in pairwise(bounds)]

        def gather(part: Tensor) -> Tensor:
            return self._gather(part, sizes)

        return Part(
            slice(bounds[self.rank], bounds[self.rank + 1]), lambda part: _summed(gather(part)), gather
        )

    def collect(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.world
        self._exchange(dist.all_gather_object, values, value)
        return values

    def from_leader(self, value: T) -> T:
        values: list[Any] = [value if self.leader else None]
        self._exchange(dist.broadcast_object_list, values, group_src=0)
        told: T = values[0]
        return told

    def tensors_from_leader(self, read: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        tensors = {name: tensor.contiguous() for name, tensor in read().items()} if self.leader else {}
        shapes = self.from_leader({name: (t.shape, t.dtype) for name, t in tensors.items()})
        for name, (shape, dtype) in shapes.items():
            tensor = tensors.setdefault(name, torch.empty(shape, dtype=dtype))
            self._exchange(dist.broadcast, _bytes(tensor), group_src=0)
        return tensors

    def failed(self, error: BaseException) -> None:
        """Let the others know why this rank leaves, and close its connections."""
        self._notes.leave(error)
        self.close()

    def close(self) -> None:
        """Leave the group; pending exchanges of others break."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _gather(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """`rows` of ranks that have `sizes` of them. As bytes, padded to the largest: backends want that."""
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
                # NCCL only queues its work. With a rank that is gone it would wait for the whole timeout; gloo notices.
                dist.all_reduce(torch.zeros(1), group=self._group)
            collective(*args, group=self._group, **kwargs)
        except RuntimeError as error:  # torch's errors of communication have no closer class in common
            # Its traceback would hold on to the group, whose connections then stay open.
            raise self._notes.reason(str(error)) from error.with_traceback(None)


class _Notes:
    """What the ranks of one group leave in the key-value store when it breaks."""

    def __init__(self, group: str, rank: int, world: int) -> None:
        self._store = dist.distributed_c10d._get_default_store()
        self._keys = [f"fewbit/{group}/{rank}" for rank in range(world)]
        self._rank, self._world = rank, world

    def leave(self, error: BaseException) -> None:
        """Write why this rank ends."""
        _tell(self._store, self._keys[self._rank], json.dumps([type(error).__name__, str(error)]))

    def reason(self, symptom: str) -> FewbitError:
        """Why the group broke, as far as the ranks that are left say so."""
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
        """Add the notes that are there; whether one of them tells the cause, or all have one."""
        for rank, key in enumerate(self._keys):
            if rank not in notes and self._store.check([key]):
                notes[rank] = json.loads(self._store.get(key))
        return len(notes) == self._world or any(map(_is_cause, notes.values()))


def _is_cause(note: list[str] | None) -> TypeGuard[list[str]]:
    """Whether a rank ended by itself, not because another one did."""
    return note is not None and note[0] != KeyboardInterrupt.__name__


def _until(done: Callable[[], bool], seconds: float) -> bool:
    """Ask the store again and again; False where the time is over, or the store is gone."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if done():
                return True
            time.sleep(0.05)
        except KeyboardInterrupt:  # torchrun ends all processes when one has ended: be quick
            end = min(end, time.monotonic() + _INTERRUPTED_SECONDS)
        except RuntimeError:  # it went with the process that held it
            return False
    return False


def _tell(store: Any, key: str, value: str) -> None:
    try:
        store.set(key, value)
    except RuntimeError:  # the store went with the process that held it: nobody can be told
        return


def _shortened(symptom: str) -> str:
    """What torch says, without where in its code and what to do."""
    return symptom.splitlines()[0].partition("] ")[2].partition(". ")[0] or symptom


_GO_ON = (
    "If an output folder was given, finished blocks are safe in it: start the same command again to go on, with as "
    "many processes as you like."
)


def _raised_elsewhere(rank: int, kind: str, message: str) -> FewbitError:
    """The error that another rank raised, in its own class where it is one of fewbit's."""
    found = getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, FewbitError):
        return found(message)
    return RankError(f"rank {rank} failed: {kind}: {message}. {_GO_ON}")


@contextmanager
def current() -> Iterator[Communicator]:
    """The ranks of this run: those of torch.distributed's process group, if there is one.

    An error inside ends all ranks, each with this error.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield Communicator()
        return
    group = _Group()
    with _Closing(group):
        yield group


class _Closing:
    """Leaves the group at the end, with the reason if that is an error."""

    def __init__(self, group: _Group) -> None:
        self._group = group

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self._group.close()
        else:
            self._group.failed(error)


def launched_rank() -> int | None:
    """The rank that torchrun gave to this process; None where it was not started by torchrun, or alone."""
    if launched_processes() == 1 or "RANK" not in os.environ:
        return None
    return int(os.environ["RANK"])


def row_bounds(rows: int, world: int) -> list[int]:
    """Where the parts of a matrix begin and end: world + 1 numbers, multiples of `ROWS_TOGETHER` but for the last."""
    return [ROWS_TOGETHER * bound for bound in _bounds(rows // ROWS_TOGETHER, world)[:-1]] + [rows]


def most_rows(rows: int, world: int) -> int:
    """How many rows the rank that has most of them solves."""
    if rows < world * ROWS_TOGETHER:
        return rows
    return max(b - a for a, b in pairwise(row_bounds(rows, world)))


def launched_processes() -> int:
    """How many processes torchrun started; 1 where it did not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def threads_of_each(processes: int) -> int | None:
    """How many threads each of so many processes on this machine uses; None: as many as the user said."""
    # torchrun sets 1 where the user set nothing, so that processes do not fight for cores.
    if os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes)


@contextmanager
def joined(device: str) -> Iterator[bool]:
    """While entered, a process that torchrun started is one of its ranks; True where it speaks: rank 0, or alone.

    It takes the GPU, or the share of the cores, that its number on this machine stands for. SIGTERM, with which
    torchrun ends the other processes when one has ended, is taken like Ctrl-C. An error is left to rank 0 to
    report where it knows of it: the others then exit with the command's code for errors.

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
    """Leave an error to rank 0, if that has one to report too."""
    store, key = dist.distributed_c10d._get_default_store(), "fewbit/reported"
    try:
        yield
    except FewbitError:
        if rank == 0:
            _tell(store, key, "")
        elif _until(lambda: store.check([key]), _LEADER_SECONDS):
            raise SystemExit(2) from None
        raise


def _take_device(device: str) -> None:
    """Make this process's GPU the current one, or use its share of the cores."""
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
    threads = threads_of_each(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if threads is not None:
        torch.set_num_threads(threads)


def _machine() -> dict[str, str]:
    """What decides how this process rounds."""
    return {
        "version of torch": torch.__version__,
        "kind of processor": torch.backends.cpu.get_cpu_capability(),
        "kind of GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "solver (compiled or not)": str(native.available()),
    }


def _bounds(count: int, world: int) -> list[int]:
    """Where the consecutive shares of `count` things begin and end: world + 1 numbers."""
    return [count * rank // world for rank in range(world + 1)]


def _bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor, uint8, one-dimensional."""
    return tensor.reshape(-1).view(torch.uint8)


def _numbered(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _summed(rows: Tensor) -> Tensor:
    return rows.sum(0)
