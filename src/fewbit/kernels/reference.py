"""The reference kernel: unpack the whole weight, then multiply. It runs on any device, layout and dtype.

``scale · (code − zero)`` has at most 20 significant bits, so the weight is exact in float32 and is rounded once, to the
activations' dtype. It is unpacked at every call, which is slow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..checkpoint import layout
from .spec import Kernel, KernelSpec, QuantizedBuffers


@torch.library.custom_op("fewbit::dequantize", mutates_args=())
def dequantize(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    bits: int,
    format: str,
    dtype: torch.dtype,
) -> Tensor:
    """The weight (out, in) in `dtype`, from the tensors of a checkpoint (`fewbit.checkpoint.layout`)."""
    in_features, out_features = g_idx.shape[0], scales.shape[1]
    codes = layout.unpack_rows(qweight.t().contiguous(), bits, in_features)
    zeros = layout.unpack_zeros(qzeros, bits, format, out_features).t()
    groups = g_idx.long()
    weight = codes.to(torch.float32)
    weight -= zeros.to(torch.float32).index_select(1, groups)
    weight *= scales.t().to(torch.float32).index_select(1, groups)
    return weight.to(dtype)


@dequantize.register_fake
def _(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    bits: int,
    format: str,
    dtype: torch.dtype,
) -> Tensor:
    return scales.new_empty((scales.shape[1], g_idx.shape[0]), dtype=dtype)


@torch.library.custom_op("fewbit::linear_reference", mutates_args=())
def linear_reference(
    x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int, format: str
) -> Tensor:
    """``x @ weightᵀ``: (…, in) → (…, out) in x's dtype."""
    return functional.linear(x, dequantize(qweight, qzeros, scales, g_idx, bits, format, x.dtype))


@linear_reference.register_fake
def _(
    x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int, format: str
) -> Tensor:
    return x.new_empty((*x.shape[:-1], scales.shape[1]))


def save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save the checkpoint's tensors, bits and format for `gradient_to_x`."""
    _, *tensors, ctx.bits, ctx.format = inputs
    ctx.save_for_backward(*tensors)


def gradient_to_x(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Gradients of a product with a checkpoint's tensors: one for x, None for the other arguments."""
    weight = torch.ops.fewbit.dequantize(*ctx.saved_tensors, ctx.bits, ctx.format, grad.dtype)
    return grad @ weight, None, None, None, None, None, None


linear_reference.register_autograd(gradient_to_x, setup_context=save_weight)


class Reference(Kernel):
    """Unpack, then multiply."""

    name = "reference"
    summary = "plain torch: unpacks the weight at every call; runs everywhere"

    def unsupported_reason(
        self, spec: KernelSpec, device: torch.device, dtype: torch.dtype, trainable: bool
    ) -> str | None:
        return None if dtype.is_floating_point else f"activations are {dtype}, not floating point"

    def linear(self, x: Tensor, layer: QuantizedBuffers) -> Tensor:
        parts = [layer.get_buffer(name) for name in layout.PARTS]
        y: Tensor = torch.ops.fewbit.linear_reference(x, *parts, layer.spec.bits, layer.spec.format)
        return y if layer.bias is None else y + layer.bias.to(y.dtype)
