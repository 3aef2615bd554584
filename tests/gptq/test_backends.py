"""Which backend runs the solver's loops, and the reason when it is a slower one."""

import pytest
import torch

from fewbit import native
from fewbit.gptq import backends, fallback_reason
from fewbit.gptq.backends import NATIVE, TORCH, Backend, select
from fewbit.gptq.solve import full_float32

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_the_cpu_uses_the_compiled_module(monkeypatch):
    if native.available():
        assert select(CPU) is NATIVE
        assert fallback_reason(CPU) == ""
    monkeypatch.setattr(native, "_load", lambda: (None, "no compiler"))
    assert select(CPU) is TORCH
    assert fallback_reason(CPU) == "no compiler"


def test_devices_without_kernels_use_torch(monkeypatch):
    assert select(torch.device("mps")) is TORCH
    assert fallback_reason(torch.device("mps")) == "they are not made for mps"
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert select(GPU) is TORCH
    assert "pip install triton" in fallback_reason(GPU)


@pytest.mark.parametrize("reason", ["", "on cuda:0 they do not run"])
def test_a_gpu_uses_triton_where_its_check_passes(monkeypatch, reason):
    triton = pytest.importorskip("fewbit.gptq.backends.triton", reason="pip install triton")
    monkeypatch.setattr(triton, "self_check", lambda device: reason)
    assert select(GPU) == (TORCH if reason else Backend("triton", triton.search, triton.round_block))
    assert fallback_reason(GPU) == reason


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_triton_is_used_on_this_gpu():
    assert fallback_reason(GPU) == ""
    assert select(GPU).name == "triton"


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="an older torch has another name for it"
)
def test_float32_is_full_inside_and_as_before_outside():
    def precision():
        return torch.backends.cuda.matmul.fp32_precision

    default = precision()
    with full_float32():
        assert precision() == default != "tf32"
    torch.set_float32_matmul_precision("high")
    try:
        with full_float32():
            assert precision() == "ieee"
        assert precision() == "tf32"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
