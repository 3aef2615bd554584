"""The solver's two loops on a GPU: Triton forms of `native.fit_grid` and `native.round_block`.

Importing this needs the package triton. Rows of a weight are independent, so programs take rows and nothing is
exchanged between them. Divisions and roundings are IEEE's; ŵ = s (q − z) is exact in float32, s having the 11
significant bits of a float16. So codes are the oracle's except where sums of float32 round differently.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grid import LARGEST_SCALE, LEAST_SQUARES_STEPS, SMALLEST_SCALE, TINY

# A warp has a row of W in every lane, and these columns of it in registers: a column is rounded without a word
# between lanes.
_ROWS = 32
_INNER = 16
_UNROLLED = 4  # loads under way at a time; divides _INNER

# In the grid search a lane has some columns of one row, and other lanes have the rest: few lanes for a narrow group,
# so that little is done more than once, a warp or more for a wide one.
_NARROW = 256
_COLUMNS_PER_THREAD = 64
_MOST_WARPS = 16

_MAGIC = tl.constexpr(12582912.0)  # 1.5 · 2^23: added and taken off, it rounds half to even
_SMALLEST = tl.constexpr(SMALLEST_SCALE)
_LARGEST = tl.constexpr(LARGEST_SCALE)
_TINY = tl.constexpr(TINY)
_STEPS = tl.constexpr(LEAST_SQUARES_STEPS)


@triton.jit
def _rounded(x):
    """To the nearest integer, half to even; |x| < 2²²."""
    return (x + _MAGIC) - _MAGIC


@triton.jit
def _row(tile, here):
    """The row of a tile that `here` marks. Adding −0 changes nothing, and compilers know it."""
    return tl.sum(tl.where(here, tile, -0.0), axis=0)


# `m` without its divisibility: loads are then one row per lane, not four rows in every fourth.
@triton.jit(do_not_specialize=["m", "G", "E_apart"])
def _sweep(
    W, T, F, d, scales, zeros, groups, codes, E, losses, m, k, G, E_apart,
    BITS: tl.constexpr, INNER: tl.constexpr, UNROLLED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    matrix = tl.program_id(1).to(tl.int64)
    W, T, codes, E = W + matrix * k * m, T + matrix * k * m, codes + matrix * k * m, E + matrix * E_apart
    F, d, groups = F + matrix * k * k, d + matrix * k, groups + matrix * k
    scales, zeros, losses = scales + matrix * G * m, zeros + matrix * G * m, losses + matrix * m
    column = tl.arange(0, INNER)
    rows_there = r < m
    loss = tl.zeros((ROWS,), dtype=tl.float32)
    for c in range(0, k, INNER):
        at = c + column
        inside = at < k
        there = inside[:, None] & rows_there[None, :]
        cells = at[:, None] * m + r[None, :]
        of_group = tl.load(groups + at, mask=inside, other=0)[:, None] * m + r[None, :]
        t = tl.load(T + cells, mask=there, other=0.0)
        w = tl.load(W + cells, mask=there, other=0.0)
        s = tl.load(scales + of_group, mask=there, other=1.0)
        z = tl.load(zeros + of_group, mask=there, other=0.0)
        # What the columns of this block before c left behind; this program wrote their errors.
        for a in range(0, c, UNROLLED):
            for j in tl.static_range(UNROLLED):
                f = tl.load(F + (a + j) * k + at, mask=inside, other=0.0)
                t += f[:, None] * tl.load(E + (a + j) * m + r, mask=rows_there, other=0.0)[None, :]
        q = tl.zeros((INNER, ROWS), dtype=tl.float32)
        e = tl.zeros((INNER, ROWS), dtype=tl.float32)
        for i in tl.static_range(INNER):
            here = column[:, None] == i
            t_i, s_i, z_i = _row(t, here), _row(s, here), _row(z, here)
            # q = clamp(round(t / s) + z), ŵ = s (q − z), e = w − ŵ.
            steps = tl.minimum(tl.maximum(tl.div_rn(t_i, s_i), -z_i), (1 << BITS) - 1 - z_i)
            steps = _rounded(steps)
            w_hat = steps * s_i
            e_i, left = _row(w, here) - w_hat, t_i - w_hat
            last = tl.minimum(c + i, k - 1)  # beyond the block's end nothing is left over
            loss += left * tl.load(d + last) * left
            q = tl.where(here, (steps + z_i)[None, :], q)
            e = tl.where(here, e_i[None, :], e)
            # F is unit upper triangular: of the columns up to i, which are done, nothing is used any more.
            f = tl.load(F + last * k + at, mask=inside, other=0.0)
            t += f[:, None] * e_i[None, :]
        tl.store(codes + cells, q.to(tl.uint8), mask=there)
        tl.store(E + cells, e, mask=there)
        tl.debug_barrier()
    tl.store(losses + r, loss, mask=rows_there)


def round_block(
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
    """As `native.round_block`, for one weight or for a batch of them: every tensor may have one dimension in front.

    Fills codes and E, returns each row's loss, float32 (m,) or (batch, m). In a batch the matrices of E may lie apart;
    everything else is contiguous.
    """
    *batch, k, m = W.shape
    losses = torch.empty(*batch, m, dtype=torch.float32, device=W.device)
    programs = (triton.cdiv(m, _ROWS), *(batch or [1]))
    with _on(W.device):
        _sweep[programs](
            W, T, F, d, scales, zeros, groups, codes, E, losses, m, k, scales.shape[-2], E.stride(0) if batch else 0,
            BITS=bits, INNER=_INNER, UNROLLED=_UNROLLED, ROWS=_ROWS, num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
    return losses


@triton.jit
def _storable(s):
    """As `grid.storable`."""
    size = tl.minimum(tl.maximum(tl.abs(s), _SMALLEST), _LARGEST)
    return tl.where(s < 0, -size, size).to(tl.float16).to(tl.float32)


@triton.jit
def _steps(w, s, z, levels):
    """q − z."""
    return _rounded(tl.minimum(tl.maximum(w * tl.div_rn(1.0, s), -z), levels - z))


@triton.jit
def _over_columns(tile):
    """The sum of every row."""
    return tl.sum(tl.sum(tile, axis=0), axis=0)


@triton.jit
def _attempt(w, d, levels, s, z, error, best_s, best_z):
    """The better of (s, z) and the best so far, with its error."""
    s = _storable(s)
    left = _steps(w, s, z, levels) * s - w
    new = _over_columns(left * left * d)
    better = new < error
    return tl.where(better, new, error), tl.where(better, s, best_s), tl.where(better, z, best_z)


@triton.jit(do_not_specialize=["m", "n", "G", "coarse_count", "fine_count", "offset_count"])
def _search(
    W, D, starts, coarse, fine, offsets, scales, zeros, m, n, G, coarse_count, fine_count, offset_count,
    BITS: tl.constexpr, SYM: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`grid._Search` for some rows of one group of one matrix."""
    levels: tl.constexpr = (1 << BITS) - 1
    half: tl.constexpr = 1 << (BITS - 1)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    matrix = tl.program_id(2).to(tl.int64)
    W, D, scales, zeros = W + matrix * m * n, D + matrix * n, scales + matrix * m * G, zeros + matrix * m * G
    place = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    column = (tl.load(starts + group) + place)[:, :, None]
    inside = column < tl.load(starts + group + 1)
    there = inside & (r < m)[None, None, :]
    w = tl.load(W + r.to(tl.int64)[None, None, :] * n + column, mask=there, other=0.0)
    # As wide as w, although it is the same in all rows: a narrower one would decide how lanes are divided.
    d = tl.load(D + tl.broadcast_to(column, (DEPTH, LANES, ROWS)), mask=there, other=0.0)
    low = tl.minimum(tl.min(tl.min(w, axis=0), axis=0), 0.0)
    high = tl.maximum(tl.max(tl.max(w, axis=0), axis=0), 0.0)
    error = tl.full((ROWS,), float("inf"), dtype=tl.float32)
    s = tl.full((ROWS,), 1.0, dtype=tl.float32)
    z = tl.full((ROWS,), half, dtype=tl.float32)
    if SYM:
        largest = tl.maximum(-low, high)
        error, s, z = _attempt(w, d, levels, largest * (2.0 / levels), z, error, s, z)
        base = largest / half
        for i in range(coarse_count):
            multiple = base * tl.load(coarse + i)
            error, s, z = _attempt(w, d, levels, multiple, z, error, s, z)
            error, s, z = _attempt(w, d, levels, -multiple, z, error, s, z)
    else:
        base = tl.div_rn(high - low, tl.full((ROWS,), levels, dtype=tl.float32))
        first = _rounded(tl.div_rn(-low, tl.maximum(base, _TINY)))
        error, s, z = _attempt(w, d, levels, base, _zero(first, levels), error, s, z)
        for i in range(coarse_count):
            multiple = base * tl.load(coarse + i)
            middle = _rounded(levels / 2.0 - tl.div_rn(high + low, tl.maximum(2.0 * multiple, _TINY)))
            for o in range(offset_count):
                moved = _zero(middle + tl.load(offsets + o), levels)
                error, s, z = _attempt(w, d, levels, multiple, moved, error, s, z)
    coarse_s, coarse_z = s, z
    for i in range(fine_count):
        multiple = coarse_s * tl.load(fine + i)
        if SYM:
            error, s, z = _attempt(w, d, levels, multiple, coarse_z, error, s, z)
        else:
            for o in range(-1, 2):
                error, s, z = _attempt(w, d, levels, multiple, _zero(coarse_z + o, levels), error, s, z)
    for _ in tl.static_range(_STEPS):
        # The scale that is best for the codes of the best grid: Σ D w q / Σ D q².
        q = _steps(w, s, z, levels)
        norm, product = _over_columns(q * d * q), _over_columns(q * d * w)
        best = tl.div_rn(product, tl.maximum(norm, _TINY))
        usable = (norm > 0) & (best * s > 0)
        error, s, z = _attempt(w, d, levels, tl.where(usable, best, s), z, error, s, z)
    empty = high == low
    tl.store(scales + r * G + group, tl.where(empty, 1.0, s), mask=r < m)
    tl.store(zeros + r * G + group, tl.where(empty, half, z), mask=r < m)


@triton.jit
def _zero(z, levels):
    """The nearest zero point that is allowed."""
    return tl.minimum(tl.maximum(z, 1.0), levels * 1.0)


def fit_grid(
    W: Tensor,
    D: Tensor,
    starts: Tensor,
    coarse: Tensor,
    fine: Tensor,
    offsets: Tensor,
    widest: int,
    bits: int,
    sym: bool,
) -> tuple[Tensor, Tensor]:
    """As `native.fit_grid`: scales and zeros, float32 (m, G).

    For one weight or for a batch of them: W and D may have one dimension in front, and what is returned then has.

    Args:
        W … offsets: all on one device. widest: columns of the largest group.
    """
    *batch, m, n = W.shape
    G = starts.numel() - 1
    lanes, rows = (4, 8) if widest <= _NARROW else (32, 1)
    depth = triton.next_power_of_2(triton.cdiv(widest, lanes))
    warps = max(1, depth * lanes * rows // (32 * _COLUMNS_PER_THREAD))
    scales = torch.empty(*batch, m, G, dtype=torch.float32, device=W.device)
    zeros = torch.empty_like(scales)
    programs = (triton.cdiv(m, rows), G, *(batch or [1]))
    with _on(W.device):
        _search[programs](
            W, D, starts, coarse, fine, offsets, scales, zeros, m, n, G, coarse.numel(), fine.numel(),
            offsets.numel(), BITS=bits, SYM=sym, DEPTH=depth, LANES=lanes, ROWS=rows,
            num_warps=min(warps, _MOST_WARPS), enable_fp_fusion=True,
        )  # fmt: skip
    return scales, zeros


def _on(device: torch.device) -> AbstractContextManager[object]:
    """While entered, kernels start on this device: Triton takes the current one."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    return torch.xpu.device(device) if device.type == "xpu" else nullcontext()
