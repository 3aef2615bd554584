"""The clock and the limits of a CUDA device: events around work that finds nothing in the caches.

A call on a GPU returns before its work is done, so a wall clock measures the wrong thing; and what launches it takes
longer than many a kernel. So before each measurement the device is given something to do that empties its L2 cache and
takes longer than the launch: by the time it comes to the first event, the work is queued behind it.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from ..errors import KernelError
from .machine import Machine
from .timing import Stopwatch

_FLUSH = 256 << 20  # bytes, several times any L2
_FLUSHES = 8  # some 500 microseconds on an H200
_COPY = 4 << 30  # bytes, read and as many written
_SIDE = 8192  # of the matrix product that shows the peak
_CALLS = 5  # that one round takes the median of


class Event(Protocol):
    """A moment on the device's own clock; `torch.cuda.Event` is one."""

    def record(self) -> None:
        """Let the device note the time when it comes to this."""

    def synchronize(self) -> None:
        """Wait until it has."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds between two."""


class EventClock:
    """Measures work on a device: a `Stopwatch` for `in_turns`.

    Args:
        event: makes one.
        flush: queues what empties the caches.
    """

    def __init__(self, event: Callable[[], Event], flush: Callable[[], object]) -> None:
        self._event, self._flush = event, flush

    def __call__(self, work: Callable[[], object]) -> Callable[[], float]:
        """A function that measures `work`, in seconds per call: the median of a few. Warms up twice."""
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
    """The clock of a CUDA device, which becomes the current one.

    Raises:
        KernelError: there is none.
    """
    check_device(device)
    torch.cuda.set_device(device)
    buffer = torch.empty(_FLUSH, dtype=torch.uint8, device=device)

    def flush() -> None:
        for _ in range(_FLUSHES):
            buffer.zero_()

    return EventClock(lambda: torch.cuda.Event(enable_timing=True), flush)  # type: ignore[no-untyped-call]


def check_device(device: torch.device) -> None:
    """Refuse a device that is not here.

    Raises:
        KernelError: with what to do instead.
    """
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
    """The device's limits: a large copy, counting bytes read and written, and large products of random numbers."""
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
