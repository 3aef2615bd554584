"""The GPU's clock and limits, with events that a CPU can make."""

import math

import pytest
import torch

from fewbit.bench import gpu, layers, llama
from fewbit.errors import ConfigError, KernelError

CPU = torch.device("cpu")


class Device:
    """A device whose time passes only by what is queued; measures in milliseconds, as CUDA's events."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def work(self, name, milliseconds):
        self.log.append(name)
        self.now += milliseconds

    def event(self):
        return Event(self)


class Event:
    def __init__(self, device):
        self.device = device

    def record(self):
        self.at = self.device.now
        self.device.log.append("event")

    def synchronize(self):
        self.device.log.append("wait")

    def elapsed_time(self, end):
        return end.at - self.at


def test_the_caches_are_emptied_outside_of_what_is_measured():
    device = Device()
    clock = gpu.EventClock(device.event, lambda: device.work("flush", 5.0))
    measure = clock(lambda: device.work("work", 0.25))
    assert device.log == ["work", "work"]
    assert measure() == pytest.approx(0.25e-3)
    assert device.log[2:7] == ["flush", "event", "work", "event", "wait"]
    assert device.log.count("flush") == device.log.count("work") - 2


def test_one_round_is_the_median_of_a_few_calls():
    device = Device()
    times = iter([1.0, 1.0, 9.0, 2.0, 3.0, 1.0, 2.0])
    measure = gpu.EventClock(device.event, lambda: None)(lambda: device.work("work", next(times)))
    assert measure() == pytest.approx(2e-3)


def test_limits_from_any_clock():
    device = Device()

    def clock(work):
        work()
        return lambda: 0.5

    found = gpu.measure_gpu(CPU, clock, (torch.float32,), rounds=1, copy_bytes=1000, side=16)
    assert found.read_bandwidth == 4000
    assert found.peaks == {"float32": 2 * 16**3 / 0.5}
    assert found.name == "CPU"
    assert not device.log


def test_a_shape_is_measured_with_the_clock_it_is_given():
    candidates = {"kernel": layers.registered("reference"), "Linear": layers.dense(torch.float16)}
    found, _ = layers.measure_shape(
        layers.Shape(32, 64, 4, 32), (1,), candidates, torch.float16, rounds=2, rotate=1,
        stopwatch=lambda work: lambda: 2.0 if work() is None else 1.0,
    )  # fmt: skip
    assert found[1]["kernel"].times.seconds == (1.0, 1.0)


def test_a_device_that_is_not_here():
    with pytest.raises(KernelError, match=r"device mps cannot be measured: use --device cpu, cuda or cuda:1"):
        gpu.check_device(torch.device("mps"))
    with pytest.raises(KernelError, match=r"is not here"):
        gpu.check_device(torch.device("cuda:99"))


@pytest.mark.parametrize(("name", "billions"), [("1b", 0.97), ("8b", 6.98), ("70b", 68.5)])
def test_shapes_add_up_to_the_models(name, billions):
    found = llama.shapes(name, 4, 128)
    weights = sum(shape.count * shape.out_features * shape.in_features for shape in found)
    assert math.isclose(weights / 1e9, billions, rel_tol=0.01)
    with pytest.raises(ConfigError, match=r"there are no shapes called '3b'; there are 1b, 8b, 70b"):
        llama.shapes("3b", 4, 128)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_what_torchs_operator_refuses(on_gpu):
    codes = layers.random_weight(layers.Shape(36, 96, 4, 32))
    reason = layers._why_not_torch_operator(codes, torch.bfloat16, on_gpu)
    assert reason == ("shape 36 x 96 is not a multiple of 8 x 128" if on_gpu else "")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_torchs_operator_multiplies_with_the_same_weight(tokens):
    device = torch.device("cuda")
    results, refused = layers.measure_shape(
        layers.Shape(256, 1024, 4, 128, sym=False), (tokens,),
        {"int4": layers.torch_operator, "auto": layers.registered("auto")},
        rounds=1, device=device, stopwatch=gpu.cuda_clock(device),
    )  # fmt: skip
    assert not refused
    assert all(found.error < 0.02 for found in results[tokens].values())
