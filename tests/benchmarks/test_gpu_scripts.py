"""The scripts that `make gpu` runs, tried out on a CPU with toy sizes."""

import json
import sys

import kernels_gpu
import pytest
import quantize_gpu
import torch
from layer_speed import Shape
from machine_limits import Machine
from transformers import LlamaConfig


def seconds(value, error=1e-3):
    return {"seconds": value, "error": error}


RESULTS = {
    "machine": {"threads": 1, "read_bandwidth": 4e12, "peaks": {"bfloat16": 8e14}, "name": "NVIDIA H200"},
    "dtype": "bfloat16",
    "versions": {"torch": "2.13"},
    "shapes": {
        "4096 × 14336, 4 bits, groups of 128": {
            "shape": vars(Shape(4096, 14336, 4, 128)),
            "nbytes": Shape(4096, 14336, 4, 128).nbytes,
            "refused": {"marlin": "not installed"},
            "tokens": {
                "1": {"triton": seconds(10e-6), "Linear": seconds(32e-6)},
                "16": {"triton": seconds(20e-6), "Linear": seconds(32e-6)},
                "2048": {"triton": seconds(4e-4, 2e-3), "Linear": seconds(3.6e-4)},
            },
        }
    },
}


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
    script.main()


def test_kernel_tables_say_what_was_missed():
    text = kernels_gpu.tables(RESULTS)
    assert "NVIDIA H200, torch 2.13, bfloat16. Measured limits: a copy moves 4.00 TB/s" in text
    assert (
        "| | 1 token | 16 tokens | 2048 tokens | of the bandwidth, 1 token | of the peak, most tokens | error |"
        in text
    )
    share = Shape(4096, 14336, 4, 128).nbytes / 10e-6 / 4e12
    peak = 2 * 2048 * 4096 * 14336 / 4e-4 / 8e14
    assert (
        f"| **fewbit** (`triton`) | 10.0 (3.20×) | 20.0 (1.60×) | 400.0 (0.90×) | {share:.0%} | {peak:.0%} | 2.0e-03 |"
        in text
    )
    assert f"- 1 token: 75% of the copy bandwidth; measured {share:.0%}\n" in text
    assert "- 16 tokens: 2.0× the 16-bit layer; measured 1.60×, missed" in text
    assert "- 2048 tokens: 0.8× the 16-bit layer; measured 0.90×" in text


def test_kernels_from_measuring_to_the_document(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels_gpu, "measure_machine", lambda rounds: Machine(1, 1e10, {"bfloat16": 1e11}))
    monkeypatch.setattr("layer_speed.cold_bytes", lambda: 1)
    monkeypatch.setattr(kernels_gpu, "TOKENS", (1, 3))
    monkeypatch.setattr(
        kernels_gpu, "shapes_called", lambda names: [Shape(32, 128, 4, 32), Shape(16, 64, 2, 32)]
    )
    document = tmp_path / "gpu.md"
    document.write_text("before\n<!-- kernels -->\nnothing\n<!-- /kernels -->\nafter\n")
    run(kernels_gpu, monkeypatch, "--results", tmp_path / "found.json", "--device", "cpu", "--rounds", 1)
    run(kernels_gpu, monkeypatch, "--results", tmp_path / "found.json", "--into", document)
    text = document.read_text()
    assert text.startswith("before\n<!-- kernels -->\nCPU, torch")
    assert text.endswith("\n<!-- /kernels -->\nafter\n")
    assert "**32 × 128, 4 bits, groups of 32**" in text
    assert "| 16-bit Linear |" in text


def test_the_widths_that_are_not_4_bits_are_measured_once():
    found = kernels_gpu.shapes_called(["8b", "8b"])
    assert sorted({shape.bits for shape in found}) == [2, 3, 4, 8]
    assert len(found) == len(set(found)) == 4 + 3


def test_the_floor_is_that_of_the_issue():
    found = quantize_gpu.floor(LlamaConfig(**quantize_gpu.EIGHT_BILLION), 128 * 2048, 2048)
    assert found["forward"] == pytest.approx(3.8e15, rel=0.01)
    assert found["Hessians"] == pytest.approx(2.15e15, rel=0.01)


def test_quantizing_from_the_model_to_the_document(tmp_path, monkeypatch):
    monkeypatch.setattr(quantize_gpu, "_peak", lambda device: {"name": "CPU", "peak": 1e9})
    found = quantize_gpu.measure(quantize_gpu.TINY, tmp_path, "cpu", 2, 16, alone=False)
    assert list(found["runs"]) == ["--fast, one stream", "defaults, two streams"]
    for one in found["runs"].values():
        assert one["by_phase"]["walk"] <= one["seconds"]
        assert one["written_bytes"] > 0
    (tmp_path / "found.json").write_text(json.dumps(found))
    document = tmp_path / "gpu.md"
    document.write_text("<!-- quantize -->\n<!-- /quantize -->\n")
    run(quantize_gpu, monkeypatch, "--results", tmp_path / "found.json", "--into", document)
    text = document.read_text()
    assert "CPU, 2 × 16 tokens" in text
    assert "| walk and solver (asked for: 90 s) |" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("script", [kernels_gpu, quantize_gpu])
def test_without_a_gpu_they_say_so_and_end_with_2(script, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run(script, monkeypatch, "--results", tmp_path / "found.json")
    assert end.value.code == 2
    assert "sees no CUDA device. Run this on a machine with a GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
