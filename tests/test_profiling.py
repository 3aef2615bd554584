"""Time and memory by phase: nesting, and memory figures that do not claim too much."""

import time
from types import SimpleNamespace

import pytest
import torch

from fewbit import profiling
from fewbit.errors import ModelError
from fewbit.profiling import Memory, Profiler


class Clock:
    """Stands in for the clock and for the process's memory."""

    def __init__(self, monkeypatch):
        self.now = self.resident = self.highest = 0
        monkeypatch.setattr(time, "perf_counter", lambda: float(self.now))
        monkeypatch.setattr(profiling, "_resident_bytes", lambda: self.resident)
        monkeypatch.setattr(profiling, "_highest_resident_bytes", lambda: self.highest)

    def pass_(self, seconds, resident=None):
        self.now += seconds
        self.resident = self.resident if resident is None else resident
        self.highest = max(self.highest, self.resident)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_own_time_leaves_out_inner_phases(clock):
    profiler = Profiler()
    for _ in range(2):
        with profiler.time("walk"):
            clock.pass_(5)
            with profiler.time("solve"):
                clock.pass_(2)
                with profiler.time("pack"):
                    clock.pass_(1)
    assert profiler.seconds == {"walk": 16, "solve": 6, "pack": 2}
    assert {p.name: (p.parent, p.own_seconds) for p in profiler.phases.values()} == {
        "walk": (None, 10),
        "solve": ("walk", 4),
        "pack": ("solve", 2),
    }


def test_a_phase_that_fails_is_closed(clock):
    profiler = Profiler()

    def fail():
        with profiler.time("walk"), profiler.time("solve"):
            clock.pass_(3)
            raise ModelError("damaged")

    with pytest.raises(ModelError):
        fail()
    with profiler.time("write"):
        clock.pass_(1)
    assert profiler.phases["write"].parent is None
    assert profiler.seconds == {"walk": 3, "solve": 3, "write": 1}


def test_memory_is_exact_only_where_the_peak_rose(clock):
    profiler = Profiler()
    with profiler.time("load"):
        clock.pass_(1, resident=700)
        clock.pass_(1, resident=300)
    with profiler.time("walk"):
        clock.pass_(1, resident=650)  # below the highest ever: cannot be seen from outside
        clock.pass_(1, resident=400)
    assert profiler.phases["load"].memory == Memory(700, exact=True)
    assert profiler.phases["walk"].memory == Memory(400, exact=False)
    with profiler.time("walk"):
        clock.pass_(1, resident=900)
        clock.pass_(1, resident=100)
    assert profiler.phases["walk"].memory == Memory(900, exact=True)
    with profiler.time("walk"):
        clock.pass_(1, resident=200)
    assert profiler.phases["walk"].memory == Memory(900, exact=True)


def test_real_memory_is_seen():
    profiler = Profiler()
    with profiler.time("fill"):
        kept = torch.ones(30_000_000)
    with profiler.time("after"):
        pass
    assert profiler.phases["fill"].memory.bytes >= kept.nbytes
    assert profiler.phases["after"].memory.bytes >= kept.nbytes


def test_without_proc_only_a_risen_peak_is_known(monkeypatch, clock):
    monkeypatch.setattr(profiling, "_resident_bytes", lambda: 0)
    profiler = Profiler()
    with profiler.time("load"):
        clock.pass_(1, resident=700)
    with profiler.time("walk"):
        clock.pass_(1)
    assert profiler.phases["load"].memory == Memory(700, exact=True)
    assert profiler.phases["walk"].memory is None


def test_a_gpu_is_read_and_waited_for_at_both_ends(monkeypatch, clock):
    waited, queued = [], [3.0]  # seconds of kernels that were launched before

    def synchronize(device):
        waited.append(device)
        clock.pass_(sum(queued))
        queued.clear()

    fake = SimpleNamespace(
        memory_allocated=lambda device: 10,
        max_memory_allocated=lambda device: 50 * (1 + len(waited)),
        current_stream=lambda device: SimpleNamespace(synchronize=lambda: synchronize(device)),
    )
    monkeypatch.setattr(torch, "cuda", fake)
    device = torch.device("cuda", 1)
    profiler = Profiler(device)
    with profiler.time("walk"):
        queued.append(5.0)
        with profiler.time("solve"):
            queued.append(7.0)
    assert waited == [device] * 4
    assert profiler.seconds == {"walk": 12, "solve": 7}
    assert profiler.phases["walk"].own_seconds == 5
    assert profiler.phases["walk"].device_memory == Memory(250, exact=True)
    on_cpu = Profiler(torch.device("cpu"))
    with on_cpu.time("walk"):
        pass
    assert on_cpu.phases["walk"].device_memory is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_phase_has_the_time_and_memory_of_its_own_kernels():
    profiler = Profiler(torch.device("cuda"))
    x = torch.randn(8192, 8192, device="cuda")
    for _ in range(2):
        x @ x
    torch.cuda.synchronize()
    with profiler.time("before"):
        pass
    for _ in range(20):
        x @ x
    with profiler.time("empty"):
        pass
    with profiler.time("full"):
        kept = [x @ x for _ in range(20)]
    assert profiler.seconds["full"] > 10 * profiler.seconds["empty"]
    assert profiler.phases["full"].device_memory.bytes >= sum(y.nbytes for y in kept)
