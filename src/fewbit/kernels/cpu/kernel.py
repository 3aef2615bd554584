"""fewbit's own kernels for CPUs: every bit width, group size, zero point, column order, shape and float dtype.

All of them read the tiles of `packed`. They differ in the rounding of activations (`packed.Rounding`): 16 bits, 8 bits,
or 16 bits for a few tokens and what is fastest for a prompt, without measurable loss
(docs/performance-measurements.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from ...checkpoint import layout
from ...torch_internals import tracing_state
from ..spec import Kernel, KernelSpec, QuantizedBuffers
from . import packed
from .packed import PackedWeight, Rounding


class Cpu(Kernel):
    """Integer codes times 16-bit activations, summed in float32; prompts in bfloat16 or with 8-bit activations."""

    name = "cpu"
    summary = (
        "fewbit's own: reads each packed weight once; 16-bit activations, for prompts bfloat16 (AMX) or 8 bits in fine "
        "steps"
    )
    repacks_scales = True
    rounding = Rounding.FAST_PREFILL

    def unsupported_reason(
        self, spec: KernelSpec, device: torch.device, dtype: torch.dtype, trainable: bool
    ) -> str | None:
        if spec.kind != "linear":
            return f"the layer is a {spec.kind}, not a linear layer"
        if device.type != "cpu":
            return f"device is {device.type}, not cpu"
        if dtype not in native.DTYPES:
            return f"activations are {str(dtype).removeprefix('torch.')}, not float32, float16 or bfloat16"
        if not native.available():
            return native.unsupported_reason()
        return None

    def repack(self, layer: QuantizedBuffers) -> dict[str, Tensor]:
        """Buffers: tiles, block_scales, zeros, order, starts, as in `packed.PackedWeight`."""
        spec, tensors = layer.spec, layer.tensors
        zeros = layout.unpack_zeros(tensors[layout.QZEROS], spec.bits, spec.format, spec.out_features)
        weight = packed.pack(
            tensors[layout.QWEIGHT], tensors[layout.SCALES], zeros, tensors[layout.G_IDX], spec.bits
        )
        native.drop_page_cache(tensors[layout.QWEIGHT])
        native.drop_page_cache(tensors[layout.SCALES])
        return {
            "tiles": weight.tiles,
            "block_scales": weight.scales,
            "zeros": weight.zeros,
            "order": weight.order,
            "starts": weight.starts,
        }

    def restore(self, layer: QuantizedBuffers) -> Tensor:
        words = layout.word_count(layer.spec.in_features, layer.spec.bits)
        return packed.unpack(packed_weight(layer), words)

    def restore_scales(self, layer: QuantizedBuffers) -> Tensor:
        return packed.from_blocks(layer.tensors["block_scales"], layer.spec.out_features)

    def linear(self, x: Tensor, layer: QuantizedBuffers) -> Tensor:
        return product(x, packed_weight(layer), layer.bias, rounding=self.rounding)


class Cpu16(Cpu):
    """Integer codes times 16-bit activations, summed in float32, for any number of tokens."""

    name = "cpu_a16"
    summary = "fewbit's own with 16-bit activations for prompts too"
    rounding = Rounding.NONE


class CpuInt8(Cpu):
    """Integer codes times 8-bit activations, with integer sums."""

    name = "cpu_a8"
    summary = (
        "fewbit's own with activations rounded to 8 bits per token and group: faster from a few tokens on"
    )
    rounding = Rounding.INT8


NAMES = tuple(kernel.name for kernel in (Cpu, Cpu16, CpuInt8))


def product(x: Tensor, weight: PackedWeight, bias: Tensor | None, *, rounding: Rounding) -> Tensor:
    """``x @ weightᵀ + bias``, with gradients where they are needed.

    Gradients assume 16-bit activations: where they are needed, `Rounding.FAST_PREFILL` rounds nothing.
    """
    if can_bypass_dispatch(x, bias):
        # Dispatching a custom operator takes longer than multiplying with a small weight.
        return packed.multiply(x, weight, bias, rounding)
    if rounding is Rounding.FAST_PREFILL and _needs_gradients(x, bias):
        rounding = Rounding.NONE
    y: Tensor = torch.ops.fewbit.linear_packed(x, *weight, bias, rounding)
    return y


def packed_weight(layer: QuantizedBuffers) -> PackedWeight:
    """The tensors of a layer that one of these kernels holds."""
    tensors, spec = layer.tensors, layer.spec
    return PackedWeight(
        tensors["tiles"],
        tensors["block_scales"],
        tensors["zeros"],
        tensors["order"],
        tensors["starts"],
        spec.bits,
        spec.in_features,
        spec.out_features,
    )


def can_bypass_dispatch(x: Tensor, other: Tensor | None) -> bool:
    """Whether compiled code may be called directly: no compiler, tracer, gradients or tensor subclass."""
    if type(x) is not Tensor or torch.compiler.is_compiling() or tracing_state() is not None:
        return False
    return not _needs_gradients(x, other)


def _needs_gradients(x: Tensor, other: Tensor | None) -> bool:
    return (x.requires_grad or (other is not None and other.requires_grad)) and torch.is_grad_enabled()
