"""Rates of this machine, how they are carried over to larger widths, and the arithmetic of times."""

import pytest
import torch
from safetensors.torch import save_file

from fewbit.checkpoint.safetensors_file import read_header
from fewbit.config import LayerSettings
from fewbit.errors import ModelError
from fewbit.estimate import rates
from fewbit.estimate.rates import DiskRate, LayerRate, measure_disk, measure_layers
from fewbit.estimate.sizes import Sizes
from fewbit.estimate.timing import predict_seconds
from fewbit.estimate.trial import Trial
from fewbit.estimate.work import LayerWork, Work, of_one_process
from fewbit.gptq import Accuracy
from fewbit.planning import LayerPlan, Plan

SETTINGS = LayerSettings(4, 16, True, "group", 0.01, "gptq")


def layer_work(name, m, n, rows=100, shares=False, settings=SETTINGS):
    return LayerWork(LayerPlan(name, m, n, settings, name.rpartition(".")[0]), rows, shares, 0, 0)


def measured(works, streams=1, probe=0):
    accuracy = Accuracy("auto" if streams == 2 else 0.0)
    return measure_layers(
        works, dtype=torch.float32, device=torch.device("cpu"), streams=streams, accuracy=accuracy, probe=probe,
        fmt="gptq",
    )  # fmt: skip


@pytest.mark.parametrize("streams", [1, 2])
def test_one_rate_for_every_width(streams):
    works = [layer_work("b.q", 32, 48), layer_work("b.k", 16, 48), layer_work("b.down", 48, 80)]
    found = measured(works, streams, probe=8 * (streams - 1))
    assert found.keys() == {(48, SETTINGS), (80, SETTINGS)}
    assert all(rate.accumulate > 0 and rate.solve > 0 and rate.pack > 0 for rate in found.values())


def test_rounding_needs_no_hessian():
    settings = LayerSettings(4, 16, True, "group", 0.01, "rtn")
    [rate] = measured([layer_work("b.q", 32, 48, settings=settings)]).values()
    assert rate.accumulate == rate.factor == 0 < rate.solve


def test_large_widths_are_carried_over(monkeypatch):
    monkeypatch.setattr(rates, "LARGEST_WIDTH", 64)
    asked = []

    def rate(self, n, m, settings, probe):
        asked.append((n, probe))
        return LayerRate(1.0, 1.0, 1.0, 1.0)

    monkeypatch.setattr(rates._Bench, "rate", rate)
    [found] = measured([layer_work("b.q", 16, 128)], streams=2, probe=100).values()
    assert asked[-1] == (64, 50)
    assert found == LayerRate(accumulate=4.0, factor=8.0, solve=4.0, pack=2.0)


def test_the_disk_and_the_source_are_measured_and_nothing_stays(tmp_path):
    save_file({"x": torch.ones(1000)}, tmp_path / "a.safetensors")
    (tmp_path / "out").mkdir()
    info = read_header(tmp_path / "a.safetensors")[0]["x"]
    rate = measure_disk(tmp_path / "out", tmp_path / "a.safetensors", info)
    assert rate.check > 0
    assert rate.file > 0
    assert list((tmp_path / "out").iterdir()) == []


def test_a_damaged_weight_is_seen(tmp_path):
    save_file({"x": torch.full((10,), float("nan"))}, tmp_path / "a.safetensors")
    info = read_header(tmp_path / "a.safetensors")[0]["x"]
    with pytest.raises(ModelError, match="holds NaN values"):
        measure_disk(tmp_path, tmp_path / "a.safetensors", info)


def test_seconds_are_rates_times_counts():
    works = [
        layer_work("b.0.q", 10, 48),
        layer_work("b.0.k", 5, 48, shares=True),
        layer_work("b.1.q", 10, 48),
    ]
    plan = Plan(tuple(one.layer for one in works), (), ())
    work = Work(works, tokens=1000, batches=10.0, streams=2, probe=0, held_out=0.0, transient=0, spilled=50)
    trial = Trial({"b.0": ["b.0", "b.1"]}, 100, seconds={"b.0": 0.5}, load_rate=0.01)
    sizes = Sizes(quantized=100, plain=10, output=200, journal=110, layers={})
    arguments = (
        plan,
        work,
        trial,
        {(48, SETTINGS): LayerRate(0.1, 7.0, 0.2, 0.3)},
        DiskRate(0.001, 0.5, 0.002),
        sizes,
    )
    given = {"calibration": 3.0, "load": 1.0, "source_bytes": 1000, "weight_bytes": 400}
    found = predict_seconds(*arguments, **given)
    assert found["calibration text"] == 3.0
    assert found["checking the source"] == pytest.approx(2.0)
    assert found["reading weights"] == pytest.approx(5.0)
    assert found["forward passes"] == pytest.approx(0.5 * 2 * 10 * 2)
    assert found["Hessians"] == pytest.approx(2 * 100 * 0.1)
    assert found["solving"] == pytest.approx(2 * 7.0 + 25 * 0.2)
    assert found["packing"] == pytest.approx(25 * 0.3)
    assert found["offloading"] == pytest.approx(4 * 50 * 0.001)
    assert found["exchanging"] == 0
    # Read while 59 seconds are computed: only the first of two blocks is waited for, or what takes longer than that.
    hidden = predict_seconds(*arguments, **given, ahead=True)
    assert hidden == {**found, "reading weights": pytest.approx(1.0 + 4.0 / 2)}
    slow = predict_seconds(*arguments, **{**given, "weight_bytes": 40_000}, ahead=True)
    busy = found["forward passes"] + found["Hessians"] + found["solving"]
    assert slow["reading weights"] == pytest.approx(1.0 + 400 - busy)
    assert found["journal"] == pytest.approx(2 * 2 * 0.5 + 110 * 0.003)


def test_of_two_processes_each_has_half_of_the_batches_and_of_the_rows():
    def seconds(processes):
        works = [layer_work("b.0.q", 96, 48), layer_work("b.0.k", 10, 48, shares=True)]
        plan = Plan(tuple(one.layer for one in works), (), ())
        work = Work(works, tokens=1000, batches=3.0, streams=2, probe=0, held_out=0.0, transient=0)
        trial = Trial({"b.0": ["b.0"]}, 100, seconds={"b.0": 0.5}, load_rate=0.01)
        sizes = Sizes(quantized=100, plain=10, output=200, journal=110, layers={})
        return predict_seconds(
            plan, of_one_process(work, processes, 3) if processes > 1 else work, trial,
            {(48, SETTINGS): LayerRate(0.1, 7.0, 0.2, 0.3)}, DiskRate(0.001, 0.5, 0.002), sizes,
            calibration=3.0, load=1.0, source_bytes=1000, weight_bytes=400,
        )  # fmt: skip

    alone, divided = seconds(1), seconds(2)
    assert divided["forward passes"] == pytest.approx(alone["forward passes"] * 2 / 3)
    assert divided["Hessians"] == pytest.approx(alone["Hessians"] * 0.67, rel=0.01)
    # 64 of 96 rows, as they are divided in pieces of 32; all of 10.
    assert divided["solving"] == pytest.approx(7.0 + (64 + 10) * 0.2)
    assert divided["exchanging"] == pytest.approx((2 * 8 * 48**2 + 106 * 48) / 2 / 1e9)
    unchanged = set(alone) - {"forward passes", "Hessians", "solving", "exchanging"}
    assert all(divided[phase] == alone[phase] for phase in unchanged)
