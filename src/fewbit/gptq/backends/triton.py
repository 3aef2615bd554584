"""The solver's two loops on a GPU, as Triton kernels.

Rows of a weight are independent, so programs take rows and exchange nothing. Divisions and roundings are IEEE's, and
ŵ = s (q − z) is exact in float32, because s has the 11 significant bits of a float16. So the codes equal torch's,
except where float32 sums round differently.
"""

from __future__ import annotations

import functools
import subprocess
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from ..gptq import round_block as torch_round_block
from ..grid import LARGEST_SCALE, LEAST_SQUARES_STEPS, SMALLEST_SCALE, TINY, Candidates, Grid

# Every lane of a warp holds one row of W, and _INNER of its columns in registers: lanes exchange nothing.
_ROWS = 32
_INNER = 16
_UNROLLED = 4  # loads under way at a time; divides _INNER

# In the grid search several lanes share a row: few for a narrow group, a warp or more for a wide one.
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
@triton.jit(do_not_specialize=["m", "G"])
def _round_block(
    W, T, F, d, scales, zeros, groups, codes, E, losses, m, k, G,
    BITS: tl.constexpr, INNER: tl.constexpr, UNROLLED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`gptq.round_block` for some rows of W on one grid."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(1).to(tl.int64)
    T, codes, E = T + b * k * m, codes + b * k * m, E + b * k * m
    scales, zeros, losses = scales + b * G * m, zeros + b * G * m, losses + b * m
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
        # t_i += Σ_{j<c} (w_j − ŵ_j) F_ji, j in this block; this program wrote these errors.
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
    W: Tensor, T: Tensor, F: Tensor, d: Tensor, grid: Grid, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Round one block of columns, as `gptq.round_block`; every tensor is contiguous, and T stays."""
    B, k, m = T.shape
    codes, E = torch.empty_like(T, dtype=torch.uint8), torch.empty_like(T)
    losses = torch.empty(B, m, dtype=torch.float32, device=W.device)
    with _on(W.device):
        _round_block[triton.cdiv(m, _ROWS), B](
            W, T, F, d, grid.scales, grid.zeros, grid.g_idx, codes, E, losses, m, k, grid.scales.shape[1],
            BITS=bits, INNER=_INNER, UNROLLED=_UNROLLED, ROWS=_ROWS, num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
    return codes, E, losses


@triton.jit
def _storable(s):
    """Round s as `grid.storable`."""
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
    """`grid.search` for some rows of one group."""
    levels: tl.constexpr = (1 << BITS) - 1
    half: tl.constexpr = 1 << (BITS - 1)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    index = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    column = (tl.load(starts + group) + index)[:, :, None]
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


def search(
    W: Tensor, D: Tensor, starts: Tensor, candidates: Candidates, bits: int, sym: bool
) -> tuple[Tensor, Tensor]:
    """Find scales and zero points, as `grid.search`."""
    m, n = W.shape
    G, widest = len(starts) - 1, int(starts.diff().max())
    lanes, rows = (4, 8) if widest <= _NARROW else (32, 1)
    depth = triton.next_power_of_2(triton.cdiv(widest, lanes))
    warps = max(1, depth * lanes * rows // (32 * _COLUMNS_PER_THREAD))
    lists = (starts.int(), candidates.coarse, candidates.fine, candidates.offsets)
    on_device = [values.to(W.device).contiguous() for values in lists]
    scales = torch.empty(m, G, dtype=torch.float32, device=W.device)
    zeros = torch.empty_like(scales)
    with _on(W.device):
        _search[triton.cdiv(m, rows), G](
            W.contiguous(), D.contiguous(), *on_device, scales, zeros, m, n, G,
            *(len(values) for values in lists[1:]), BITS=bits, SYM=sym, DEPTH=depth, LANES=lanes, ROWS=rows,
            num_warps=min(warps, _MOST_WARPS), enable_fp_fusion=True,
        )  # fmt: skip
    return scales, zeros


def _on(device: torch.device) -> AbstractContextManager[object]:
    """While entered, kernels start on this device: Triton takes the current one."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    return torch.xpu.device(device) if device.type == "xpu" else nullcontext()


@functools.cache
def self_check(device: torch.device) -> str:
    """Run both kernels on small problems with known answers; return what is wrong, or an empty string."""
    try:
        wrong = [
            bits
            for bits in (2, 3, 4, 8)
            if not (_rounds_like_torch(bits, device) and _finds_scale(bits, device))
        ]
    # What Triton, the compilers it starts, and the driver raise for a device that they cannot serve.
    except (TritonError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        lines = str(error).strip().splitlines()
        return f"on {device} they do not run ({lines[0] if lines else type(error).__name__})"
    return (
        f"on {device} they give wrong results for {', '.join(f'{bits} bits' for bits in wrong)}"
        if wrong
        else ""
    )


def _rounds_like_torch(bits: int, device: torch.device) -> bool:
    """Compare a block with torch. All numbers are multiples of powers of two, so that every sum is exact."""
    generator = torch.Generator().manual_seed(0)
    B, k, m, G = 2, 21, 35, 3

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).float()

    W, d = integers(-64, 65, k, m) / 64, integers(1, 9, k) / 4
    F = torch.triu(integers(-2, 3, k, k) / 4, diagonal=1) + torch.eye(k)
    scales = integers(1, 8, B, G, m) * (2 * integers(0, 2, B, G, m) - 1) / 2 ** (bits + 1)
    zeros, groups = integers(1, 2**bits, B, G, m), torch.sort(integers(0, G, k)).values.int()
    W, F, d, scales, zeros, groups = (part.to(device) for part in (W, F, d, scales, zeros, groups))
    grid, T = Grid(scales, zeros, groups), W.expand(B, k, m)
    codes, E, losses = round_block(W, T.contiguous(), F, d, grid, bits)
    expected, E_expected, truth = torch_round_block(W, T.clone(), F, d, grid, bits)
    close = torch.allclose(losses.double(), truth, rtol=1e-4, atol=0)
    return torch.equal(codes, expected) and torch.equal(E, E_expected) and close


def _finds_scale(bits: int, device: torch.device) -> bool:
    """Search the grid of weights that lie on one, in groups of 8: the search must find a grid without error."""
    step, zero = 2.0**-6, 2 ** (bits - 1)
    q = torch.arange(24, device=device).mul(5).remainder(2**bits - 1) + 1
    q[::8], q[1::8] = 0, 2**bits - 1  # the whole range in every group
    W = ((q - zero) * step).expand(11, 24).contiguous()
    offsets = torch.zeros(1, dtype=torch.int32)
    candidates = Candidates(torch.tensor([0.8, 1.0, 1.1]), torch.tensor([0.95, 1.0]), offsets)
    starts = torch.tensor([0, 8, 16, 24])
    for sym in (True, False):
        scales, zeros = search(W, torch.ones(24, device=device), starts, candidates, bits, sym)
        s, z = scales.repeat_interleave(8, 1), zeros.repeat_interleave(8, 1)
        w_hat = (torch.round(W / s).add(z).clamp(0, 2**bits - 1) - z) * s
        if not torch.equal(w_hat, W):
            return False
    return True
