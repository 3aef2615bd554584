"""How many bytes of tensors a computation holds: counted, not guessed.

Contract: while a `LiveBytes` is entered, every tensor storage that an operation makes is counted until it is
freed. Weights and inputs that were there before are not. What libraries take for themselves inside one
operation (a packed copy of a matrix, say) is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What is smaller may stay with the C library for a while when it is freed; what is larger goes back to the system at
# once, with any setting of glibc.
HEAP_BYTES = 1 << 25


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages made inside and still in use.

    Attributes:
        now: at this moment. peak: at most since the start, or since the last `mark`.
        heap: at this moment, of storages smaller than `heap_bytes`.
    """

    def __init__(self, heap_bytes: int = HEAP_BYTES) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._heap_bytes = heap_bytes
        self.now = self.peak = self.heap = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def mark(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now

    def alive(self) -> dict[int, int]:
        """Storage (by a number of its own while it lives) → its bytes, for all that are counted."""
        found = ((key, reference()) for key, reference in self._known.items())
        return {key: storage.nbytes() for key, storage in found if storage is not None}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the operation, and count what it made."""
        result = func(*args, **(kwargs or {}))
        given = {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if id(storage) not in given and id(storage) not in self._known:
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def freed(_: object) -> None:
            self._known.pop(key, None)
            self.now -= size
            self.heap -= size if size < self._heap_bytes else 0

        # torch keeps one Python object for a storage as long as the storage lives.
        self._known[key] = weakref.ref(storage, freed)
        self.now += size
        self.heap += size if size < self._heap_bytes else 0
        self.peak = max(self.peak, self.now)


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for value in tree_leaves(values):
        if isinstance(value, torch.Tensor) and value.layout is torch.strided:
            yield value.untyped_storage()
