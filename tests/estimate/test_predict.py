"""Arithmetic of memory and time: the solver's matrices as it really holds them, the moments of a run, its phases."""

import itertools

import pytest
import torch

from fewbit.config import LayerSettings
from fewbit.estimate import predict
from fewbit.estimate.predict import InputCost, Sizes, device_memory, host_memory, predict_seconds, run_moments
from fewbit.estimate.trial import LiveBytes, Trial
from fewbit.estimate.work import DiskRate, LayerRate, LayerWork, Work, of_one_process
from fewbit.gptq import Hessian, Holdout, InputGroup, quantize_weight
from fewbit.gptq.output_feedback import feedback_bytes, output_blocks
from fewbit.pipeline.memory import HOST_FRAGMENTATION
from fewbit.planning import LayerPlan

SETTINGS = LayerSettings(4, 16, True, "group", 0.01, "gptq")
SHARDS = {"": 1000, "b": 2000}
SIZES = Sizes(quantized=100, plain=10, output=200, journal=110, output_hessians=0, layers={})


def layer_work(name, m, n, *, rows=100, shares=False, held=0, arena=0):
    layer = LayerPlan(name, m, n, SETTINGS, name.rpartition(".")[0])
    return LayerWork(layer, rows, shares, held, arena)


def work(*layers, batches=1.0, paths=1, holdout=0, **options):
    return Work(list(layers), batches, paths, holdout, transient=0, **options)


def on_cpu(works, shards=SHARDS, dtype=torch.float32, baseline=0, tensor=0):
    return host_memory(run_moments(works, shards, dtype), shards, baseline, tensor)


def on_gpu(works, shards=SHARDS, baseline=0, free=None):
    return device_memory(run_moments(works, shards, torch.float32), shards, baseline, 0, free)


@pytest.mark.parametrize(
    ("paths", "m", "n", "dtype"),
    list(itertools.product((1, 2), (128, 1024), (512, 640), (torch.float32, torch.bfloat16))),
)
def test_the_solver_holds_what_is_predicted(paths, m, n, dtype, monkeypatch):
    monkeypatch.setattr(
        "fewbit.gptq.round_rows.CLIPPED", 0.0
    )  # the most that a layer can need: every row on every grid
    holdout = 256 if paths == 2 else 0
    W, X = torch.randn(m, n).to(dtype), torch.randn(64, n).to(dtype)
    with LiveBytes() as live:
        hessian = Hessian(n)
        hessian.add(X, None, X * 1.01 if paths == 2 else None)
        rows = Holdout(torch.randn(holdout, n), torch.randn(holdout, n)) if holdout else None
        correction = "auto" if paths == 2 else 0.0
        quantize_weight(W, InputGroup(hessian, rows), SETTINGS, correction=correction)
        seen = live.peak
    parts = on_cpu(work(layer_work("b.x", m, n), paths=paths, holdout=holdout), dtype=dtype).parts
    waiting = 2 * m * n  # of the block: not in this test
    assert parts["Hessians"] + parts["solver"] + parts["holdout"] - waiting == pytest.approx(seen, rel=0.15)


@pytest.mark.parametrize(("m", "n"), [(1024, 512), (1536, 640), (2048, 1024), (576, 1536)])
def test_feedback_between_outputs_holds_what_is_predicted(m, n):
    peaks = []
    for G in (None, output_blocks(torch.randn(64, m))):
        W, X = torch.randn(m, n), torch.randn(64, n)
        with LiveBytes() as live:
            hessian = Hessian(n)
            hessian.add(X)
            quantize_weight(W, InputGroup(hessian), SETTINGS, G=None if G is None else G.clone())
            peaks.append(live.peak)
    predicted = feedback_bytes(m, n, peaks[0] - 4 * n * n)
    assert peaks[1] == pytest.approx(peaks[0] + predicted, rel=0.1)


def test_the_parts_of_a_moment_add_up():
    memory = on_cpu(work(layer_work("b.x", 64, 32, held=10_000_000, arena=4_000_000)), baseline=5000)
    assert memory.moment == "solving b.x"
    assert memory.parts["activations"] == 10_000_000
    waiting = 2 * 64 * 32  # codes, which leave no holes
    solving = memory.parts["Hessians"] + memory.parts["solver"] - waiting
    assert memory.parts["allocator"] == round(HOST_FRAGMENTATION * (4_000_000 + solving))
    assert memory.peak == sum(memory.parts.values())


def test_large_matrices_leave_no_holes():
    small, large = (on_cpu(work(layer_work("b.x", 64, n))) for n in (1024, 4096))
    assert small.parts["allocator"] > 0.9 * HOST_FRAGMENTATION * small.parts["Hessians"]
    assert large.parts["allocator"] < 0.1 * large.parts["Hessians"]


def test_reading_a_large_tensor_can_be_the_worst():
    memory = on_cpu(work(layer_work("b.x", 8, 8)), {"": 0, "b": 0, "embed": 10**9}, tensor=2 * 10**9)
    assert memory.parts["weights"] + memory.parts["reading"] == 3 * 10**9


def test_an_evaluation_can_be_the_worst():
    model = torch.nn.Linear(1000, 1000, bias=False)
    moments = run_moments(work(layer_work("b.x", 8, 8)), SHARDS, torch.float32)
    moments["evaluation"] = predict.evaluation_moment(model, 512)
    memory = host_memory(moments, SHARDS, 0, 0)
    assert memory.moment == "evaluation"
    assert memory.parts["weights"] == 2 * 4 * 10**6


def test_on_a_gpu_the_work_counts_there():
    memory = on_gpu(work(layer_work("b.x", 64, 32, held=10_000_000)))
    assert memory.device_peak > 10_000_000
    assert "activations" not in memory.parts


@pytest.mark.parametrize(("free", "on_host"), [(None, 0), (10**8, 0), (6_000_000, 4_100_000)])
def test_activations_without_space_on_a_gpu_are_in_host_memory(free, on_host):
    memory = on_gpu(work(layer_work("b.x", 64, 32, held=10_000_000)), baseline=5, free=free)
    assert memory.host_activations == memory.parts.get("activations", 0) == pytest.approx(on_host, rel=0.02)
    assert memory.peak == memory.host_activations + 5 + 4000
    assert not on_host or memory.device_peak == free


def test_only_activations_can_leave_a_gpu():
    works = work(layer_work("b.x", 64, 32, held=10_000_000))
    memory = on_gpu(works, {"": 1000, "b": 10**7}, free=5_000_000)
    assert memory.host_activations == 10_000_000
    assert memory.device_peak > 10**7


def seconds(works, trial, **inputs):
    given = {"calibration": 3.0, "load": 1.0, "source_bytes": 1000, "weight_bytes": 400, **inputs}
    rates = {(48, SETTINGS): LayerRate(0.1, 7.0, 0.5, 0.2, 0.3)}
    return predict_seconds(works, trial, rates, DiskRate(0.001, 0.5, 0.002), SIZES, InputCost(**given))


def test_seconds_are_rates_times_counts():
    layers = layer_work("b.0.q", 10, 48), layer_work("b.0.k", 5, 48, shares=True), layer_work("b.1.q", 10, 48)
    works = work(*layers, batches=10.0, paths=2, offloaded=50)
    trial = Trial({"b.0": ["b.0", "b.1"]}, 100, seconds={"b.0": 0.5}, load_rate=0.01)
    found = seconds(works, trial)
    assert found["calibration text"] == 3.0
    assert found["checking the source"] == pytest.approx(2.0)
    assert found["reading weights"] == pytest.approx(5.0)
    assert found["forward passes"] == pytest.approx(0.5 * 2 * 10 * 2)
    assert found["Hessians"] == pytest.approx(2 * 100 * 0.1)
    assert found["solving"] == pytest.approx(2 * 7.0 + 3 * 0.5 + 25 * 0.2)
    assert found["packing"] == pytest.approx(25 * 0.3)
    assert found["offloading"] == pytest.approx(4 * 50 * 0.001)
    assert found["journal"] == pytest.approx(2 * 2 * 0.5 + 110 * 0.003)
    # Read during 59 seconds of work: only the first of two blocks is waited for, or what takes longer than that.
    hidden = seconds(works, trial, prefetch=True)
    assert hidden == {**found, "reading weights": pytest.approx(1.0 + 4.0 / 2)}
    slow = seconds(works, trial, weight_bytes=40_000, prefetch=True)
    busy = found["forward passes"] + found["Hessians"] + found["solving"]
    assert slow["reading weights"] == pytest.approx(1.0 + 400 - busy)


def test_two_processes_share_batches_and_rows():
    works = work(layer_work("b.0.q", 96, 48), layer_work("b.0.k", 10, 48, shares=True), batches=3.0, paths=2)
    trial = Trial({"b.0": ["b.0"]}, 100, seconds={"b.0": 0.5}, load_rate=0.01)
    alone, divided = seconds(works, trial), seconds(of_one_process(works, 2, 3), trial)
    assert divided["forward passes"] == pytest.approx(alone["forward passes"] * 2 / 3)
    assert divided["Hessians"] == pytest.approx(alone["Hessians"] * 0.67, rel=0.01)
    # 64 of 96 rows, as they are divided in pieces of 32; all of 10.
    assert divided["solving"] == pytest.approx(7.0 + 2 * 0.5 + (64 + 10) * 0.2)
    unchanged = set(alone) - {"forward passes", "Hessians", "solving"}
    assert all(divided[phase] == alone[phase] for phase in unchanged)
