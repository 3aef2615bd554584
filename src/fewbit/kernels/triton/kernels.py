"""The Triton kernels behind `fewbit.kernels.triton.kernel`. Importing this needs the package triton.

All read the words of `fragments` once, 16 bytes at a time and coalesced, and never move codes between threads: shift
and mask turn a word into the registers of matrix instructions.

- `_few`, for few tokens: what counts is bytes. Weights enter the product as bare codes; scale and zero point are
  applied to the sums of each group, a few operations per group instead of two per weight. Outputs are the rows of the
  product and tokens its columns, of which eight are the least that a matrix instruction takes. Each warp has inputs of
  its own (a batched product, summed over the batch in the end), so that a program can take all inputs of 32 outputs
  with many loads on their way.
- `_many`, for more tokens: weights are brought to the activations' dtype, rounded once, on their way to the product.
- `_unpack`: the same weights, to memory; with many tokens a dense product then costs less than unpacking per tile.

A code q becomes a 16-bit number without a conversion: in float16, q in the lowest bits is 2⁻²⁴·q (a subnormal, which
matrix units take; the sign bit is set so that the compiler keeps both halves together); in bfloat16, q under the
exponent of 128 is 128 + q. With r = a·q + b so obtained, and g the group of input k:

    y[m, n] = Σ_g s[g, n] · ( (Σ_k x[m, k]·r[k, n]) / a  −  (z[g, n] + b / a) · Σ_k x[m, k] )

Products are exact, sums are float32. The loss by cancellation is below 2⁻¹⁸ of a sum's size, in bfloat16 the worst.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import Fragments, pairs_in_unit


@triton.jit
def _tile(outputs, TILES: tl.constexpr):
    """The program's tiles (TILES,); where the last has fewer, it reads one again."""
    return tl.minimum(tl.program_id(0) * TILES + tl.arange(0, TILES), (outputs - 1) // 32)


@triton.jit
def _words(words, tile, block, plane: tl.constexpr, PLANES: tl.constexpr, blocks, EVEN: tl.constexpr,
           S: tl.constexpr, B: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """One word of each unit, uint32 (S, B, 8, 32·T). tile (T,), block (S, B)."""
    at = (tile[None, None, :] * blocks + block[:, :, None]) * PLANES + plane
    at = (at * 256)[:, :, :, None] + tl.arange(0, 256)[None, None, None, :]
    if EVEN:
        w = tl.load(words + at).to(tl.uint32, bitcast=True)
    else:
        w = tl.load(words + at, mask=(block < blocks)[:, :, None, None], other=0).to(tl.uint32, bitcast=True)
    # (rows / 4, n % 8, rows % 4, n / 8) → rows, n
    w = w.reshape(S, B, T, 2, 8, 4, 4).permute(0, 1, 3, 5, 2, 6, 4)
    return w.reshape(S, B, 8, 32 * T)


@triton.jit
def _pair(w0, w1, w2, PAIR: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr, HIGH: tl.constexpr):
    """Codes of pair PAIR as 16-bit numbers, (…, 2). HIGH: of 8 bits in bfloat16 the upper digit, 2048 + 16·digit."""
    if BITS == 3 and PAIR == 15:
        p = ((w0 >> 15) & 0x00010001) | ((w1 >> 14) & 0x00020002) | ((w2 >> 13) & 0x00040004)
    elif BITS == 3:
        w = w0 if PAIR < 5 else w1 if PAIR < 10 else w2
        p = (w >> (3 * (PAIR % 5))) & 0x00070007
    elif BITS == 8 and BF16:
        p = (w0 >> (8 * PAIR + 4 * HIGH)) & 0x000F000F
    else:
        p = (w0 >> (BITS * PAIR)) & (((1 << BITS) - 1) * 0x10001)
    if BF16:
        p = p | (0x45004500 if HIGH else 0x43004300)
        low = (p & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        high = (p >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        p = p | 0x80008000
        low = (p & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
        high = (p >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return tl.join(low, high)


@triton.jit
def _pairs(w0, w1, w2, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr,
           BITS: tl.constexpr, BF16: tl.constexpr, HIGH: tl.constexpr):  # fmt: skip
    """Pairs FIRST, FIRST + STEP, … of a unit: (…, 2, 2, …) with log2(COUNT) axes of 2 at the end, in order."""
    if COUNT == 1:
        return _pair(w0, w1, w2, FIRST, BITS, BF16, HIGH)
    else:
        even = _pairs(w0, w1, w2, FIRST, 2 * STEP, COUNT // 2, BITS, BF16, HIGH)
        odd = _pairs(w0, w1, w2, FIRST + STEP, 2 * STEP, COUNT // 2, BITS, BF16, HIGH)
        return tl.join(even, odd)


@triton.jit
def _codes(w0, w1, w2, FIRST: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr,
           HIGH: tl.constexpr, S: tl.constexpr, B: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """Pairs FIRST … FIRST + COUNT of B blocks, positions in order: (S, 16·COUNT·B, N), as numbers a·q + b."""
    c = _pairs(w0, w1, w2, FIRST, 1, COUNT, BITS, BF16, HIGH).reshape(S, B, 8, N, 2, COUNT)
    return c.permute(0, 1, 5, 2, 4, 3).reshape(S, 16 * COUNT * B, N)


@triton.jit
def _x(x, order, m, position, tokens, inputs, length, ORDERED: tl.constexpr, EVEN: tl.constexpr):
    """x at (…, tokens, positions), 0 where there is none. m (…, tokens, 1) int64, position (…, 1, positions)."""
    if ORDERED:
        position = tl.load(order + position, mask=position < length, other=inputs)
    elif EVEN:
        return tl.load(x + m * inputs + position, mask=(m < tokens) & (position >= 0), other=0.0)
    return tl.load(x + m * inputs + position, mask=(m < tokens) & (position < inputs), other=0.0)


# What changes from call to call must not compile anew.
@triton.jit(do_not_specialize=["tokens", "groups", "length"])
def _few(
    x, words, zeros, scales, order, y, tokens, inputs, outputs, blocks, groups, length,
    BITS: tl.constexpr, GROUP: tl.constexpr, ORDERED: tl.constexpr, EVEN: tl.constexpr, BF16: tl.constexpr,
    WIDEN: tl.constexpr, AT_ONCE: tl.constexpr, BLOCKS: tl.constexpr, TOKENS: tl.constexpr, TILES: tl.constexpr,
    SLICES: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    PAIRS: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    PLANES: tl.constexpr = 3 if BITS == 3 else 1
    N: tl.constexpr = 32 * TILES
    K: tl.constexpr = 16 * AT_ONCE * BLOCKS
    TWO: tl.constexpr = BITS == 8 and BF16
    # b / a and 1 / a of the formula above.
    OFFSET: tl.constexpr = (2176 if TWO else 128) if BF16 else 0
    FACTOR: tl.constexpr = 1.0 if BF16 else -16777216.0
    piece = tl.program_id(1)
    m = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    tile = _tile(outputs, TILES)
    n = tl.program_id(0) * N + tl.arange(0, N)
    slice_block = tl.arange(0, SLICES) * BLOCKS
    STEP: tl.constexpr = SLICES * BLOCKS
    ones = tl.full((SLICES, 16, K), 1.0, x.dtype.element_ty)
    if WIDEN:
        ones = ones.to(tl.float32)
    sums = tl.zeros((SLICES, N, TOKENS), dtype=tl.float32)
    for first in tl.range(piece * STEP, blocks, STEP * SPLIT, num_stages=STAGES):
        block = first + slice_block[:, None] + tl.arange(0, BLOCKS)[None, :]
        w0 = _words(words, tile, block, 0, PLANES, blocks, EVEN, SLICES, BLOCKS, TILES)
        w1, w2 = w0, w0
        if BITS == 3:
            w1 = _words(words, tile, block, 1, PLANES, blocks, EVEN, SLICES, BLOCKS, TILES)
            w2 = _words(words, tile, block, 2, PLANES, blocks, EVEN, SLICES, BLOCKS, TILES)
        for part in tl.static_range(PAIRS // AT_ONCE):
            start = (first + slice_block) * (16 * PAIRS) + part * (16 * AT_ONCE)
            group = start // GROUP if GROUP else start * 0
            known = (group[:, None] < groups) & (n[None, :] < outputs)
            at = group[:, None] * outputs + n[None, :]
            s = tl.load(scales + at, mask=known, other=0.0).to(tl.float32)
            z = tl.load(zeros + at, mask=known, other=0).to(tl.float32) + OFFSET
            a = _x(x, order, m[None, :, None].to(tl.int64), (start[:, None] + tl.arange(0, K)[None, :])[:, None, :],
                   tokens, inputs, length, ORDERED, EVEN).permute(0, 2, 1)  # fmt: skip
            q = _codes(w0, w1, w2, part * AT_ONCE, AT_ONCE, BITS, BF16, False, SLICES, BLOCKS, N).permute(
                0, 2, 1
            )
            if WIDEN:
                a, q = a.to(tl.float32), q.to(tl.float32)
            found = tl.dot(q, a, input_precision="ieee")
            if TWO:
                q = _codes(w0, w1, w2, part * AT_ONCE, AT_ONCE, BITS, BF16, True, SLICES, BLOCKS, N).permute(
                    0, 2, 1
                )
                if WIDEN:
                    q = q.to(tl.float32)
                found = tl.dot(q, a, found, input_precision="ieee")
            total = tl.max(tl.dot(ones, a, input_precision="ieee"), 1)  # Σ x, the same in all rows
            sums += (found * FACTOR - total[:, None, :] * z[:, :, None]) * s[:, :, None]
    at = y + (piece.to(tl.int64) * tokens + m[:, None]) * outputs + n[None, :]
    tl.store(
        at,
        tl.sum(sums, 0).permute(1, 0).to(y.dtype.element_ty),
        mask=(m[:, None] < tokens) & (n[None, :] < outputs),
    )


@triton.jit
def _weights(
    words, zeros, scales, tile, n, first, outputs, blocks, groups, part: tl.constexpr, dtype: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, BF16: tl.constexpr, AT_ONCE: tl.constexpr,
    BLOCKS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """ŵ = s · (q − z) of AT_ONCE pairs of BLOCKS blocks from `first`: (K, N), rounded once to `dtype`."""
    PAIRS: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    PLANES: tl.constexpr = 3 if BITS == 3 else 1
    N: tl.constexpr = 32 * TILES
    block = first + tl.arange(0, BLOCKS)[None, :]
    w0 = _words(words, tile, block, 0, PLANES, blocks, EVEN, 1, BLOCKS, TILES)
    w1, w2 = w0, w0
    if BITS == 3:
        w1 = _words(words, tile, block, 1, PLANES, blocks, EVEN, 1, BLOCKS, TILES)
        w2 = _words(words, tile, block, 2, PLANES, blocks, EVEN, 1, BLOCKS, TILES)
    start = first * (16 * PAIRS) + part * (16 * AT_ONCE)
    group = n * 0 + start // GROUP if GROUP else n * 0
    known = (group < groups) & (n < outputs)
    s = tl.load(scales + group * outputs + n, mask=known, other=0.0).to(tl.float32)
    z = tl.load(zeros + group * outputs + n, mask=known, other=0).to(tl.float32)
    q = _codes(w0, w1, w2, part * AT_ONCE, AT_ONCE, BITS, BF16, False, 1, BLOCKS, N).to(tl.float32)
    if BF16:
        q = q - 128.0
        if BITS == 8:
            q += (
                _codes(w0, w1, w2, part * AT_ONCE, AT_ONCE, BITS, BF16, True, 1, BLOCKS, N).to(tl.float32)
                - 2048.0
            )
    else:
        q = q * -16777216.0
    return ((q.reshape(16 * AT_ONCE * BLOCKS, N) - z[None, :]) * s[None, :]).to(dtype)


@triton.jit(do_not_specialize=["tokens", "groups", "length"])
def _many(
    x, words, zeros, scales, order, y, tokens, inputs, outputs, blocks, groups, length,
    BITS: tl.constexpr, GROUP: tl.constexpr, ORDERED: tl.constexpr, EVEN: tl.constexpr, BF16: tl.constexpr,
    WIDEN: tl.constexpr, AT_ONCE: tl.constexpr, BLOCKS: tl.constexpr, TOKENS: tl.constexpr, TILES: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    PAIRS: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    N: tl.constexpr = 32 * TILES
    K: tl.constexpr = 16 * AT_ONCE * BLOCKS
    piece = tl.program_id(1)
    m = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    tile = _tile(outputs, TILES)
    n = tl.program_id(0) * N + tl.arange(0, N)
    sums = tl.zeros((TOKENS, N), dtype=tl.float32)
    for first in tl.range(piece * BLOCKS, blocks, BLOCKS * SPLIT, num_stages=STAGES):
        for part in tl.static_range(PAIRS // AT_ONCE):
            weights = _weights(words, zeros, scales, tile, n, first, outputs, blocks, groups, part,
                               x.dtype.element_ty, BITS, GROUP, EVEN, BF16, AT_ONCE, BLOCKS, TILES)  # fmt: skip
            position = first * (16 * PAIRS) + part * (16 * AT_ONCE) + tl.arange(0, K)
            a = _x(
                x, order, m[:, None].to(tl.int64), position[None, :], tokens, inputs, length, ORDERED, EVEN
            )
            if WIDEN:
                a, weights = a.to(tl.float32), weights.to(tl.float32)
            sums = tl.dot(a, weights, sums, input_precision="ieee")
    at = y + (piece.to(tl.int64) * tokens + m[:, None]) * outputs + n[None, :]
    tl.store(at, sums.to(y.dtype.element_ty), mask=(m[:, None] < tokens) & (n[None, :] < outputs))


@triton.jit(do_not_specialize=["groups", "rows"])
def _unpack(
    words, zeros, scales, y, outputs, blocks, groups, rows,
    BITS: tl.constexpr, GROUP: tl.constexpr, BF16: tl.constexpr, AT_ONCE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    PAIRS: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    tile = _tile(outputs, TILES)
    n = tl.program_id(0) * 32 * TILES + tl.arange(0, 32 * TILES)
    block = tl.program_id(1)
    for part in tl.static_range(PAIRS // AT_ONCE):
        weights = _weights(words, zeros, scales, tile, n, block, outputs, blocks, groups, part, y.dtype.element_ty,
                           BITS, GROUP, True, BF16, AT_ONCE, 1, TILES)  # fmt: skip
        k = block * (16 * PAIRS) + part * (16 * AT_ONCE) + tl.arange(0, 16 * AT_ONCE)
        at = y + k[:, None].to(tl.int64) * outputs + n[None, :]
        tl.store(at, weights, mask=(k[:, None] < rows) & (n[None, :] < outputs))


@triton.jit(do_not_specialize=["count"])
def _add(pieces, y, count, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for piece in tl.static_range(SPLIT):
        total += tl.load(pieces + piece * count + at, mask=at < count, other=0.0)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=at < count)


@dataclass(frozen=True)
class Tiles:
    """How a product is cut up. Results depend on it only in the order in which float32 numbers are added.

    Attributes:
        path: "few", "many" (the kernels above) or "dense" (`_unpack`, then torch's product).
        tokens, tiles: tokens and 32s of outputs of a program.
        depth: inputs that a warp ("few") or a program ("many") takes at once, where groups allow it.
        warps: of a program; in "few" each has inputs of its own.
        split: programs that share the inputs of the same outputs.
        stages: loads under way, counted in steps.
    """

    path: str
    tokens: int = 16
    tiles: int = 1
    depth: int = 128
    warps: int = 4
    split: int = 1
    stages: int = 3


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make the tensors' device the current one, on which Triton launches."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    return torch.xpu.device(device) if device.type == "xpu" else contextlib.nullcontext()


def multiply(x: Tensor, weight: Fragments, scales: Tensor, bits: int, cut: Tiles) -> Tensor:
    """``x @ weightᵀ`` for x (tokens, in), contiguous, at least one token; scales (groups, out).

    Pieces of a sum are added in a fixed order: the same cut gives the same bytes.
    """
    tokens, inputs = x.shape
    groups, outputs = scales.shape
    if cut.path == "dense":
        rows = weight.order.numel() or inputs
        return ordered(x, weight.order) @ unpack(weight, scales, bits, rows, x.dtype)
    tiles, blocks = weight.words.shape[:2]
    at_once, together = _depth(bits, weight.group, cut.depth)
    step = together * (cut.warps if cut.path == "few" else 1)
    split = min(cut.split, triton.cdiv(blocks, step))
    even = blocks % step == 0 and inputs == 16 * pairs_in_unit(bits) * blocks
    alone = split == 1
    y = torch.empty((split, tokens, outputs), dtype=x.dtype if alone else torch.float32, device=x.device)
    grid = (triton.cdiv(tiles, cut.tiles), split, triton.cdiv(tokens, cut.tokens))
    kernel, slices = (_few, {"SLICES": cut.warps}) if cut.path == "few" else (_many, {})
    kernel[grid](
        x, weight.words, weight.zeros, scales, weight.order, y,
        tokens, inputs, outputs, blocks, groups, weight.order.numel(),
        BITS=bits, GROUP=weight.group, ORDERED=weight.order.numel() > 0, EVEN=even, BF16=x.dtype == torch.bfloat16,
        WIDEN=_widen(x.dtype), AT_ONCE=at_once, BLOCKS=together, TOKENS=cut.tokens, TILES=cut.tiles, SPLIT=split,
        STAGES=cut.stages, num_warps=cut.warps, **slices,
    )  # fmt: skip
    if alone:
        return y[0]
    result = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    count = result.numel()
    _add[(triton.cdiv(count, 1024),)](y, result, count, SPLIT=split, BLOCK=1024)
    return result


def unpack(weight: Fragments, scales: Tensor, bits: int, rows: int, dtype: torch.dtype) -> Tensor:
    """The weight by positions: (rows, out) in `dtype`, computed in float32 and rounded once."""
    groups, outputs = scales.shape
    tiles, blocks = weight.words.shape[:2]
    at_once, _ = _depth(bits, weight.group, 16 * pairs_in_unit(bits))
    y = torch.empty((rows, outputs), dtype=dtype, device=scales.device)
    _unpack[(triton.cdiv(tiles, 4), blocks)](
        weight.words, weight.zeros, scales, y, outputs, blocks, groups, rows,
        BITS=bits, GROUP=weight.group, BF16=dtype == torch.bfloat16, AT_ONCE=at_once, TILES=4,
    )  # fmt: skip
    return y


def ordered(x: Tensor, order: Tensor) -> Tensor:
    """x (tokens, in) by positions, 0 at padding."""
    if not order.numel():
        return x
    return torch.nn.functional.pad(x, (0, 1)).index_select(1, order)


def _depth(bits: int, group: int, depth: int) -> tuple[int, int]:
    """Pairs and blocks that are multiplied at once: of one group, and not more than `depth` inputs."""
    pairs = pairs_in_unit(bits)
    at_once = min(pairs, max(1, depth // 16))
    while group and group // 16 % at_once:
        at_once //= 2
    together = 1
    while at_once == pairs and 32 * pairs * together <= depth and not group % (32 * pairs * together):
        together *= 2
    return at_once, together


def _widen(dtype: torch.dtype) -> bool:
    """Whether the product is one of float32 numbers. Triton's interpreter multiplies the bits of bfloat16 numbers."""
    return dtype == torch.float32 or bool(triton.knobs.runtime.interpret and dtype == torch.bfloat16)
