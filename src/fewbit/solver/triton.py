"""One block of LDLQ on a GPU: the Triton form of `native.ldlq_block`. Importing this needs the package triton.

A program holds the targets of 128 columns for a few rows on the chip and finishes them column by column: no launch
per column, and the rows are independent. Division and rounding are IEEE's and products are not fused with sums, so that
codes are the oracle's except where sums of float32 round differently.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 128
_ROWS = 16
_MAGIC = tl.constexpr(12582912.0)  # 1.5 · 2^23: added and taken off, it rounds half to even


@triton.jit
def _sweep(
    W, T, F, d, scales, zeros, groups, codes, E, losses, m, k,
    BITS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    rows_there = r < m
    there = (column[:, None] < k) & rows_there[None, :]
    t = tl.load(T + column[:, None] * m + r[None, :], mask=there, other=0.0)
    loss = tl.zeros((ROWS,), dtype=tl.float32)
    for i in range(k):
        group = tl.load(groups + i)
        s = tl.load(scales + group * m + r, mask=rows_there, other=1.0)
        z = tl.load(zeros + group * m + r, mask=rows_there, other=0.0)
        w = tl.load(W + i * m + r, mask=rows_there, other=0.0)
        t_i = tl.sum(tl.where(column[:, None] == i, t, 0.0), axis=0)
        # q = clamp(round(t / s) + z), ŵ = s (q − z), e = w − ŵ.
        steps = tl.minimum(tl.maximum(tl.div_rn(t_i, s), -z), (1 << BITS) - 1 - z)
        steps = (steps + _MAGIC) - _MAGIC
        w_hat = steps * s
        e, left = w - w_hat, t_i - w_hat
        loss += left * tl.load(d + i) * left
        tl.store(codes + i * m + r, (steps + z).to(tl.uint8), mask=rows_there)
        tl.store(E + i * m + r, e, mask=rows_there)
        f = tl.load(F + i * k + column, mask=(column > i) & (column < k), other=0.0)
        t += f[:, None] * e[None, :]
    tl.store(losses + r, loss, mask=rows_there)


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
) -> Tensor:
    """As `native.ldlq_block`: fills codes and E, returns each row's loss, float32 (m,)."""
    k, m = W.shape
    losses = torch.empty(m, dtype=torch.float32, device=W.device)
    _sweep[(triton.cdiv(m, _ROWS),)](
        W, T, F, d, scales, zeros, groups, codes, E, losses, m, k,
        BITS=bits, COLUMNS=_COLUMNS, ROWS=_ROWS, enable_fp_fusion=False,
    )  # fmt: skip
    return losses
