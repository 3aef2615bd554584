"""Quantized layers as ggml's blocks of 32 inputs: Q4_0, Q5_0 and Q8_0, which have one float16 scale each.

    Q4_0   w = d (q − 8),  q = 0 … 15: bytes d, then 16 bytes; the low halves are inputs 0 … 15, the high ones 16 … 31
    Q5_0   w = d (q − 16), q = 0 … 31: d, the fifth bits of all inputs in 4 bytes, then the low bits as in Q4_0
    Q8_0   w = d q,        q = −128 … 127: d, then 32 signed bytes

A layer fits if its groups are multiples of 32 and code − zero point stays in the range. Source: ggml-quants.c.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantized_matrix import QuantizedMatrix
from .target import LayerGrid, Verdict, refuse_order_and_short_groups

BLOCK = 32
# Type → (smallest, largest) code − zero point, and bytes of a block.
TYPES = {"Q4_0": (-8, 7, 18), "Q5_0": (-16, 15, 22), "Q8_0": (-128, 127, 34)}


def type_of(grid: LayerGrid) -> str | None:
    """Return the smallest type whose range holds every possible code of a layer; None if none does."""
    low, high = -int(grid.zeros.max()), 2**grid.bits - 1 - int(grid.zeros.min())
    return next((name for name, (least, most, _) in TYPES.items() if least <= low and high <= most), None)


def judge(grid: LayerGrid) -> Verdict:
    """Decide whether blocks can hold a layer."""
    refused = refuse_order_and_short_groups(grid)
    if refused:
        return refused
    size = grid.shape[1] if grid.group_size == -1 else grid.group_size
    if size % BLOCK:
        return Verdict(f"groups of {size} inputs are no multiple of {BLOCK}")
    kind = type_of(grid)
    if kind is None:
        return Verdict("8 bits with an asymmetric grid: code − zero point leaves −128 … 127")
    scales = grid.scales.double()
    change = (scales.half().double() - scales).abs() / scales.abs().clamp(min=1e-30)
    largest = 2**grid.bits - 1
    return Verdict(
        None, largest * float(change.max()), "scales are rounded to float16" if change.any() else ""
    )


def blocks_of(codes: QuantizedMatrix, kind: str) -> Tensor:
    """Return the blocks of a layer: uint8 (out, in / 32 · bytes of a block)."""
    out, n = codes.shape
    count, groups = n // BLOCK, codes.scales.shape[1]
    d = codes.scales.half().repeat_interleave(count // groups, dim=1).contiguous()  # (out, blocks)
    centered = codes.codes.to(torch.int16).view(out, groups, -1) - codes.zeros.to(torch.int16)[..., None]
    q = (centered.view(out, count, BLOCK) - (0 if kind == "Q8_0" else TYPES[kind][0])).to(torch.int16)
    parts = [d.view(torch.uint8).view(out, count, 2)]
    if kind == "Q8_0":
        parts.append(q.to(torch.int8).view(torch.uint8))
    else:
        q = q.to(torch.uint8)
        if kind == "Q5_0":
            parts.append(_bits((q >> 4).view(out, count, 4, 8)))
        parts.append((q[..., :16] & 15) | ((q[..., 16:] & 15) << 4))
    return torch.cat(parts, dim=-1).view(out, -1)


def _bits(values: Tensor) -> Tensor:
    """Pack eight zeros and ones into each byte, the first in the lowest bit."""
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8)
    return (values * weights).sum(-1).to(torch.uint8)
