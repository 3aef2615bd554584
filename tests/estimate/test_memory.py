"""The parts of the peak: the solver's matrices as it really holds them, and the moments of a run."""

import itertools

import pytest
import torch

from fewbit.config import LayerSettings
from fewbit.estimate.live import LiveBytes
from fewbit.estimate.memory import predict_memory, spilled_notes
from fewbit.estimate.work import LayerWork, Work
from fewbit.gptq import Accuracy, FactorCache, Hessian, Holdout, quantize_weight
from fewbit.pipeline.memory import HOST_FRAGMENTATION
from fewbit.planning import LayerPlan, Plan

SETTINGS = LayerSettings(4, 32, True, "group", 0.01, "gptq")


def layer(name, m, n):
    return LayerPlan(name, m, n, SETTINGS, name.rpartition(".")[0])


def work(*layers, streams=1, held=0, heap=0, probe=0):
    works = [LayerWork(one, 100, False, held, heap) for one in layers]
    return Work(works, 100, 1.0, streams, probe, 0.0, transient=0)


def predicted(works, units=None, **options):
    plan = Plan(tuple(one.layer for one in works.layers), (), ())
    given = {
        "baseline": 0, "largest_tensor": 0, "dtype": torch.float32, "device": torch.device("cpu"), "extras": {},
    }  # fmt: skip
    return predict_memory(plan, works, units or {"": 0, "b": 0}, **{**given, **options})


@pytest.mark.parametrize(
    ("streams", "m", "n", "dtype"),
    list(itertools.product((1, 2), (128, 1024), (512, 640), (torch.float32, torch.bfloat16))),
)
def test_the_solver_holds_what_is_predicted(streams, m, n, dtype):
    probe = 256 if streams == 2 else 0
    W, X = torch.randn(m, n).to(dtype), torch.randn(64, n).to(dtype)
    with LiveBytes() as live:
        hessian = Hessian(n)
        hessian.add(X, None, X * 1.01 if streams == 2 else None)
        rows = Holdout(torch.randn(probe, n), torch.randn(probe, n)) if probe else None
        accuracy = Accuracy("auto" if streams == 2 else 0.0)
        quantize_weight(W, hessian, SETTINGS, FactorCache(), accuracy=accuracy, probe=rows)
        seen = live.peak
    parts = predicted(work(layer("b.x", m, n), streams=streams, probe=probe), dtype=dtype).parts
    waiting = 2 * m * n  # of the block: not in this test
    assert parts["Hessians"] + parts["solver"] + parts["probe"] - waiting == pytest.approx(seen, rel=0.15)


def test_the_parts_of_a_moment_add_up():
    one = work(layer("b.x", 64, 32), held=10_000_000, heap=4_000_000)
    memory = predicted(one, {"": 1000, "b": 2000}, baseline=5000)
    assert memory.moment == "solving b.x"
    assert memory.parts["activations"] == 10_000_000
    waiting = 2 * 64 * 32  # codes, which are no holes' business
    solving = memory.parts["Hessians"] + memory.parts["solver"] - waiting
    assert memory.parts["allocator"] == round(HOST_FRAGMENTATION * (4_000_000 + solving))
    assert memory.peak == sum(memory.parts.values())


def test_large_matrices_leave_no_holes():
    small, large = (predicted(work(layer("b.x", 64, n))) for n in (1024, 4096))
    assert small.parts["allocator"] > 0.9 * HOST_FRAGMENTATION * small.parts["Hessians"]
    assert large.parts["allocator"] < 0.1 * large.parts["Hessians"]


def test_a_large_tensor_that_is_read_can_be_the_worst():
    memory = predicted(work(layer("b.x", 8, 8)), {"": 0, "embed": 10**9}, largest_tensor=2 * 10**9)
    assert memory.parts["weights"] + memory.parts["reading"] == 3 * 10**9


def test_what_options_add_can_be_the_worst():
    memory = predicted(work(layer("b.x", 8, 8)), extras={"evaluation": {"weights": 10**9, "logits": 5}})
    assert memory.moment == "evaluation"
    assert memory.parts["weights"] + memory.parts["logits"] == 10**9 + 5


def test_on_a_gpu_the_work_counts_there():
    one = work(layer("b.x", 64, 32), held=10_000_000)
    memory = predicted(one, {"": 1000, "b": 2000}, device=torch.device("cuda"))
    assert memory.device_peak > 10_000_000
    assert "activations" not in memory.parts


@pytest.mark.parametrize(("free", "spilled"), [(None, 0), (10**8, 0), (6_000_000, 4_100_000)])
def test_activations_that_a_gpu_has_no_room_for_are_in_host_memory(free, spilled):
    one = work(layer("b.x", 64, 32), held=10_000_000)
    memory = predicted(one, {"": 1000, "b": 2000}, baseline=5, device=torch.device("cuda"), device_free=free)
    assert memory.spilled == memory.parts.get("activations", 0) == pytest.approx(spilled, rel=0.02)
    assert memory.peak == memory.spilled + 5 + 4000
    assert bool(spilled_notes(memory)) == bool(spilled)
    if spilled:
        assert memory.device_peak == free
        assert "4.04 MB of activations have no room on the device" in spilled_notes(memory)[0]


def test_what_is_no_activation_cannot_leave_a_gpu():
    one = work(layer("b.x", 64, 32), held=10_000_000)
    memory = predicted(one, {"": 1000, "b": 10**7}, device=torch.device("cuda"), device_free=5_000_000)
    assert memory.spilled == 10_000_000
    assert memory.device_peak > 10**7
