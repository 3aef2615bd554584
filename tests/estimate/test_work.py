"""Rates of this machine, and how they are scaled to larger widths."""

import pytest
import torch
from safetensors.torch import save_file

from fewbit import QuantConfig
from fewbit.checkpoint.safetensors_file import read_header
from fewbit.config import LayerSettings
from fewbit.errors import ModelError
from fewbit.estimate import work
from fewbit.estimate.work import LayerBenchmark, LayerRate, measure_disk
from fewbit.planning import LayerPlan

SETTINGS = LayerSettings(4, 16, True, "group", 0.01, "gptq")


def layer(name, m, n, settings=SETTINGS):
    return LayerPlan(name, m, n, settings, "b")


def measured(layers, paths=1, holdout=0):
    config = QuantConfig(fast=paths == 1)
    return LayerBenchmark(config, torch.float32, torch.device("cpu"), paths, holdout).rates(layers)


@pytest.mark.parametrize("paths", [1, 2])
def test_one_rate_for_every_width(paths):
    layers = [layer("b.q", 32, 48), layer("b.k", 16, 48), layer("b.down", 48, 80)]
    found = measured(layers, paths, holdout=8 * (paths - 1))
    assert found.keys() == {(48, SETTINGS), (80, SETTINGS)}
    assert all(rate.accumulate > 0 and rate.solve > 0 and rate.pack > 0 for rate in found.values())


def test_rounding_needs_no_hessian():
    settings = LayerSettings(4, 16, True, "group", 0.01, "rtn")
    [rate] = measured([layer("b.q", 32, 48, settings)]).values()
    assert rate.accumulate == rate.factor == 0 < rate.solve


def test_large_widths_are_carried_over(monkeypatch):
    monkeypatch.setattr(work, "LARGEST_WIDTH", 64)
    asked = []

    def rate(self, n, m, settings, holdout):
        asked.append((n, holdout))
        return LayerRate(1.0, 1.0, 1.0, 1.0, 1.0)

    monkeypatch.setattr(LayerBenchmark, "rate", rate)
    [found] = measured([layer("b.q", 16, 128)], paths=2, holdout=100).values()
    assert asked[-1] == (64, 50)
    assert found == LayerRate(accumulate=4.0, factor=8.0, layer=4.0, solve=4.0, pack=2.0)


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
