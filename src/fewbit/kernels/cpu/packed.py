"""Weights in tiles, and products with them (csrc/matmul.h describes the layout).

A packed weight is five tensors and three numbers (`PackedWeight`). Codes lie in tiles, block by block of 16 outputs;
scales and zero points lie in the same order, so that a product reads both sequentially. Activations may be float32,
float16 or bfloat16. bfloat16 numbers are multiplied with integer codes and summed in float32; float32 and float16
activations enter as the sum of two bfloat16 numbers, so that they keep 16 bits. Or activations are rounded to 8 bits
(`Rounding`). Results depend on the number of tokens, which decides how they are computed, but not on the values of
other tokens, nor on the number of threads.
"""

from __future__ import annotations

import functools
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ... import native
from ...errors import KernelError

_BLOCK = 16

# Without instructions for these products, a dense product on the dequantized weight is faster from this many tokens on.
_DENSE_FROM = 24


class Rounding(IntEnum):
    """How activations are rounded; the numbers of csrc/matmul.h.

    Attributes:
        NONE: activations keep 16 bits.
        FAST_PREFILL: bfloat16 and float16 activations of many tokens (a prompt; the compiled module has the threshold)
            are rounded to what is fastest: with AMX to bfloat16, with AVX-512, VNNI and BF16 to 8 bits with a scale per
            token and 16 inputs. Otherwise as `NONE`.
        INT8: activations are rounded to 8 bits with a scale per token and group.
    """

    NONE = 0
    FAST_PREFILL = 1
    INT8 = 2


class PackedWeight(NamedTuple):
    """The arguments of the operators, in their order.

    Attributes:
        tiles: uint8 (blocks, tiles per block, bytes); a block is 16 outputs.
        scales: (blocks, groups, 16), float16, bfloat16 or float32; 0 for outputs that do not exist.
        zeros: uint8 (blocks, groups, 16), or (1, 1, 1) where all zero points are the same.
        order: int32 (positions), the input at each position, `in_features` for padding; empty where input i is at
            position i.
        starts: int32 (groups + 1), group g is tiles ``starts[g] … starts[g + 1]``.
        bits: bits per code: 2, 3, 4 or 8.
        in_features: number of inputs.
        out_features: number of outputs.
    """

    tiles: Tensor
    scales: Tensor
    zeros: Tensor
    order: Tensor
    starts: Tensor
    bits: int
    in_features: int
    out_features: int


def tile_inputs(bits: int) -> int:
    """Inputs of a tile: as many as fill whole words."""
    return 32 if bits == 3 else 32 // bits


def tile_bytes(bits: int) -> int:
    """Bytes of a tile of 16 outputs."""
    return 192 if bits == 3 else 64


def positions(g_idx: Tensor, groups: int, bits: int) -> tuple[Tensor, Tensor]:
    """Positions of the inputs: group by group, each group padded to whole tiles.

    Args:
        g_idx: (in,), the group of each input, below `groups`.
        groups: number of groups.
        bits: bits per code.

    Returns:
        `order` and `starts` of `PackedWeight`.
    """
    in_features, width = g_idx.numel(), tile_inputs(bits)
    g_idx = g_idx.long().cpu()
    counts = torch.bincount(g_idx, minlength=groups)
    starts = functional.pad(((counts + width - 1) // width).cumsum(0), (1, 0))
    inputs = torch.argsort(g_idx, stable=True)
    group = g_idx[inputs]
    rank = torch.arange(in_features) - (counts.cumsum(0) - counts)[group]  # of an input in its group
    position = starts[group] * width + rank
    if torch.equal(position, torch.arange(in_features)) and torch.equal(inputs, position):
        return torch.empty(0, dtype=torch.int32), starts.int()
    order = torch.full((int(starts[-1]) * width,), in_features, dtype=torch.int32)
    order[position] = inputs.int()
    return order, starts.int()


def to_blocks(values: Tensor) -> Tensor:
    """(groups, out) → (blocks, groups, 16), padded with 0."""
    groups, out_features = values.shape
    padded = functional.pad(values, (0, -out_features % _BLOCK))
    return padded.view(groups, -1, _BLOCK).transpose(0, 1).contiguous()


def from_blocks(values: Tensor, out_features: int) -> Tensor:
    """Inverse of `to_blocks`."""
    groups = values.shape[1]
    return values.transpose(0, 1).reshape(groups, -1)[:, :out_features].contiguous()


def pack(qweight: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor, bits: int) -> PackedWeight:
    """A packed weight from the tensors of a checkpoint.

    Args:
        qweight: int32 (words, out).
        scales: (groups, out).
        zeros: (groups, out), 0 … 2^bits − 1.
        g_idx: (in,), the group of each input.
        bits: bits per code.
    """
    groups, out_features = scales.shape
    order, starts = positions(g_idx, groups, bits)
    blocks, per_block = -(-out_features // _BLOCK), int(starts[-1])
    if bool((zeros == zeros[:1, :1]).all()):
        zeros = zeros[:1, :1]
    weight = PackedWeight(
        tiles=torch.empty((blocks, per_block, tile_bytes(bits)), dtype=torch.uint8),
        scales=to_blocks(scales),
        zeros=zeros.to(torch.uint8).view(1, 1, 1) if zeros.numel() == 1 else to_blocks(zeros.to(torch.uint8)),
        order=order,
        starts=starts,
        bits=bits,
        in_features=g_idx.numel(),
        out_features=out_features,
    )
    native.advise_huge_pages(weight.tiles)
    native.pack_tiles(native_view(weight), qweight.contiguous(), weight.tiles)
    return weight


def unpack(weight: PackedWeight, words: int) -> Tensor:
    """Inverse of `pack`: ``qweight`` int32 (words, out); bits that belong to no input are zero."""
    qweight = torch.zeros((words, weight.out_features), dtype=torch.int32, device=weight.tiles.device)
    if qweight.is_meta:
        return qweight
    native.unpack_tiles(native_view(weight), qweight)
    return qweight


def _check(weight: PackedWeight) -> PackedWeight:
    """The weight itself.

    Raises:
        KernelError: shapes or dtypes of its tensors do not fit each other, or they are not in CPU memory.
    """
    tiles, scales, zeros, order, starts, bits, _, out_features = weight
    blocks, per_block, width = tiles.shape
    sound = (
        (blocks, width) == (-(-out_features // _BLOCK), tile_bytes(bits))
        and scales.shape == (blocks, starts.numel() - 1, _BLOCK)
        and (not order.numel() or order.numel() == per_block * tile_inputs(bits))
        and (zeros.shape == scales.shape or zeros.numel() == 1)
        and tiles.dtype == zeros.dtype == torch.uint8
        and order.dtype == starts.dtype == torch.int32
        and all(tensor.is_cpu and tensor.is_contiguous() for tensor in weight[:5])
    )
    if sound:
        return weight
    raise KernelError(
        f"these tensors are not a packed weight: tiles {tuple(tiles.shape)}, scales {tuple(scales.shape)}, "
        f"zeros {tuple(zeros.shape)}, order {tuple(order.shape)}, starts {tuple(starts.shape)} on {tiles.device}; "
        "load it again"
    )


def native_view(weight: PackedWeight) -> Any:
    """The compiled module's view of a packed weight. The caller keeps the tensors alive.

    Raises:
        KernelError: `starts` does not fit the tiles.
    """
    try:
        return native.packed_view(*weight)
    except ValueError as error:
        raise KernelError(f"these tensors are not a packed weight: {error}; load it again") from error


def multiply(x: Tensor, weight: PackedWeight, bias: Tensor | None, rounding: int, view: Any = None) -> Tensor:
    """``x @ weightᵀ + bias``: (…, in) → (…, out) in x's dtype. No gradient; see `linear_packed`.

    Args:
        x: float32, float16 or bfloat16 activations (…, in).
        weight: from `pack`; its tensors are not checked again.
        bias: (out,), or None.
        rounding: a `Rounding`.
        view: `native_view` of the weight, if it exists already.

    Raises:
        KernelError: x has another number of inputs or another dtype, or bias does not fit.
    """
    tokens = _check_operands(x, weight, bias)
    if tokens >= _dense_from(rounding):
        return functional.linear(x, _dequantize(weight, x.dtype), None if bias is None else bias.to(x.dtype))
    return _multiply_tiles(x, tokens, weight, bias, rounding, view)


def multiply_tiles(x: Tensor, weight: PackedWeight, bias: Tensor | None, rounding: int) -> Tensor:
    """`multiply`, always on the packed tiles."""
    return _multiply_tiles(x, _check_operands(x, weight, bias), weight, bias, rounding, None)


# Called for every product of every token: attributes of tensors are read once, because reading one takes a share of a
# microsecond.
def _multiply_tiles(
    x: Tensor, tokens: int, weight: PackedWeight, bias: Tensor | None, rounding: int, view: Any
) -> Tensor:
    y = torch.empty((*x.shape[:-1], weight.out_features), dtype=x.dtype)
    if tokens:
        native.matmul(view or native_view(weight), x.contiguous(), y, tokens, bias, rounding)
    return y


def _check_operands(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> int:
    """The number of tokens in x.

    Raises:
        KernelError: x or bias does not fit the weight.
    """
    inputs = x.shape[-1]
    if inputs != weight.in_features or x.dtype not in native.DTYPES or not x.is_cpu:
        raise KernelError(
            f"x is {x.dtype} {tuple(x.shape)} on {x.device}; the layer takes float32, float16 or bfloat16 "
            f"(…, {weight.in_features}) on the CPU"
        )
    if bias is not None and (bias.shape != (weight.out_features,) or bias.dtype not in native.DTYPES):
        raise KernelError(
            f"bias is {bias.dtype} {tuple(bias.shape)}; the layer has {weight.out_features} outputs"
        )
    return x.numel() // inputs


@functools.cache
def _dense_from(rounding: int) -> float:
    """Number of tokens from which on a dense product is faster."""
    int8 = rounding == Rounding.INT8 and native.has_int8_products()
    return float("inf") if native.instruction_sets()[0] in ("amx", "avx512_vnni") or int8 else _DENSE_FROM


def _dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    out = torch.empty((weight.out_features, weight.in_features), dtype=dtype)
    native.dequantize_tiles(native_view(weight), out)
    return out


@torch.library.custom_op("fewbit::dequantize_packed", mutates_args=())
def dequantize_packed(
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor,
    order: Tensor,
    starts: Tensor,
    bits: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight (out, in), computed in float32 and rounded once to `dtype`."""
    weight = PackedWeight(tiles, scales, zeros, order, starts, bits, in_features, out_features)
    return _dequantize(_check(weight), dtype)


@dequantize_packed.register_fake
def _(*weight_and_dtype: Any) -> Tensor:
    *_, in_features, out_features, dtype = weight_and_dtype
    return torch.empty((out_features, in_features), dtype=dtype, device=weight_and_dtype[0].device)


@torch.library.custom_op("fewbit::linear_packed", mutates_args=())
def linear_packed(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor,
    order: Tensor,
    starts: Tensor,
    bits: int,
    in_features: int,
    out_features: int,
    bias: Tensor | None,
    rounding: int,
) -> Tensor:
    """``x @ weightᵀ + bias``: (…, in) → (…, out) in x's dtype."""
    weight = _check(PackedWeight(tiles, scales, zeros, order, starts, bits, in_features, out_features))
    return multiply(x, weight, bias, rounding)


@linear_packed.register_fake
def _(x: Tensor, *weight_bias_rounding: Any) -> Tensor:
    *_, out_features, _bias, _rounding = weight_bias_rounding
    return x.new_empty((*x.shape[:-1], out_features))


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors, ctx.bits, ctx.in_features, ctx.out_features, bias, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weight = torch.ops.fewbit.dequantize_packed(
        *ctx.saved_tensors, ctx.bits, ctx.in_features, ctx.out_features, grad.dtype
    )
    to_bias = None
    if ctx.bias_dtype is not None and ctx.needs_input_grad[9]:
        to_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    to_x = grad @ weight if ctx.needs_input_grad[0] else None
    return (to_x, *(None,) * 8, to_bias, None)


linear_packed.register_autograd(_gradients, setup_context=_save_weight)
