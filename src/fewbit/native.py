"""The compiled part of the solver: the only place that imports `fewbit._native`.

Contract: every function here has a torch counterpart that gives the same result up to the order of
floating-point sums. Where the module is absent, `available` is False and `unsupported_reason` says why.
Threads follow `torch.get_num_threads()`.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import KernelError

Backend = Literal["auto", "torch", "native", "triton"]


@functools.cache
def _load() -> tuple[Any, str]:
    """The compiled module and an empty string, or None and the reason."""
    try:
        return importlib.import_module("fewbit._native"), ""
    except ImportError as error:
        return None, (
            f"the compiled module fewbit._native cannot be imported ({error}). Installing fewbit with a "
            "C++17 compiler at hand builds it; until then the slower torch path is used."
        )


def available() -> bool:
    """Whether the compiled solver can be used here."""
    return _load()[0] is not None


def unsupported_reason() -> str:
    """Why it cannot, in words; empty where it can."""
    return _load()[1]


def instruction_sets() -> tuple[str, ...]:
    """What the compiled module can use here, for example ``("avx512", "avx2", "generic", "avx512_bf16")``."""
    module, _ = _load()
    return tuple(module.instruction_sets()) if module is not None else ()


def module() -> Any:
    """The compiled module.

    Raises:
        KernelError: it is not there; the message says why.
    """
    found, reason = _load()
    if found is None:
        raise KernelError(reason)
    return found


def advise_huge_pages(tensor: Tensor) -> None:
    """Ask the system for huge pages behind a large, still unwritten tensor: fewer address translations are missed."""
    module().advise_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def use(backend: Backend, tensor: Tensor, needs: str | None = None) -> bool:
    """Whether a computation on `tensor` runs in the compiled module.

    Args:
        backend: "auto" takes the module where it can run; "native" insists; "torch" and "triton" refuse it.
        tensor: the main operand; the module works in CPU memory only.
        needs: an instruction set without which there is no compiled version.

    Raises:
        KernelError: "native" was asked for and cannot run; the message says which condition fails.
    """
    if backend in ("torch", "triton"):
        return False
    reason = _unsupported_here(tensor, needs)
    if reason and backend == "native":
        raise KernelError(f"the compiled solver cannot run: {reason}")
    return not reason


def _unsupported_here(tensor: Tensor, needs: str | None) -> str:
    if not available():
        return unsupported_reason()
    if tensor.device.type != "cpu":
        return f"the tensor is on {tensor.device}, and it works on the CPU only"
    if needs is not None and needs not in instruction_sets():
        return f"this processor has no {needs}"
    return ""


def product_bf16(
    A: Tensor,
    B: Tensor,
    C: Tensor,
    ends: Tensor,
    row_factors: Tensor,
    column_factors: Tensor,
    *,
    upper: bool,
) -> None:
    """C += Aᵀ B, or only its upper triangle, in integers: every batch's sum is scaled and rounded on its own.

    Args:
        A, B: bfloat16 (tokens, n). C: int32 (n, n). All contiguous.
        ends: int64 (batches,), where each batch ends: rows ``ends[b − 1] … ends[b]`` are batch b.
        row_factors, column_factors: float32 (n,), what the sums are multiplied by.
    """
    _load()[0].product_bf16(
        A.data_ptr(), B.data_ptr(), C.data_ptr(), ends.data_ptr(), ends.numel(), A.shape[1],
        row_factors.data_ptr(), column_factors.data_ptr(), upper, torch.get_num_threads(),
    )  # fmt: skip


def fit_grid(
    W: Tensor,
    D: Tensor,
    starts: Tensor,
    coarse: Tensor,
    fine: Tensor,
    offsets: Tensor,
    bits: int,
    sym: bool,
    isa: str = "best",
) -> tuple[Tensor, Tensor]:
    """The search of `gptq.grid`, groups being the columns ``starts[g] … starts[g+1]``.

    Args:
        W: float32 (m, n) contiguous. D: float32 (n,). starts: int32 (G + 1,).
        coarse, fine: float32, multiples of the base scale, and of the best coarse scale.
        offsets: int32, candidate zero points relative to the centred one; not used when `sym`.
        isa: one of `instruction_sets`, or "best".

    Returns:
        scales float32 (m, G) and zeros float32 (m, G).
    """
    m, n = W.shape
    G = starts.numel() - 1
    scales = torch.empty(m, G, dtype=torch.float32)
    zeros = torch.empty(m, G, dtype=torch.float32)
    _load()[0].fit_grid(
        W.data_ptr(), D.data_ptr(), starts.data_ptr(), m, n, G, coarse.data_ptr(), coarse.numel(),
        fine.data_ptr(), fine.numel(), offsets.data_ptr(), offsets.numel(), bits, sym,
        scales.data_ptr(), zeros.data_ptr(), torch.get_num_threads(), isa,
    )  # fmt: skip
    return scales, zeros


def ldlq_block(
    W: Tensor,
    T: Tensor,
    F: Tensor,
    d: Tensor,
    scales: Tensor,
    zeros: Tensor,
    groups: Tensor,
    bits: int,
    codes: Tensor,
    E: Tensor,
    isa: str = "best",
) -> Tensor:
    """One block of `gptq.gptq`: fills codes and E, returns the block's share of every row's loss, float32 (m,).

    All matrices are contiguous, and those with m as the last dimension hold one column of W per row.

    Args:
        W: float32 (k, m), the weights; k ≤ 128. T: float32 (k, m), the targets.
        F: float32 (k, k), unit upper triangular. d: float32 (k,), the diagonal of D.
        scales, zeros: float32 (G, m). groups: int32 (k,).
        codes: uint8 (k, m), written. E: float32 (k, m), written: W − Ŵ.
        isa: one of `instruction_sets`, or "best".
    """
    k, m = W.shape
    loss = torch.empty(m, dtype=torch.float32)
    _load()[0].ldlq_block(
        W.data_ptr(), T.data_ptr(), F.data_ptr(), d.data_ptr(), scales.data_ptr(), zeros.data_ptr(),
        groups.data_ptr(), m, k, bits, codes.data_ptr(), E.data_ptr(), loss.data_ptr(),
        torch.get_num_threads(), isa,
    )  # fmt: skip
    return loss
