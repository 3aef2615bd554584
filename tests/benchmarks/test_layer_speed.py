"""Speed of layers, and limits of machines, with clocks and events that a CPU can provide."""

import math

import layer_speed as layers
import machine_limits as gpu
import pytest
import torch

from fewbit.checkpoint.reader import open_checkpoint
from fewbit.errors import ConfigError, KernelError
from tiny_gptq import llama, write_checkpoint

SHAPE = layers.Shape(64, 128, 4, 32)

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


def test_caches_are_emptied_before_the_first_event():
    device = Device()
    clock = gpu.EventClock(device.event, lambda: device.work("flush", 5.0))
    measure = clock(lambda: device.work("work", 0.25))
    assert device.log == ["work", "work"]
    assert measure() == pytest.approx(0.25e-3)
    assert device.log[2:7] == ["flush", "event", "work", "event", "wait"]
    assert device.log.count("flush") == device.log.count("work") - 2


def test_a_round_is_a_median_of_calls():
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


def test_shape_uses_the_given_clock():
    candidates = {"kernel": layers.registered("reference"), "Linear": layers.dense(torch.float16)}
    found, _ = layers.measure_shape(
        layers.Shape(32, 64, 4, 32), (1,), candidates, torch.float16,
        layers.Method(rounds=2, rotate=1, stopwatch=lambda work: lambda: 2.0 if work() is None else 1.0),
    )  # fmt: skip
    assert found[1]["kernel"].times.seconds == (1.0, 1.0)


def test_missing_device():
    with pytest.raises(KernelError, match=r"device mps cannot be measured: use --device cpu, cuda or cuda:1"):
        gpu.check_device(torch.device("mps"))
    with pytest.raises(KernelError, match=r"is not here"):
        gpu.check_device(torch.device("cuda:99"))


@pytest.mark.parametrize(("name", "billions"), [("1b", 0.97), ("8b", 6.98), ("70b", 68.5)])
def test_shapes_add_up_to_the_models(name, billions):
    found = layers.llama_shapes(name, 4, 128)
    weights = sum(shape.count * shape.out_features * shape.in_features for shape in found)
    assert math.isclose(weights / 1e9, billions, rel_tol=0.01)
    with pytest.raises(ConfigError, match=r"there are no shapes called '3b'; there are 1b, 8b, 70b"):
        layers.llama_shapes("3b", 4, 128)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_torch_operator_refuses(on_gpu):
    codes = layers.random_weight(layers.Shape(36, 96, 4, 32))
    reason = layers._why_not_torch_operator(codes, torch.bfloat16, on_gpu)
    assert reason == ("shape 36 x 96 is not a multiple of 8 x 128" if on_gpu else "")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_torch_operator_on_a_gpu(tokens):
    device = torch.device("cuda")
    results, refused = layers.measure_shape(
        layers.Shape(256, 1024, 4, 128, sym=False), (tokens,),
        {"int4": layers.torch_operator, "auto": layers.registered("auto")},
        method=layers.Method(rounds=1, device=device, stopwatch=gpu.cuda_clock(device)),
    )  # fmt: skip
    assert not refused
    assert all(found.error < 0.02 for found in results[tokens].values())


def test_bytes_and_operations_of_a_shape():
    assert SHAPE.nbytes == 64 * 128 // 2 + 64 * 4 // 2 + 64 * 4 * 2
    assert layers.Shape(64, 128, 3, -1).nbytes == (64 * 128 + 64) * 3 // 8 + 2 * 64
    assert SHAPE.operations(5) == 2 * 5 * 64 * 128


def test_shapes_of_a_checkpoint(tmp_path):
    write_checkpoint(tmp_path, llama())
    shapes = layers.shapes_of(open_checkpoint(tmp_path).layers.values())
    assert [(s.out_features, s.in_features, s.count) for s in shapes] == [
        (192, 96, 4),
        (96, 192, 2),
        (96, 96, 4),
        (48, 96, 4),
    ]
    assert {s.bits for s in shapes} == {4}


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_all_candidates_use_the_same_weight(kernel):
    candidates = {
        "kernel": layers.registered(kernel),
        "Linear": layers.dense(torch.bfloat16),
        "float32": layers.dense(torch.float32),
        "operator": layers.torch_operator,
    }
    results, refused = layers.measure_shape(
        SHAPE, (1, 3), candidates, method=layers.Method(rounds=2, rotate=1)
    )
    assert not refused
    assert results.keys() == {1, 3}
    for row in results.values():
        assert row.keys() == candidates.keys()
        assert all(measured.error < 0.02 for measured in row.values())
        assert row["float32"].error < 1e-5
        assert all(len(measured.times.seconds) == 2 for measured in row.values())


def test_refused_candidates_have_a_reason():
    candidates = {"triton": layers.registered("triton"), "operator": layers.torch_operator}
    shape = layers.Shape(20, 40, 3, 8)
    results, refused = layers.measure_shape(shape, (1,), candidates, method=layers.Method(rounds=1, rotate=1))
    assert results == {1: {}}
    assert "device is cpu, not cuda or xpu" in refused["triton"]
    assert refused["operator"] == "torch's int4 operator cannot run this layer: 3 bits"


def test_copies_do_not_share_memory():
    layer = layers.registered("cpu")(layers.random_weight(SHAPE), torch.bfloat16)
    rotation = layers.Rotation(layer, 20_000)
    x = torch.randn(2, 128).bfloat16()
    assert torch.equal(rotation(x), rotation(x))
    first, second = (next(rotation._next) for _ in range(2))
    assert first is not second
    assert first.tiles.data_ptr() != second.tiles.data_ptr()


def test_limits_of_this_machine():
    found = gpu.measure_machine(rounds=1, side=256)  # a CPU without instructions for bfloat16 is slow
    assert found.threads == torch.get_num_threads()
    assert 1e8 < found.read_bandwidth < 1e13
    assert set(found.peaks) == {"float32", "bfloat16"}
    assert gpu.last_level_cache() >= 1 << 18
