"""The Triton kernels behind `fewbit.kernels.triton.kernel`. Importing this module needs the package triton.

All kernels read the words of `fragments` once, coalesced and 16 bytes per load, and never move codes between threads: a
shift and a mask turn a word into the registers of matrix instructions.

- `gemv_kernel`, for few tokens, is bound by memory. Weights enter the product as integer codes; scale and zero point
  are applied to the sums of each group, which costs a few operations per group instead of two per weight. Outputs are
  the rows of the product and tokens its columns, because a matrix instruction takes at least eight columns. Each warp
  has its own inputs (a batched product, summed over the batch at the end), so that one program can process all inputs
  of 32 outputs with many loads in flight.
- `gemm_kernel`, for more tokens, dequantizes weights to the activations' dtype before the product, rounding once.
- `dequantize_kernel` writes the same weights to memory. For many tokens a dense product on them is cheaper than
  unpacking once per tile.

A code q becomes a 16-bit float without a conversion. In float16, q in the lowest bits is the subnormal 2⁻²⁴·q (the sign
bit is set so that the compiler keeps both halves together). In bfloat16, q under the exponent of 128 is 128 + q. With
r = a·q + b obtained this way, and g the group of input k:

    y[m, n] = Σ_g s[g, n] · ( (Σ_k x[m, k]·r[k, n]) / a  −  (z[g, n] + b / a) · Σ_k x[m, k] )

Products are exact and sums are float32. The loss by cancellation is below 2⁻¹⁸ of the sum's magnitude (bfloat16).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fragments import Fragments, pairs_in_unit
from .tile_config import ProblemKey, TileConfig, candidates, problem_key


@triton.jit
def tile_indices(outputs, TILES: tl.constexpr):
    """The program's tiles (TILES,); past the last tile, the last one is repeated."""
    return tl.minimum(tl.program_id(0) * TILES + tl.arange(0, TILES), (outputs - 1) // 32)


@triton.jit
def load_words(words, tile, block, plane: tl.constexpr, PLANES: tl.constexpr, blocks, EVEN: tl.constexpr,
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
def load_unit(words, tile, block, BITS: tl.constexpr, blocks, EVEN: tl.constexpr,
              S: tl.constexpr, B: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """The words of each unit: one, which is returned three times, or three at 3 bits."""
    if BITS == 3:
        w0 = load_words(words, tile, block, 0, 3, blocks, EVEN, S, B, T)
        w1 = load_words(words, tile, block, 1, 3, blocks, EVEN, S, B, T)
        w2 = load_words(words, tile, block, 2, 3, blocks, EVEN, S, B, T)
    else:
        w0 = load_words(words, tile, block, 0, 1, blocks, EVEN, S, B, T)
        w1, w2 = w0, w0
    return w0, w1, w2


@triton.jit
def unpack_pair(w0, w1, w2, PAIR: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr, HIGH: tl.constexpr):
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
def unpack_pairs(w0, w1, w2, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr,
           BITS: tl.constexpr, BF16: tl.constexpr, HIGH: tl.constexpr):  # fmt: skip
    """Pairs FIRST, FIRST + STEP, … of a unit: (…, 2, 2, …) with log2(COUNT) axes of 2 at the end, in order."""
    if COUNT == 1:
        return unpack_pair(w0, w1, w2, FIRST, BITS, BF16, HIGH)
    else:
        even = unpack_pairs(w0, w1, w2, FIRST, 2 * STEP, COUNT // 2, BITS, BF16, HIGH)
        odd = unpack_pairs(w0, w1, w2, FIRST + STEP, 2 * STEP, COUNT // 2, BITS, BF16, HIGH)
        return tl.join(even, odd)


@triton.jit
def unpack_codes(w0, w1, w2, FIRST: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr,
           HIGH: tl.constexpr, S: tl.constexpr, B: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """Pairs FIRST … FIRST + COUNT of B blocks, positions in order: (S, 16·COUNT·B, N), as numbers a·q + b."""
    c = unpack_pairs(w0, w1, w2, FIRST, 1, COUNT, BITS, BF16, HIGH).reshape(S, B, 8, N, 2, COUNT)
    return c.permute(0, 1, 5, 2, 4, 3).reshape(S, 16 * COUNT * B, N)


@triton.jit
def load_activations(
    x, order, m, position, tokens, inputs, length, ORDERED: tl.constexpr, EVEN: tl.constexpr
):
    """x at (…, tokens, positions), 0 where there is none. m (…, tokens, 1) int64, position (…, 1, positions)."""
    if ORDERED:
        position = tl.load(order + position, mask=position < length, other=inputs)
    elif EVEN:
        return tl.load(x + m * inputs + position, mask=(m < tokens) & (position >= 0), other=0.0)
    return tl.load(x + m * inputs + position, mask=(m < tokens) & (position < inputs), other=0.0)


# Arguments that change from call to call must not trigger a new compilation.
@triton.jit(do_not_specialize=["tokens", "groups", "length"])
def gemv_kernel(
    x, words, zeros, scales, order, y, tokens, inputs, outputs, blocks, groups, length,
    BITS: tl.constexpr, GROUP: tl.constexpr, ORDERED: tl.constexpr, EVEN: tl.constexpr, BF16: tl.constexpr,
    WIDEN: tl.constexpr, AT_ONCE: tl.constexpr, BLOCKS: tl.constexpr, TOKENS: tl.constexpr, TILES: tl.constexpr,
    SLICES: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    PAIRS: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    N: tl.constexpr = 32 * TILES
    K: tl.constexpr = 16 * AT_ONCE * BLOCKS
    TWO: tl.constexpr = BITS == 8 and BF16
    # b / a and 1 / a of the formula above.
    OFFSET: tl.constexpr = (2176 if TWO else 128) if BF16 else 0
    FACTOR: tl.constexpr = 1.0 if BF16 else -16777216.0
    piece = tl.program_id(1)
    m = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    tile = tile_indices(outputs, TILES)
    n = tl.program_id(0) * N + tl.arange(0, N)
    slice_block = tl.arange(0, SLICES) * BLOCKS
    STEP: tl.constexpr = SLICES * BLOCKS
    ones = tl.full((SLICES, 16, K), 1.0, x.dtype.element_ty)
    if WIDEN:
        ones = ones.to(tl.float32)
    sums = tl.zeros((SLICES, N, TOKENS), dtype=tl.float32)
    for first in tl.range(piece * STEP, blocks, STEP * SPLIT, num_stages=STAGES):
        block = first + slice_block[:, None] + tl.arange(0, BLOCKS)[None, :]
        w0, w1, w2 = load_unit(words, tile, block, BITS, blocks, EVEN, SLICES, BLOCKS, TILES)
        for part in tl.static_range(PAIRS // AT_ONCE):
            start = (first + slice_block) * (16 * PAIRS) + part * (16 * AT_ONCE)
            group = start // GROUP if GROUP else start * 0
            known = (group[:, None] < groups) & (n[None, :] < outputs)
            at = group[:, None] * outputs + n[None, :]
            s = tl.load(scales + at, mask=known, other=0.0).to(tl.float32)
            z = tl.load(zeros + at, mask=known, other=0).to(tl.float32) + OFFSET
            position = (start[:, None] + tl.arange(0, K)[None, :])[:, None, :]
            a = load_activations(x, order, m[None, :, None].to(tl.int64), position,
                                 tokens, inputs, length, ORDERED, EVEN).permute(0, 2, 1)  # fmt: skip
            q = unpack_codes(w0, w1, w2, part * AT_ONCE, AT_ONCE, BITS, BF16, False, SLICES, BLOCKS, N)
            q = q.permute(0, 2, 1)
            if WIDEN:
                a, q = a.to(tl.float32), q.to(tl.float32)
            found = tl.dot(q, a, input_precision="ieee")
            if TWO:
                q = unpack_codes(w0, w1, w2, part * AT_ONCE, AT_ONCE, BITS, BF16, True, SLICES, BLOCKS, N)
                q = q.permute(0, 2, 1)
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
def dequantize_tile(
    words, zeros, scales, tile, n, first, outputs, blocks, groups, part: tl.constexpr, dtype: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, BF16: tl.constexpr, AT_ONCE: tl.constexpr,
    BLOCKS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """ŵ = s · (q − z) of AT_ONCE pairs of BLOCKS blocks from `first`: (K, N), rounded once to `dtype`."""
    PAIRS: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    N: tl.constexpr = 32 * TILES
    block = first + tl.arange(0, BLOCKS)[None, :]
    w0, w1, w2 = load_unit(words, tile, block, BITS, blocks, EVEN, 1, BLOCKS, TILES)
    start = first * (16 * PAIRS) + part * (16 * AT_ONCE)
    group = n * 0 + start // GROUP if GROUP else n * 0
    known = (group < groups) & (n < outputs)
    s = tl.load(scales + group * outputs + n, mask=known, other=0.0).to(tl.float32)
    z = tl.load(zeros + group * outputs + n, mask=known, other=0).to(tl.float32)
    q = unpack_codes(w0, w1, w2, part * AT_ONCE, AT_ONCE, BITS, BF16, False, 1, BLOCKS, N).to(tl.float32)
    if BF16:
        q = q - 128.0
        if BITS == 8:
            high = unpack_codes(w0, w1, w2, part * AT_ONCE, AT_ONCE, BITS, BF16, True, 1, BLOCKS, N)
            q += high.to(tl.float32) - 2048.0
    else:
        q = q * -16777216.0
    return ((q.reshape(16 * AT_ONCE * BLOCKS, N) - z[None, :]) * s[None, :]).to(dtype)


@triton.jit(do_not_specialize=["tokens", "groups", "length"])
def gemm_kernel(
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
    tile = tile_indices(outputs, TILES)
    n = tl.program_id(0) * N + tl.arange(0, N)
    sums = tl.zeros((TOKENS, N), dtype=tl.float32)
    for first in tl.range(piece * BLOCKS, blocks, BLOCKS * SPLIT, num_stages=STAGES):
        for part in tl.static_range(PAIRS // AT_ONCE):
            weights = dequantize_tile(words, zeros, scales, tile, n, first, outputs, blocks, groups, part,
                                      x.dtype.element_ty, BITS, GROUP, EVEN, BF16, AT_ONCE, BLOCKS, TILES)  # fmt: skip
            position = first * (16 * PAIRS) + part * (16 * AT_ONCE) + tl.arange(0, K)
            a = load_activations(
                x, order, m[:, None].to(tl.int64), position[None, :], tokens, inputs, length, ORDERED, EVEN
            )
            if WIDEN:
                a, weights = a.to(tl.float32), weights.to(tl.float32)
            sums = tl.dot(a, weights, sums, input_precision="ieee")
    at = y + (piece.to(tl.int64) * tokens + m[:, None]) * outputs + n[None, :]
    tl.store(at, sums.to(y.dtype.element_ty), mask=(m[:, None] < tokens) & (n[None, :] < outputs))


@triton.jit(do_not_specialize=["groups", "rows"])
def dequantize_kernel(
    words, zeros, scales, y, outputs, blocks, groups, rows,
    BITS: tl.constexpr, GROUP: tl.constexpr, BF16: tl.constexpr, AT_ONCE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    PAIRS: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    tile = tile_indices(outputs, TILES)
    n = tl.program_id(0) * 32 * TILES + tl.arange(0, 32 * TILES)
    block = tl.program_id(1)
    for part in tl.static_range(PAIRS // AT_ONCE):
        weights = dequantize_tile(words, zeros, scales, tile, n, block, outputs, blocks, groups, part,
                                  y.dtype.element_ty, BITS, GROUP, True, BF16, AT_ONCE, 1, TILES)  # fmt: skip
        k = block * (16 * PAIRS) + part * (16 * AT_ONCE) + tl.arange(0, 16 * AT_ONCE)
        at = y + k[:, None].to(tl.int64) * outputs + n[None, :]
        tl.store(at, weights, mask=(k[:, None] < rows) & (n[None, :] < outputs))


@triton.jit(do_not_specialize=["count"])
def sum_splits_kernel(pieces, y, count, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for piece in tl.static_range(SPLIT):
        total += tl.load(pieces + piece * count + at, mask=at < count, other=0.0)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=at < count)


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make the tensors' device the current one, because Triton launches on that."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    return torch.xpu.device(device) if device.type == "xpu" else contextlib.nullcontext()


def multiply(
    x: Tensor, weight: Fragments, scales: Tensor, bits: int, config: TileConfig | None = None
) -> Tensor:
    """``x @ weightᵀ`` for x (tokens, in), contiguous, at least one token; scales (groups, out).

    Args:
        config: the tiles; None takes the fastest of `candidates`, timed at first use where that is possible. The same
            config gives the same bytes, because partial sums are added in a fixed order.
    """
    tokens, inputs = x.shape
    groups, outputs = scales.shape
    key = problem_key(tokens, outputs, inputs, bits, weight.group, x.dtype)
    configs = candidates(key) if config is None else (config,)
    if configs[0].path == "dense":
        rows = weight.order.numel() or inputs
        return gather_columns(x, weight.order) @ dequantize(weight, scales, bits, rows, x.dtype)
    tiles, blocks = weight.words.shape[:2]
    metas = [_meta(each, key, blocks) for each in configs]
    # All candidates share this split, and so the shape of y.
    split = min(configs[0].split, triton.cdiv(blocks, metas[0]["BLOCKS"] * metas[0].get("SLICES", 1)))
    y = torch.empty((split, tokens, outputs), dtype=x.dtype if split == 1 else torch.float32, device=x.device)

    def grid(meta: dict[str, Any]) -> tuple[int, int, int]:
        return triton.cdiv(tiles, meta["TILES"]), split, triton.cdiv(tokens, meta["TOKENS"])

    kernel: Any = gemv_kernel if configs[0].path == "gemv" else gemm_kernel
    tunable = config is None and not torch.are_deterministic_algorithms_enabled()
    tuner = _tuner(key, blocks) if tunable else None
    chosen = {**metas[0], "num_warps": configs[0].warps}
    if tuner is not None and (tuner.cache or _can_tune()):
        kernel, chosen = tuner, {}
    kernel[grid](
        x, weight.words, weight.zeros, scales, weight.order, y,
        tokens, inputs, outputs, blocks, groups, weight.order.numel(),
        BITS=bits, GROUP=weight.group, ORDERED=weight.order.numel() > 0, BF16=x.dtype == torch.bfloat16,
        WIDEN=_widen(x.dtype), SPLIT=split, **chosen,
    )  # fmt: skip
    if split == 1:
        return y[0]
    result = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    count = result.numel()
    sum_splits_kernel[(triton.cdiv(count, 1024),)](y, result, count, SPLIT=split, BLOCK=1024)
    return result


def dequantize(weight: Fragments, scales: Tensor, bits: int, rows: int, dtype: torch.dtype) -> Tensor:
    """The weight by positions: (rows, out) in `dtype`, computed in float32 and rounded once."""
    groups, outputs = scales.shape
    tiles, blocks = weight.words.shape[:2]
    at_once, _ = _depth(bits, weight.group, 16 * pairs_in_unit(bits))
    y = torch.empty((rows, outputs), dtype=dtype, device=scales.device)
    dequantize_kernel[(triton.cdiv(tiles, 4), blocks)](
        weight.words, weight.zeros, scales, y, outputs, blocks, groups, rows,
        BITS=bits, GROUP=weight.group, BF16=dtype == torch.bfloat16, AT_ONCE=at_once, TILES=4,
    )  # fmt: skip
    return y


def gather_columns(x: Tensor, order: Tensor) -> Tensor:
    """x (tokens, in) by positions, 0 at padding."""
    if not order.numel():
        return x
    return torch.nn.functional.pad(x, (0, 1)).index_select(1, order)


def _meta(config: TileConfig, key: ProblemKey, blocks: int) -> dict[str, Any]:
    """The kernel's constants that depend on the config."""
    at_once, per_step = _depth(key.bits, key.group, config.depth)
    slices = {"SLICES": config.warps} if config.path == "gemv" else {}
    step = per_step * slices.get("SLICES", 1)
    return {
        "AT_ONCE": at_once,
        "BLOCKS": per_step,
        "TOKENS": config.tokens,
        "TILES": config.tiles,
        "STAGES": config.stages,
        "EVEN": blocks % step == 0 and key.inputs == 16 * pairs_in_unit(key.bits) * blocks,
        **slices,
    }


@functools.cache
def _tuner(key: ProblemKey, blocks: int) -> Any:
    """Triton's autotuner over the candidates of one problem; None where there is nothing to choose."""
    configs = candidates(key)
    if len(configs) == 1:
        return None
    # Triton keeps the choice on disk, beside the compiled kernels.
    on_disk = "cache_results" in inspect.signature(triton.autotune).parameters
    tune = triton.autotune(
        [triton.Config(_meta(config, key, blocks), num_warps=config.warps) for config in configs],
        key=["outputs", "inputs", "BITS", "GROUP", "SPLIT"],
        **({"cache_results": True} if on_disk else {}),
    )
    return tune(gemv_kernel if configs[0].path == "gemv" else gemm_kernel)


def _can_tune() -> bool:
    """Whether kernels can be timed now."""
    return torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing()


def _depth(bits: int, group: int, depth: int) -> tuple[int, int]:
    """Pairs and blocks multiplied at once: from one group, and at most `depth` inputs."""
    pairs = pairs_in_unit(bits)
    at_once = min(pairs, max(1, depth // 16))
    while group and group // 16 % at_once:
        at_once //= 2
    blocks = 1
    while at_once == pairs and 32 * pairs * blocks <= depth and not group % (32 * pairs * blocks):
        blocks *= 2
    return at_once, blocks


def _widen(dtype: torch.dtype) -> bool:
    """Whether to multiply in float32. Triton's interpreter multiplies the bit patterns of bfloat16 numbers."""
    return dtype == torch.float32 or bool(triton.knobs.runtime.interpret and dtype == torch.bfloat16)
