"""The Triton kernel behind `fewbit.runtime.triton`. Importing this needs the package triton.

Words are read once and stay as they are in the checkpoint. With c codes in a word (3 bits: 32 in three words), a block
of U words holds the inputs u·c + j: for each j, the codes at that place of every word form a matrix (U, outputs), which
a dot product takes with every c-th column of x. So codes never change places, on the chip or off it:

    y[m, n] = Σ_j Σ_u x[m, u·c + j] · s[g, n] · (q_j[u, n] − z[g, n]),  g the group of input u·c + j
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Format "gptq" stores zero − 1. Added to whole words, which undoes borrowing between fields too (layout.unpack_zeros).
_ONE_IN_EACH_FIELD = {2: 0x55555555, 3: 0, 4: 0x11111111, 8: 0x01010101}


@triton.jit
def _zeros(qzeros, n, group, stride, mask, BITS: tl.constexpr, V1: tl.constexpr, ADDED: tl.constexpr):
    """Zero points of outputs n in rows `group`, as numbers; 3-bit ones may lie in two words."""
    bit = n * BITS
    at = qzeros + group * stride + bit // 32
    low = tl.load(at, mask=mask, other=0).to(tl.uint32, bitcast=True)
    value = (low + ADDED) >> (bit % 32).to(tl.uint32)
    if BITS == 3:
        over = mask & (bit % 32 > 29)
        high = tl.load(at + 1, mask=over, other=0).to(tl.uint32, bitcast=True)
        value = tl.where(over, value | (high << ((32 - bit % 32) & 31).to(tl.uint32)), value) + V1
    return (value & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def _code(w0, w1, w2, PLACE: tl.constexpr, BITS: tl.constexpr):
    """Code number PLACE of a unit; at 3 bits numbers 10 and 21 lie in two words."""
    if PLACE * BITS < 32:
        code = w0 >> (PLACE * BITS)
    elif PLACE * BITS < 64:
        code = w1 >> (PLACE * BITS - 32)
    else:
        code = w2 >> (PLACE * BITS - 64)
    if PLACE * BITS == 30 and BITS == 3:
        code = code | (w1 << 2)
    if PLACE * BITS == 63:
        code = code | (w2 << 1)
    return code & ((1 << BITS) - 1)


@triton.jit
def _product(
    x, qweight, qzeros, scales, g_idx, y, tokens, inputs, outputs, words, zero_words,
    BITS: tl.constexpr, V1: tl.constexpr, ADDED: tl.constexpr, GROUP: tl.constexpr, WIDEN: tl.constexpr,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, UNITS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    # A unit is what repeats along the inputs: one word, or three at 3 bits.
    CODES: tl.constexpr = 32 if BITS == 3 else 32 // BITS
    WORDS: tl.constexpr = 3 if BITS == 3 else 1
    m = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    piece = tl.program_id(2)
    units = (words + WORDS - 1) // WORDS
    sums = tl.zeros((TOKENS, OUTPUTS), dtype=tl.float32)
    for first in range(piece * UNITS, units, UNITS * SPLIT):
        u = first + tl.arange(0, UNITS)
        there = (u[:, None] < units) & (n[None, :] < outputs)
        at = qweight + (u * WORDS)[:, None].to(tl.int64) * outputs + n[None, :]
        w0 = tl.load(at, mask=there & ((u * WORDS)[:, None] < words), other=0).to(tl.uint32, bitcast=True)
        w1, w2 = w0, w0
        if BITS == 3:
            w1 = tl.load(at + outputs, mask=there & ((u * 3 + 1)[:, None] < words), other=0).to(
                tl.uint32, bitcast=True
            )
            w2 = tl.load(at + 2 * outputs, mask=there & ((u * 3 + 2)[:, None] < words), other=0).to(
                tl.uint32, bitcast=True
            )
        scale, zero = 0.0, 0.0
        if GROUP > 0:
            # All codes of a unit are in one group.
            group = (u * CODES // GROUP)[:, None]
            scale = tl.load(scales + group * outputs + n[None, :], mask=there, other=0.0).to(tl.float32)
            zero = _zeros(qzeros, n[None, :], group, zero_words, there, BITS, V1, ADDED)
        for j in tl.static_range(CODES):
            code = _code(w0, w1, w2, j, BITS)
            k = u * CODES + j
            if GROUP == 0:
                group = tl.load(g_idx + k, mask=k < inputs, other=0)[:, None]
                scale = tl.load(scales + group * outputs + n[None, :], mask=there, other=0.0).to(tl.float32)
                zero = _zeros(qzeros, n[None, :], group, zero_words, there, BITS, V1, ADDED)
            weight = (code.to(tl.float32) - zero) * scale
            taken = tl.load(
                x + m[:, None].to(tl.int64) * inputs + k[None, :],
                mask=(m[:, None] < tokens) & (k[None, :] < inputs), other=0.0,
            )  # fmt: skip
            weight = weight.to(taken.dtype)
            if WIDEN:
                taken, weight = taken.to(tl.float32), weight.to(tl.float32)
            sums = tl.dot(taken, weight, sums, input_precision="ieee")
    at = y + (piece.to(tl.int64) * tokens + m[:, None]) * outputs + n[None, :]
    tl.store(at, sums.to(y.dtype.element_ty), mask=(m[:, None] < tokens) & (n[None, :] < outputs))


def product(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    bits: int,
    v1: bool,
    group_size: int,
) -> Tensor:
    """``x @ weightᵀ`` for x (tokens, in), contiguous; tensors as in the checkpoint.

    Args:
        group_size: inputs of every group where they are consecutive; 0: look into g_idx.
    """
    tokens, inputs = x.shape
    outputs = scales.shape[1]
    codes = 32 if bits == 3 else 32 // bits
    group = group_size if group_size and group_size % codes == 0 else 0
    shape = _launch(tokens, outputs, inputs, codes)
    y = torch.empty(
        (shape["SPLIT"], tokens, outputs),
        dtype=torch.float32 if shape["SPLIT"] > 1 else x.dtype,
        device=x.device,
    )
    grid = (triton.cdiv(tokens, shape["TOKENS"]), triton.cdiv(outputs, shape["OUTPUTS"]), shape["SPLIT"])
    _product[grid](
        x, qweight, qzeros, scales, g_idx, y, tokens, inputs, outputs, qweight.shape[0], qzeros.shape[1],
        BITS=bits, V1=int(v1), ADDED=_ONE_IN_EACH_FIELD[bits] if v1 else 0, GROUP=group,
        # Triton's interpreter multiplies the bits of bfloat16 numbers.
        WIDEN=triton.knobs.runtime.interpret and x.dtype == torch.bfloat16, **shape,
    )  # fmt: skip
    return y[0] if shape["SPLIT"] == 1 else y.sum(0).to(x.dtype)


def _launch(tokens: int, outputs: int, inputs: int, codes: int) -> dict[str, int]:
    """Tile sizes. The sums of pieces of the inputs are added in a fixed order, so results do not vary."""
    units = -(-inputs // codes)
    per_tile = 16 if codes >= 16 else 32
    tile_tokens = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    tile_outputs = 64 if tokens <= 16 else 128
    tiles = -(-tokens // tile_tokens) * -(-outputs // tile_outputs)
    split = 1
    while tiles * split < 256 and split * per_tile * 4 < units and split < 16:
        split *= 2
    return {"TOKENS": tile_tokens, "OUTPUTS": tile_outputs, "UNITS": per_tile, "SPLIT": split}
