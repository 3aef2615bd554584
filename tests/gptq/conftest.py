"""Fixtures of the solver's tests."""

import pytest

from fewbit import native
from fewbit.gptq import solve
from fewbit.gptq.backends import NATIVE, TORCH


@pytest.fixture(params=["torch", "native"])
def backend(request, monkeypatch):
    """Each backend that works here, which `quantize_weight` uses too."""
    if request.param == "native" and not native.available():
        pytest.skip(native.unsupported_reason())
    chosen = {"torch": TORCH, "native": NATIVE}[request.param]
    monkeypatch.setattr(solve, "select", lambda device: chosen)
    return chosen
