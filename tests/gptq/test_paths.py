"""Triton's kernels are taken where they show that they are right, and the reason is told where they are not."""

from importlib.util import find_spec

import pytest
import torch

from fewbit.errors import KernelError
from fewbit.gptq import backends as paths
from fewbit.gptq.backends import disagreement, full_float32, path_for, why_no_triton

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="pip install triton")


@pytest.fixture
def kernels(monkeypatch):
    """The Triton kernels' module, with the torch loops in place of the kernels: the interpreter is slow."""
    from fewbit.gptq import gptq as ldlq
    from fewbit.gptq import grid
    from fewbit.gptq import triton_backend as triton

    def block(*inputs):
        *tensors, bits, codes, E = inputs
        return torch.stack(
            [
                ldlq.torch_block(*(x[b].clone() for x in tensors), bits, codes[b], E[b]).float()
                for b in range(len(E))
            ]
        )

    monkeypatch.setattr(triton, "round_block", block)

    def search(W, D, *rest):
        found = [grid.SEARCHES["torch"](w, d, *rest) for w, d in zip(W, D, strict=True)]
        return tuple(map(torch.stack, zip(*found, strict=True)))

    monkeypatch.setitem(grid.SEARCHES, "triton", search)
    return triton


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="checked on the GPU itself")
def test_the_kernels_pass_their_own_check():
    assert disagreement(CPU) == ""


@needs_triton
def test_codes_that_differ_by_one_are_found(kernels, monkeypatch):
    right = kernels.round_block

    def wrong(*inputs):
        losses = right(*inputs)
        inputs[-2][1, 20, 34] ^= 1
        return losses

    assert disagreement(CPU) == ""
    monkeypatch.setattr(kernels, "round_block", wrong)
    told = disagreement(CPU)
    assert (
        told
        == f"on cpu they give wrong results for {', '.join(f'columns of {b} bits' for b in (2, 3, 4, 8))}"
    )


@needs_triton
@pytest.mark.parametrize("which", ["E", "losses"])
def test_errors_and_losses_are_checked_too(kernels, monkeypatch, which):
    right = kernels.round_block

    def wrong(*inputs):
        losses = right(*inputs)
        if which == "E":
            inputs[-1][0, 20, 3] += 2**-9
        return losses * (1.001 if which == "losses" else 1)

    monkeypatch.setattr(kernels, "round_block", wrong)
    assert "columns of 4 bits" in disagreement(CPU)


@needs_triton
def test_a_worse_grid_is_found(kernels, monkeypatch):
    from fewbit.gptq import grid

    right = grid.SEARCHES["triton"]

    def wrong(W, D, starts, tried, bits, sym):
        scales, zeros = right(W, D, starts, tried, bits, sym)
        scales[1] *= 1 if sym else 1.25
        return scales, zeros

    monkeypatch.setitem(grid.SEARCHES, "triton", wrong)
    assert disagreement(CPU) == (
        "on cpu they give wrong results for asymmetric grids of 3 bits, asymmetric grids of 8 bits"
    )


@needs_triton
@pytest.mark.parametrize(
    "error", [RuntimeError("no such device\nat 7"), OSError("no such device"), "a TritonError"]
)
def test_kernels_that_do_not_run_are_a_reason(kernels, monkeypatch, error):
    from triton.errors import TritonError

    def broken(*inputs):
        raise TritonError("no such device") if isinstance(error, str) else error

    monkeypatch.setattr(kernels, "round_block", broken)
    assert disagreement(CPU) == "on cpu they do not run (no such device)"


def test_a_gpu_is_checked_once_and_the_torch_loops_take_over(monkeypatch):
    asked = []

    def check(device):
        asked.append(device)
        return "wrong" if device.index else ""

    monkeypatch.setattr(paths, "disagreement", check)
    monkeypatch.setattr(paths, "find_spec", lambda name: name)
    paths._checked.cache_clear()
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert [why_no_triton(device) for device in (first, second, first, second)] == ["", "wrong", "", "wrong"]
    assert asked == [first, second]
    weights = [_OnDevice(device) for device in (first, second)]
    assert [path_for("auto", W) for W in weights] == ["triton", "torch"]
    assert [path_for("torch", W) for W in weights] == ["torch", "torch"]
    paths._checked.cache_clear()


class _OnDevice:
    def __init__(self, device):
        self.device = device


def test_devices_without_kernels_are_not_checked(monkeypatch):
    monkeypatch.setattr(paths, "disagreement", lambda device: pytest.fail("checked"))
    assert why_no_triton(CPU) == "they are not made for cpu"
    assert why_no_triton(torch.device("mps")) == "they are not made for mps"
    monkeypatch.setattr(paths, "find_spec", lambda name: None)
    assert "pip install triton" in why_no_triton(torch.device("cuda", 0))
    with pytest.raises(KernelError, match="Triton kernels cannot run: the package triton is not installed"):
        path_for("triton", torch.zeros(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_this_gpu_triton_is_taken():
    W = torch.zeros(1, device="cuda")
    assert why_no_triton(W.device) == ""
    assert path_for("auto", W) == "triton"


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
