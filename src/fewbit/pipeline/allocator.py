"""The C library's allocator: freed memory goes back to the system."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_M_MMAP_THRESHOLD = -3  # malloc.h
_OWN_PAGES = 1 << 20  # bytes from which a tensor gets its own pages
_ADAPTIVE_MAXIMUM = 32 << 20  # bytes; largest value of glibc's adaptive threshold


def release_freed_memory() -> None:
    """Make the C library return freed memory to the system."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


@contextmanager
def own_pages_for_large_tensors() -> Iterator[None]:
    """Give each large tensor its own pages, which return to the system as soon as it is freed.

    glibc's adaptive threshold moves large tensors into its arena, which is slightly faster but fragments: by a quarter
    over sixteen blocks. Setting the threshold switches adaptation off for the rest of the process, and glibc cannot
    report the old value. So the end of the context does not restore it, but sets the adaptive maximum, which a process
    that frees large tensors reaches anyway.
    """
    mallopt = _glibc("mallopt")
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _OWN_PAGES)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _ADAPTIVE_MAXIMUM)
        release_freed_memory()


def _glibc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
