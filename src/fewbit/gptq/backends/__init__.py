"""The two loops of the solver, the grid search and the block of columns, in torch, C++ and Triton.

`select` decides once per device: the compiled module on the CPU, Triton's kernels on a GPU if they pass their check
there, torch otherwise. `fallback_reason` says why torch was taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from ... import native
from ..gptq import RoundBlock, round_block
from ..grid import Candidates, Grid, Search, search

_GPUS = ("cuda", "xpu")  # AMD's are called cuda, too


@dataclass(frozen=True)
class Backend:
    """One implementation of both loops.

    Attributes:
        name: "torch", "native" or "triton".
        search: the grid search, with the signature of `grid.search`.
        round_block: the loop over a block of columns, with the signature of `gptq.round_block`.
    """

    name: str
    search: Search
    round_block: RoundBlock


TORCH = Backend("torch", search, round_block)


def _native_search(
    W: Tensor, D: Tensor, starts: Tensor, candidates: Candidates, bits: int, sym: bool
) -> tuple[Tensor, Tensor]:
    lists = candidates.coarse, candidates.fine, candidates.offsets
    return native.fit_grid(W.contiguous(), D.contiguous(), starts.int(), *lists, bits, sym)


def _native_round_block(
    W: Tensor, T: Tensor, F: Tensor, d: Tensor, grid: Grid, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    codes, E = torch.empty_like(T, dtype=torch.uint8), torch.empty_like(T)
    losses = torch.empty(len(T), W.shape[1])
    for b, (t, scales, zeros) in enumerate(zip(T, grid.scales, grid.zeros, strict=True)):
        losses[b] = native.round_block(W, t, F, d, scales, zeros, grid.g_idx, bits, codes[b], E[b])
    return codes, E, losses


NATIVE = Backend("native", _native_search, _native_round_block)


def select(device: torch.device) -> Backend:
    """The fastest backend that works on the device."""
    return _selected(device)[0]


def fallback_reason(device: torch.device) -> str:
    """Why the compiled form of the loops is not used on the device, in words; empty where it is."""
    return _selected(device)[1]


def _selected(device: torch.device) -> tuple[Backend, str]:
    if device.type == "cpu":
        return (NATIVE, "") if native.available() else (TORCH, native.unsupported_reason())
    if device.type not in _GPUS:
        return TORCH, f"they are not made for {device.type}"
    if find_spec("triton") is None:
        return TORCH, "the package triton is not installed (pip install triton)"
    from . import triton

    reason = triton.self_check(device)
    return (TORCH, reason) if reason else (Backend("triton", triton.search, triton.round_block), "")
