"""How the C library keeps freed memory: as little as possible, while weights and activations come and go."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE = 1 << 20  # bytes
_USUAL = 32 << 20  # to which glibc's own threshold climbs


def give_freed_memory_back() -> None:
    """Let the C library hand free memory to the system."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


@contextmanager
def large_tensors_apart() -> Iterator[None]:
    """While entered, a large tensor has pages of its own, which go back to the system with it.

    By itself glibc learns to put them on its heap, which is faster by a little and grows, because its holes never
    fit: by a quarter over sixteen blocks where nothing but holes was added.
    """
    mallopt = _glibc("mallopt")
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _USUAL)
        give_freed_memory_back()


def _glibc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
