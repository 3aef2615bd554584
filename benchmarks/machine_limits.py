"""What a machine can reach: memory bandwidth and arithmetic of a CPU or a GPU; and the clock of a GPU.

A call on a GPU returns before its work is done, so a wall clock measures the wrong thing, and the launch takes longer
than many kernels. Before each measurement the device therefore gets work that empties its L2 cache and takes longer
than the launch: the measured kernel is already queued when the first event is reached.
"""

from __future__ import annotations

import functools
import mmap
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fewbit.bench.timing import Stopwatch, in_turns, seconds_per_call
from fewbit.errors import KernelError

_BUFFER = 512 << 20  # bytes, several times any last-level cache
_CACHE_SIZES = Path("/sys/devices/system/cpu/cpu0/cache")
_FLUSH = 256 << 20  # bytes, several times any L2
_FLUSHES = 8  # about 500 microseconds on an H200
_COPY = 4 << 30  # bytes read, and as many written
_SIDE = 8192  # width of the matrix product that shows the peak
_CALLS = 5  # calls per round, of which the median counts


@dataclass(frozen=True)
class Machine:
    """What a device can reach.

    Attributes:
        threads: number of torch's threads during the measurement.
        read_bandwidth: bytes per second read from memory, in huge pages where the system provides them; on a GPU,
            bytes read and written per second by a copy.
        peaks: name of a torch dtype → operations per second of a large matrix product (a multiply-add counts as two).
        name: name of the device.
    """

    threads: int
    read_bandwidth: float
    peaks: dict[str, float]
    name: str = "CPU"


def measure_machine(rounds: int = 7, *, side: int = 2048) -> Machine:
    """Measure the CPU with products of (side / 2, side) and (side, side); takes about two seconds per core."""
    buffer = _read_buffer()
    reads = in_turns({"sum": seconds_per_call(buffer.sum)}, rounds)["sum"].minimum
    dtypes = (torch.float32, torch.bfloat16)
    products = in_turns({_name(dtype): seconds_per_call(_product(dtype, side)) for dtype in dtypes}, rounds)
    work = side**3  # a multiply-add counts as two
    return Machine(
        threads=torch.get_num_threads(),
        read_bandwidth=_BUFFER / reads,
        peaks={name: work / times.minimum for name, times in products.items()},
    )


def last_level_cache() -> int:
    """Bytes of the largest cache of a core; 32 MiB where the system does not report it."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    texts = [path.read_text().strip() for path in _CACHE_SIZES.glob("index*/size")]
    return max((int(text[:-1]) * units[text[-1]] for text in texts if text[-1:] in units), default=32 << 20)


def _read_buffer() -> Tensor:
    """A float32 buffer in huge pages where available, filled so that every page is resident."""
    pages = mmap.mmap(-1, _BUFFER)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.float32).fill_(1.0)


def _product(dtype: torch.dtype, side: int) -> Callable[[], Tensor]:
    left, right = torch.randn(side // 2, side, dtype=dtype), torch.randn(side, side, dtype=dtype)
    return lambda: left @ right


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Event(Protocol):
    """A point in time on the device's clock, such as `torch.cuda.Event`; times are in milliseconds."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end_event: Any) -> float: ...


class EventClock:
    """Measures work on a device: a `Stopwatch` for `in_turns`.

    Args:
        event: factory of events.
        flush: function that queues work which empties the caches.
    """

    def __init__(self, event: Callable[[], Event], flush: Callable[[], object]) -> None:
        self._event, self._flush = event, flush

    def __call__(self, work: Callable[[], object]) -> Callable[[], float]:
        """Return a function that gives the median seconds per call of `work`. Warms up twice."""
        work()
        work()
        return lambda: statistics.median(self._once(work) for _ in range(_CALLS))

    def _once(self, work: Callable[[], object]) -> float:
        start, end = self._event(), self._event()
        self._flush()
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def cuda_clock(device: torch.device) -> EventClock:
    """The clock of a CUDA device, which becomes the current device.

    Raises:
        KernelError: the device does not exist.
    """
    check_device(device)
    torch.cuda.set_device(device)
    buffer = torch.empty(_FLUSH, dtype=torch.uint8, device=device)

    def flush() -> None:
        for _ in range(_FLUSHES):
            buffer.zero_()

    return EventClock(lambda: torch.cuda.Event(enable_timing=True), flush)  # type: ignore[no-untyped-call]


def check_device(device: torch.device) -> None:
    """Raise KernelError if there is no such CUDA device, with what to do instead."""
    if device.type != "cuda":
        raise KernelError(f"device {device} cannot be measured: use --device cpu, cuda or cuda:1")
    if not torch.cuda.is_available():
        raise KernelError(
            f"device {device} is not here: torch {torch.__version__} sees no CUDA device. Run this on a machine with "
            "a GPU and a CUDA build of torch, or leave out --device to measure the CPU"
        )
    if (device.index or 0) >= torch.cuda.device_count():
        raise KernelError(f"device {device} is not here: there are {torch.cuda.device_count()} CUDA devices")


def measure_gpu(
    device: torch.device,
    clock: Stopwatch,
    dtypes: Sequence[torch.dtype] = (torch.float16, torch.bfloat16),
    *,
    rounds: int = 5,
    copy_bytes: int = _COPY,
    side: int = _SIDE,
) -> Machine:
    """Measure the limits of a GPU with a large copy and large products of random numbers."""
    source = torch.empty(copy_bytes, dtype=torch.uint8, device=device).random_()
    copy = _minimum(clock(functools.partial(torch.empty_like(source).copy_, source)), rounds)
    peaks = {}
    for dtype in dtypes:
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        product = _minimum(clock(functools.partial(torch.matmul, left, right)), rounds)
        peaks[str(dtype).removeprefix("torch.")] = 2 * side**3 / product
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return Machine(torch.get_num_threads(), 2 * copy_bytes / copy, peaks, name)


def _minimum(measure: Callable[[], float], rounds: int) -> float:
    return min(measure() for _ in range(rounds))
