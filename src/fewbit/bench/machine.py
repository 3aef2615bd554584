"""What this machine can reach with torch's threads: bytes read per second, and arithmetic per second."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .timing import in_turns, seconds_per_call

_BUFFER = 512 << 20  # bytes; several times any last-level cache
_CACHE_SIZES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class Machine:
    """Attributes:
    threads: torch's, with which the rest was measured.
    read_bandwidth: bytes per second from memory, with huge pages where the system gives them.
    peaks: torch dtype's name → operations per second of a large matrix product (a multiply-add counts two).
    name: of the device. On a GPU, `read_bandwidth` is that of a copy, bytes read and written.
    """

    threads: int
    read_bandwidth: float
    peaks: dict[str, float]
    name: str = "CPU"


def measure_machine(rounds: int = 7) -> Machine:
    """Measure it, about two seconds a core."""
    buffer = _read_buffer()
    reads = in_turns({"sum": seconds_per_call(buffer.sum)}, rounds)["sum"].minimum
    dtypes = (torch.float32, torch.bfloat16)
    products = in_turns({_name(dtype): seconds_per_call(_product(dtype)) for dtype in dtypes}, rounds)
    work = 2 * 1024 * 2048 * 2048
    return Machine(
        threads=torch.get_num_threads(),
        read_bandwidth=_BUFFER / reads,
        peaks={name: work / times.minimum for name, times in products.items()},
    )


def last_level_cache() -> int:
    """Bytes of the largest cache of a core; 32 MiB where the system does not say."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    texts = [path.read_text().strip() for path in _CACHE_SIZES.glob("index*/size")]
    return max((int(text[:-1]) * units[text[-1]] for text in texts if text[-1:] in units), default=32 << 20)


def _read_buffer() -> Tensor:
    """float32 in huge pages where there are any, filled, so that every page is there."""
    pages = mmap.mmap(-1, _BUFFER)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.float32).fill_(1.0)


def _product(dtype: torch.dtype) -> Callable[[], Tensor]:
    left, right = torch.randn(1024, 2048, dtype=dtype), torch.randn(2048, 2048, dtype=dtype)
    return lambda: left @ right


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
