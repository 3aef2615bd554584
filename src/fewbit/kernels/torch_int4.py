"""torch's int4 operator for CPUs, made to fit every bit width, group size, zero point and column order.

``aten::_weight_int4pack_mm_for_cpu(x, w, g, sz)`` computes ``Σ x·(s·(q − 8) + z)`` for 4-bit codes q, with
one pair (s, z) for every g inputs and output. It has vector code for bfloat16 only (in float32 and float16
it is slower than a dense product), so that is what it is used for. What is not such a layer becomes one:

- 2- and 3-bit codes are widened to 4 bits; an 8-bit code is two 4-bit digits, so the layer becomes one with
  twice the inputs, seen twice: ``q = 16·high + low``;
- a group that the operator does not know (any multiple of 32, or the whole row) becomes several of 32 … 256
  with the same scale;
- with act-order, columns are stored group by group, and x is gathered in that order.

Precision. Scales are rounded to bfloat16, as a dense bfloat16 weight is. The zero term is ``s̄·(8 − zero)``
with the *rounded* scale s̄, which keeps ``q = zero`` at exactly zero; what bfloat16 cannot hold of it is
added as ``(group sums of x) · rest``. Without these two, asymmetric layers lose up to five times as much as
a dense bfloat16 product when x has a mean; with them the error stays within 1.6 times that of the dense one.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import layout
from ..errors import KernelError
from ..quantized_matrix import QuantizedMatrix
from .spec import Kernel, KernelSpec, QuantizedBuffers

_GROUPS = (256, 128, 64, 32)  # what the operator knows

# From here on, unpacking into bfloat16 and a dense product is faster (2048 x 2048, one AVX-512 thread: the
# operator takes 0.82 of that time at 64 tokens, 1.25 at 128, 1.9 at 512).
DENSE_FROM = 96


def _operator_group(group_size: int, in_features: int) -> int | None:
    """The largest group of the operator of which groups and rows are whole multiples."""
    common = in_features if group_size == -1 else math.gcd(group_size, in_features)
    return next((g for g in _GROUPS if common % g == 0), None)


def _digits(codes: Tensor, bits: int) -> Tensor:
    """Codes of any width as 4-bit digits: uint8 (out, in), or (out, 2·in) at 8 bits, high digits first."""
    return torch.cat([codes >> 4, codes & 15], dim=1) if bits == 8 else codes


def _undo_digits(digits: Tensor, bits: int) -> Tensor:
    if bits != 8:
        return digits
    high, low = digits.chunk(2, dim=1)
    return (high << 4) | low


def _scales_and_zeros(codes: QuantizedMatrix, groups: Tensor) -> tuple[Tensor, Tensor]:
    """(s̄, z) bfloat16 (groups, out, 2) and what z lost to rounding, float32 (groups, out).

    `groups` gives the stored group of each of the operator's groups.
    """
    scale = codes.scales.t()[groups].to(torch.bfloat16)
    exact = scale.to(torch.float32)
    zeros = codes.zeros.t()[groups].to(torch.float32)
    if codes.bits == 8:  # 16·s̄·(high − 8) + s̄·(low − 8) + s̄·(136 − zero)
        scale = torch.cat([16 * scale, scale])
        zero_term = torch.cat([torch.zeros_like(exact), exact * (136 - zeros)])
    else:
        zero_term = exact * (8 - zeros)
    rounded = zero_term.to(torch.bfloat16)
    return torch.stack([scale, rounded], dim=-1).contiguous(), zero_term - rounded.to(torch.float32)


# The operator's layout: for each block of outputs, the codes of input 0, then input 1, …; two to a byte.
# The block and the pairing depend on the instruction set that torch chose on this machine.
def _unpack(packed: Tensor, block: int, out_features: int, in_features: int) -> Tensor:
    """Codes uint8 (in, out) from the operator's bytes; `block` 0: neighbouring outputs share a byte."""
    whole = out_features // block * block if block else 0
    stream = packed.flatten()
    codes = packed.new_empty((in_features, out_features))
    if whole:
        blocks = stream[: whole * in_features // 2].view(-1, in_features, block // 2).transpose(0, 1)
        halves = codes[:, :whole].view(in_features, -1, 2, block // 2)
        torch.bitwise_and(blocks, 15, out=halves[:, :, 0])
        torch.bitwise_right_shift(blocks, 4, out=halves[:, :, 1])
    if whole < out_features:
        rows = stream[whole * in_features // 2 :].view(in_features, -1)
        pairs = codes[:, whole:].view(in_features, -1, 2)
        torch.bitwise_and(rows, 15, out=pairs[..., 0])
        torch.bitwise_right_shift(rows, 4, out=pairs[..., 1])
    return codes


@functools.cache
def _block() -> int | None:
    """The block of this machine's layout, found by trying; None if it is none that `_unpack` knows."""
    codes = torch.arange(112 * 32, dtype=torch.int32).mul_(7).remainder_(61).remainder_(16).view(112, 32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    wanted = codes.t().byte()
    return next((b for b in (64, 32, 16, 0) if torch.equal(_unpack(packed, b, 112, 32), wanted)), None)


def _known_block() -> int:
    block = _block()
    if block is None:
        raise KernelError(
            "torch packs int4 weights differently on this machine; load the checkpoint again here"
        )
    return block


@torch.library.custom_op("fewbit::dequantize_int4pack", mutates_args=())
def dequantize_int4pack(packed: Tensor, scales_and_zeros: Tensor, rest: Tensor, dtype: torch.dtype) -> Tensor:
    """The transposed weight (in′, out) that the operator multiplies with, in its own order of inputs.

    ``s̄·(q − zero)``: the difference is a small integer, exact in bfloat16, so there is one rounding.
    """
    groups, out_features, _ = scales_and_zeros.shape
    in_features = packed.numel() * 2 // out_features
    scale, zero_term = scales_and_zeros.to(torch.float32).unbind(-1)
    shift = torch.round((zero_term + rest if rest.numel() else zero_term) / scale).nan_to_num(0.0)
    codes = _unpack(packed, _known_block(), out_features, in_features).view(groups, -1, out_features)
    weight = codes.to(dtype)
    weight += (shift - 8).to(dtype).unsqueeze(1)
    weight *= scale.to(dtype).unsqueeze(1)
    return weight.view(in_features, out_features)


@dequantize_int4pack.register_fake
def _(packed: Tensor, scales_and_zeros: Tensor, rest: Tensor, dtype: torch.dtype) -> Tensor:
    out_features = scales_and_zeros.shape[1]
    return packed.new_empty((packed.numel() * 2 // out_features, out_features), dtype=dtype)


@torch.library.custom_op("fewbit::linear_int4pack", mutates_args=())
def linear_int4pack(
    x: Tensor, packed: Tensor, scales_and_zeros: Tensor, rest: Tensor, order: Tensor, bits: int
) -> Tensor:
    """``x @ weightᵀ``: (…, in) → (…, out) in x's dtype. `rest` and `order` are empty where not needed."""
    groups, out_features, _ = scales_and_zeros.shape
    rows = _operand(x, order, bits).to(torch.bfloat16).contiguous()
    if rows.shape[0] >= DENSE_FROM:
        weight = dequantize_int4pack(packed, scales_and_zeros, rest, torch.bfloat16)
        y = rows @ weight
    elif rows.shape[0]:
        group = rows.shape[1] // groups
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, group, scales_and_zeros)
        if rest.numel():
            sums = rows.view(-1, groups, group).sum(dim=-1, dtype=torch.float32)
            y = torch.addmm(y.to(torch.float32), sums, rest)
    else:
        y = rows.new_empty((0, out_features))
    result: Tensor = y.to(x.dtype).view(*x.shape[:-1], out_features)
    return result


def _operand(x: Tensor, order: Tensor, bits: int) -> Tensor:
    """x as the packed weight expects it: one row per token, in its order, twice at 8 bits."""
    rows = x.reshape(-1, x.shape[-1])
    if order.numel():
        rows = rows.index_select(1, order)
    return torch.cat([rows, rows], dim=1) if bits == 8 else rows


@linear_int4pack.register_fake
def _(x: Tensor, packed: Tensor, scales_and_zeros: Tensor, rest: Tensor, order: Tensor, bits: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], scales_and_zeros.shape[1]))


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors, ctx.bits = inputs
    ctx.save_for_backward(*tensors)


def _grad_to_x(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    packed, scales_and_zeros, rest, order = ctx.saved_tensors
    weight = torch.ops.fewbit.dequantize_int4pack(packed, scales_and_zeros, rest, grad.dtype)
    grad_rows = grad @ weight.t()
    if ctx.bits == 8:
        high, low = grad_rows.chunk(2, dim=-1)
        grad_rows = high + low
    if order.numel():
        grad_rows = torch.zeros_like(grad_rows).index_copy(-1, order, grad_rows)
    return grad_rows, None, None, None, None, None


linear_int4pack.register_autograd(_grad_to_x, setup_context=_save_weight)


class TorchInt4(Kernel):
    """torch's own int4 product for CPUs."""

    name = "torch_int4"
    summary = "torch's int4 operator for CPUs: reads each packed weight once; bfloat16"

    def why_not(
        self, spec: KernelSpec, device: torch.device, dtype: torch.dtype, trainable: bool
    ) -> str | None:
        """See `Kernel.why_not`."""
        if spec.kind != "linear":
            return f"the layer is a {spec.kind}, not a linear layer"
        if device.type != "cpu":
            return f"device is {device.type}, not cpu"
        if dtype != torch.bfloat16:
            return (
                f"activations are {str(dtype).removeprefix('torch.')}: the operator is fast in bfloat16 only "
                "(load with dtype=torch.bfloat16)"
            )
        if spec.out_features % 16:
            return f"out_features {spec.out_features} is not a multiple of 16"
        if _operator_group(spec.group_size, spec.in_features) is None:
            return f"group_size {spec.group_size} with in_features {spec.in_features}: not multiples of 32"
        if not spec.even_groups:
            return f"g_idx gives some groups more or fewer than group_size {spec.group_size} inputs"
        if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
            return f"torch {torch.__version__} does not have the operator; it needs 2.6 or later"
        if _block() is None:
            return "torch packs int4 weights on this machine in an order from which they cannot be restored"
        return None

    def repack(self, layer: QuantizedBuffers) -> dict[str, Tensor]:
        """Buffers: packed, scales_and_zeros, rest (empty: nothing lost), order (empty: as they are)."""
        codes = layer.codes()
        in_features = codes.shape[1]
        group = _operator_group(codes.group_size, in_features)
        if group is None:
            raise ValueError(f"group_size {codes.group_size} does not fit the int4 operator")
        order = torch.empty(0, dtype=torch.int64)
        ordered, g_idx = codes.codes, codes.g_idx.long()
        if codes.has_act_order:
            order = torch.argsort(g_idx, stable=True)
            ordered, g_idx = ordered[:, order], g_idx[order]
        scales_and_zeros, rest = _scales_and_zeros(codes, g_idx[::group])
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            _digits(ordered, codes.bits).to(torch.int32), 1
        )
        return {
            "packed": packed,
            "scales_and_zeros": scales_and_zeros,
            "rest": rest if rest.count_nonzero() else rest.new_empty(0),
            "order": order,
        }

    def restore(self, layer: QuantizedBuffers) -> Tensor:
        """See `Kernel.restore`."""
        spec, order = layer.spec, layer.get_buffer("order")
        width = spec.in_features * (2 if spec.bits == 8 else 1)
        digits = _unpack(layer.get_buffer("packed"), _known_block(), spec.out_features, width).t()
        codes = _undo_digits(digits, spec.bits)
        codes = torch.empty_like(codes).index_copy_(1, order, codes) if order.numel() else codes
        return layout.pack_rows(codes, spec.bits).t()

    def linear(self, x: Tensor, layer: QuantizedBuffers) -> Tensor:
        """See `Kernel.linear`."""
        packed, sz = layer.get_buffer("packed"), layer.get_buffer("scales_and_zeros")
        rest, order = layer.get_buffer("rest"), layer.get_buffer("order")
        y: Tensor = torch.ops.fewbit.linear_int4pack(x, packed, sz, rest, order, layer.spec.bits)
        return y if layer.bias is None else y + layer.bias.to(y.dtype)
