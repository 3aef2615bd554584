"""Notes that a calibration pass adds to the report."""

import torch

from fewbit.pipeline import quantize_layers


def test_missing_triton_kernels_are_noted_once(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(
        quantize_layers, "fallback_reason", lambda device: f"on {device} they give wrong results"
    )
    assert quantize_layers._solver_notes(gpu, 7) == [
        "the solver's Triton kernels were not used in any of 7 layers (on cuda:0 they give wrong results): many times "
        "slower"
    ]
    monkeypatch.setattr(quantize_layers, "fallback_reason", lambda device: "")
    assert quantize_layers._solver_notes(gpu, 7) == []
