"""The next block's tensors, read from the files while the walk computes with this one.

Contract: one thread, one unit at a time, and host memory for that one: pinned for a CUDA device, so that the copy to it
needs nobody to wait. What goes wrong in the thread is raised where its tensors are taken. A unit that was read in vain
costs the reading. The thread ends with the block that `reading_ahead` is entered for, however that ends.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event

from torch import Tensor

from ..checkpoint.file_tensor import FileTensor

Held = Mapping[FileTensor, Tensor]


@dataclass
class _Unit:
    """A unit that is being read, or was; whoever sets `given_up` makes the thread leave it at the next tensor."""

    name: str
    given_up: Event = field(default_factory=Event)
    reading: Future[Held] | None = None


class ReadAhead:
    """Reads one unit after the other in a thread of its own.

    Args:
        pinned: whether tensors are to lie in pinned memory, from which a GPU copies by itself.

    Attributes:
        units: how many were taken that the thread had read.
    """

    def __init__(self, thread: ThreadPoolExecutor, *, pinned: bool) -> None:
        self.units = 0
        self._thread = thread
        self._pinned = pinned
        self._unit: _Unit | None = None

    def start(self, name: str, tensors: Collection[FileTensor]) -> None:
        """Begin to read the tensors of the unit `name`; another one that was begun is given up."""
        if self._unit is not None and self._unit.name == name:
            return
        self.give_up()
        self._unit = _Unit(name)
        self._unit.reading = self._thread.submit(_read, tensors, self._unit.given_up, self._pinned)

    def take(self, name: str) -> Held:
        """The tensors of the unit `name`, as soon as they are there; none if it was not begun.

        Raises:
            ModelError: a file cannot be read.
        """
        unit = self._unit
        if unit is None or unit.name != name or unit.reading is None:
            return {}
        try:
            held = unit.reading.result()
        finally:  # whoever is interrupted here waits for one tensor more, not for all of them
            self.give_up()
        self.units += 1
        return held

    def give_up(self) -> None:
        """Let go of a unit that was begun."""
        if self._unit is not None:
            self._unit.given_up.set()
            self._unit = None


@contextmanager
def reading_ahead(*, pinned: bool) -> Iterator[ReadAhead]:
    """While entered, units can be read ahead."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="fewbit-read-ahead") as thread:
        ahead = ReadAhead(thread, pinned=pinned)
        try:
            yield ahead
        finally:
            ahead.give_up()


def _read(tensors: Collection[FileTensor], given_up: Event, pinned: bool) -> Held:
    held: dict[FileTensor, Tensor] = {}
    for tensor in tensors:
        if given_up.is_set():
            break
        held[tensor] = tensor.read(pinned=pinned)
    return held
