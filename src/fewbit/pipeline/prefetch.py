"""Reads the next block's tensors from the files while the device computes with the current block.

One thread reads one shard at a time into host memory, which is pinned for a CUDA device so that copies to it are
asynchronous. An error in the thread is raised where the tensors are taken. A shard that is not used costs only the
reading. The thread ends with the ``with`` block of `prefetching`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

from torch import Tensor

from ..checkpoint.safetensors_file import FileTensor

HostTensors = Mapping[FileTensor, Tensor]


class Prefetcher:
    """Reads one shard after the other in a background thread.

    Args:
        pinned: True for page-locked host memory.

    Attributes:
        used: Number of prefetched shards that were taken.
    """

    def __init__(self, thread: ThreadPoolExecutor, *, pinned: bool) -> None:
        self.used = 0
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
            tensors = self._reading.result()
        finally:  # after an interrupt the thread stops at the next tensor
            self.cancel()
        self.used += 1
        return tensors

    def cancel(self) -> None:
        self._cancelled.set()
        self._reading = None


@contextmanager
def prefetching(*, pinned: bool) -> Iterator[Prefetcher]:
    """Provide a `Prefetcher` while entered."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="fewbit-prefetch") as thread:
        prefetcher = Prefetcher(thread, pinned=pinned)
        try:
            yield prefetcher
        finally:
            prefetcher.cancel()


def _read(tensors: Collection[FileTensor], cancelled: Event, pinned: bool) -> HostTensors:
    result: dict[FileTensor, Tensor] = {}
    for tensor in tensors:
        if cancelled.is_set():
            break
        result[tensor] = tensor.read(pinned=pinned)
    return result
