"""The kernel for GPUs, written in Triton: every bit width, group size, zero point, column order and float dtype.

It holds the codes in the layout of `fragments`; `triton_products` has the mathematics, `triton_choice` decides how a
product is cut up, `triton_check` whether "auto" may take it on this device. Results are the same from run to run:
pieces of a sum are added in a fixed order. **It has never been run on a GPU by fewbit's authors**: it is tested in
Triton's interpreter, and compiled for GPUs that are not there (docs/gpu.md).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ...checkpoint import layout
from ..spec import Kernel, KernelSpec, QuantizedBuffers
from . import layout as fragments
from .layout import Fragments

_DEVICES = ("cuda", "xpu")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@torch.library.custom_op("fewbit::linear_fragments", mutates_args=())
def linear_fragments(
    x: Tensor, words: Tensor, zeros: Tensor, scales: Tensor, order: Tensor, bits: int, group: int
) -> Tensor:
    """``x @ weightᵀ``: (…, in) → (…, out) in x's dtype. See `Fragments`; scales are (groups, out)."""
    from . import autotune as triton_choice
    from .kernels import Tiles, multiply, on

    weight = Fragments(words, zeros, order, group)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    tokens, inputs = rows.shape
    outputs = scales.shape[1]
    if not tokens:
        return x.new_empty((*x.shape[:-1], outputs))

    job = triton_choice.job(tokens, outputs, inputs, bits, group, x.dtype)

    def seconds(tiles: Tiles) -> float:
        expected = multiply(rows, weight, scales, bits, triton_choice.rule(job))
        triton_choice.check_same(multiply(rows, weight, scales, bits, tiles), expected)
        return triton_choice.event_seconds(lambda: multiply(rows, weight, scales, bits, tiles))

    with on(x.device):
        y = multiply(rows, weight, scales, bits, triton_choice.tuner().choose(job, seconds))
    return y.view(*x.shape[:-1], outputs)


@linear_fragments.register_fake
def _(
    x: Tensor, words: Tensor, zeros: Tensor, scales: Tensor, order: Tensor, bits: int, group: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], scales.shape[1]))


@torch.library.custom_op("fewbit::dequantize_fragments", mutates_args=())
def dequantize_fragments(
    words: Tensor,
    zeros: Tensor,
    scales: Tensor,
    order: Tensor,
    bits: int,
    group: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The transposed weight (in, out), computed in float32 and rounded once to `dtype`."""
    from .kernels import on, unpack

    rows = order.numel() or in_features
    with on(scales.device):
        found = unpack(Fragments(words, zeros, order, group), scales, bits, rows, dtype)
    if not order.numel():
        return found
    # Padding goes to a row of its own, which is left out.
    weight = found.new_empty((in_features + 1, scales.shape[1])).index_copy_(0, order.long(), found)
    return weight[:in_features].contiguous()


@dequantize_fragments.register_fake
def _(
    words: Tensor,
    zeros: Tensor,
    scales: Tensor,
    order: Tensor,
    bits: int,
    group: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    return scales.new_empty((in_features, scales.shape[1]), dtype=dtype)


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *tensors, ctx.bits, ctx.group = inputs
    ctx.in_features = x.shape[-1]
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weight = torch.ops.fewbit.dequantize_fragments(
        *ctx.saved_tensors, ctx.bits, ctx.group, ctx.in_features, grad.dtype
    )
    return (grad @ weight.t(), *(None,) * 6)


linear_fragments.register_autograd(_gradients, setup_context=_save_weight)


class TritonKernel(Kernel):
    """Codes unpacked on the chip, products on the tensor cores."""

    name = "triton"
    summary = "fewbit's own for GPUs: unpacks on the chip, sums in float32"

    def unsupported_reason(
        self, spec: KernelSpec, device: torch.device, dtype: torch.dtype, trainable: bool
    ) -> str | None:
        """See `Kernel.unsupported_reason`."""
        if spec.kind != "linear":
            return f"the layer is a {spec.kind}, not a linear layer"
        if device.type not in _DEVICES:
            return f"device is {device.type}, not cuda or xpu"
        if dtype not in _DTYPES:
            return f"activations are {str(dtype).removeprefix('torch.')}, not float16, bfloat16 or float32"
        if find_spec("triton") is None:
            return "the package triton is not installed (pip install triton)"
        return None

    def self_check(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """See `Kernel.self_check`: it is tried out on the device, once per process, device, bits and dtype."""
        from .self_check import problem

        return problem(device, spec.bits, dtype)

    def repack(self, layer: QuantizedBuffers) -> dict[str, Tensor]:
        """Buffers: words, zeros, order, as in `Fragments`; the scales stay where they are."""
        spec, tensors = layer.spec, layer.tensors
        codes = layer.codes()
        order = fragments.positions(codes.g_idx, codes.group_size, tensors[layout.SCALES].shape[0])
        return {
            "words": fragments.pack(codes.codes, spec.bits, order),
            "zeros": codes.zeros.t().to(torch.uint8).contiguous(),
            "order": order.to(codes.codes.device),
        }

    def restore(self, layer: QuantizedBuffers) -> Tensor:
        """See `Kernel.restore`."""
        spec, tensors = layer.spec, layer.tensors
        codes = fragments.unpack(
            tensors["words"], spec.bits, tensors["order"], spec.out_features, spec.in_features
        )
        return layout.pack_rows(codes, spec.bits).t().contiguous()

    def linear(self, x: Tensor, layer: QuantizedBuffers) -> Tensor:
        """See `Kernel.linear`."""
        spec, tensors = layer.spec, layer.tensors
        scales, order = tensors[layout.SCALES], tensors["order"]
        group = fragments.group_of(order, scales.shape[0], spec.group_size)
        y: Tensor = torch.ops.fewbit.linear_fragments(
            x, tensors["words"], tensors["zeros"], scales, order, spec.bits, group
        )
        return y if layer.bias is None else y + layer.bias.to(y.dtype)
