"""Reads the next block's tensors from the files while the device computes with the current block.

One thread reads one shard at a time into host memory, which is pinned for a CUDA device so that copies to it are
asynchronous. An error in the thread is raised where the tensors are taken. A shard that is not used costs only the
reading.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event

from torch import Tensor

from ..checkpoint.safetensors_file import FileTensor

HostTensors = Mapping[FileTensor, Tensor]


class Prefetcher:
    """Reads one shard after the other in a background thread, into page-locked memory if `pinned`."""

    def __init__(self, thread: ThreadPoolExecutor, *, pinned: bool) -> None:
        self._thread = thread
        self._pinned = pinned
        self._shard = ""
        self._cancelled = Event()
        self._reading: Future[HostTensors] | None = None

    def start(self, shard: str, tensors: Collection[FileTensor]) -> None:
        """Begin to read the tensors of `shard`; cancel another shard that was begun."""
        if self._reading is not None and self._shard == shard:
            return
        self.cancel()
        self._shard, self._cancelled = shard, Event()
        self._reading = self._thread.submit(_read, tensors, self._cancelled, self._pinned)

    def take(self, shard: str) -> HostTensors:
        """Wait for the tensors of `shard` and return them; return none if it was not begun.

        Raises:
            ModelError: A file cannot be read.
        """
        if self._reading is None or self._shard != shard:
            return {}
        try:
            return self._reading.result()
        finally:  # after an interrupt the thread stops at the next tensor
            self.cancel()

    def cancel(self) -> None:
        self._cancelled.set()
        self._reading = None


def _read(tensors: Collection[FileTensor], cancelled: Event, pinned: bool) -> HostTensors:
    result: dict[FileTensor, Tensor] = {}
    for tensor in tensors:
        if cancelled.is_set():
            break
        result[tensor] = tensor.read(pinned=pinned)
    return result
