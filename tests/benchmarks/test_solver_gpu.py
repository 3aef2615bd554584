"""The benchmark of the solver on a GPU, tried on the CPU."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parents[2] / "benchmarks" / "solver_gpu.py"


@pytest.fixture(scope="module")
def solver_gpu():
    spec = importlib.util.spec_from_file_location("solver_gpu", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["solver_gpu"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["solver_gpu"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(solver_gpu, capsys):
    assert solver_gpu.main([]) == 2
    assert "measures a CUDA device, and there is none here" in capsys.readouterr().err


def test_every_phase_of_every_layer_is_in_the_table(solver_gpu, capsys, monkeypatch):
    monkeypatch.setattr(solver_gpu, "TORCH_ROWS", 8)
    assert solver_gpu.main(["--device", "cpu", "--shapes", "small", "--bits", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(("| q, k, v |", "| down |"))]
    assert len(rows) == 2
    assert all(len(re.findall(r"\d ms", row)) == 6 for row in rows)
    assert "| q, k, v | 160 × 192 |" in rows[0]
    assert lines[-1].startswith("All 4 groups of layers: ")


def test_attempts_are_those_of_the_search(solver_gpu, monkeypatch):
    from fewbit.config import LayerSettings
    from fewbit.gptq import grid

    count = 0
    attempt = grid._Search.attempt

    def counted(self, s, z):
        nonlocal count
        count += 1
        attempt(self, s, z)

    monkeypatch.setattr(grid._Search, "attempt", counted)
    for bits, sym in ((4, True), (3, False)):
        count = 0
        grid.fit_grid(torch.randn(2, 8), torch.ones(8), torch.zeros(8), bits, sym=sym)
        assert solver_gpu.attempts(LayerSettings(bits, 8, sym, "none", 0.01, "gptq")) == count
