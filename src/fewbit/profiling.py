"""What a run costs, by phase: seconds and memory.

Phases can lie inside one another (a solve inside the calibration pass). `Phase.own_seconds` leaves out inner phases, so
own times add up to the total.

A GPU computes asynchronously, so a phase waits for it at its begin and end. Each phase is then charged for its own
kernels. This happens twice for every layer and phase, never for every batch; copies on side streams continue.

A process knows its memory now and its highest ever, not the highest within a phase. So `Memory.bytes` is exact where
the highest ever was reached inside the phase. Elsewhere it is the larger of the readings at both ends, a lower bound.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

_STATM = Path("/proc/self/statm")


@dataclass
class Memory:
    """Largest use known inside a phase; `exact` where that is its true peak, otherwise it is a lower bound."""

    bytes: int
    exact: bool


@dataclass
class Phase:
    """One phase of a run.

    Attributes:
        parent: the phase it first was entered in; None at the top.
        seconds: spent inside, over all entries; own_seconds: without phases inside it.
        memory: resident memory of the process; None on Windows.
        device_memory: memory that torch has allocated on the device; None on the CPU, and for mps.
    """

    name: str
    parent: str | None
    seconds: float = 0.0
    own_seconds: float = 0.0
    memory: Memory | None = None
    device_memory: Memory | None = None


# Bytes in use now (0 where the system does not say), and the most ever in use.
_Reading = tuple[int, int]


@dataclass
class _Entry:
    phase: Phase
    start: float
    before: tuple[_Reading | None, _Reading | None]  # of the process and of the device
    inner: float = 0.0


class Profiler:
    """Seconds and memory by phase.

    Args:
        device: where the work runs. On a GPU its memory is read too, and a phase waits for kernels at both ends.

    Attributes:
        phases: by name, in the order of first entry.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.phases: dict[str, Phase] = {}
        self._start = time.perf_counter()
        self._open: list[_Entry] = []
        self._device = device
        self._gpu: Any = getattr(torch, device.type) if device and device.type in ("cuda", "xpu") else None

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Add the time and memory used inside to `phase`. Must not be held across a greenlet switch."""
        parent = self._open[-1].phase.name if self._open else None
        kept = self.phases.setdefault(phase, Phase(phase, parent))
        self._wait()
        self._open.append(_Entry(kept, time.perf_counter(), self._read()))
        try:
            yield
        finally:
            self._wait()
            self._close(self._open.pop())

    @property
    def elapsed(self) -> float:
        """Seconds since this profiler was made."""
        return time.perf_counter() - self._start

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by phase; a phase includes those inside it."""
        return {name: phase.seconds for name, phase in self.phases.items()}

    def to_list(self) -> list[dict[str, Any]]:
        """The phases in plain JSON types, in the order of first entry."""
        return [asdict(phase) for phase in self.phases.values()]

    def _wait(self) -> None:
        """Wait for the kernels on the GPU's current stream."""
        if self._gpu is not None:
            self._gpu.current_stream(self._device).synchronize()

    def _close(self, entry: _Entry) -> None:
        phase = entry.phase
        process, device = self._read()
        phase.memory = _larger(phase.memory, entry.before[0], process)
        phase.device_memory = _larger(phase.device_memory, entry.before[1], device)
        seconds = time.perf_counter() - entry.start
        phase.seconds += seconds
        phase.own_seconds += seconds - entry.inner
        if self._open:
            self._open[-1].inner += seconds

    def _read(self) -> tuple[_Reading | None, _Reading | None]:
        process = device = None
        if sys.platform != "win32":
            process = _resident_bytes(), _highest_resident_bytes()
        if self._gpu is not None:
            gpu = self._gpu
            device = int(gpu.memory_allocated(self._device)), int(gpu.max_memory_allocated(self._device))
        return process, device


def _larger(known: Memory | None, start: _Reading | None, end: _Reading | None) -> Memory | None:
    """What is known about a phase after one more entry, from the readings at both its ends."""
    if start is None or end is None:
        return known
    if end[1] > start[1]:  # the highest ever was reached inside
        return Memory(end[1], exact=True)
    seen = max(start[0], end[0])
    return Memory(seen, exact=False) if seen > (known.bytes if known else 0) else known


def peak_memory_bytes() -> int | None:
    """Largest resident size this process has had; None on Windows."""
    return None if sys.platform == "win32" else _highest_resident_bytes()


def memory_in_use_bytes() -> int:
    """Resident size of this process now; where the system does not say, its largest so far, or 0."""
    return _resident_bytes() or peak_memory_bytes() or 0


def _highest_resident_bytes() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _resident_bytes() -> int:
    if not _STATM.exists():
        return 0
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
