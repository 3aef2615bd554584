"""The kernel for GPUs, written in Triton: every bit width, group size, zero point, column order and float dtype.

It reads the checkpoint's tensors as they are; `triton_products` has the mathematics. Results are the same from run to
run: pieces of a sum are added in a fixed order. **It has never been run on a GPU by fewbit's authors**: it is tested in
Triton's interpreter, and compiled for GPUs that are not there (docs/gpu.md).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import layout
from .kernel import Kernel, KernelSpec, QuantizedBuffers
from .reference import gradient_to_x, save_weight

_DEVICES = ("cuda", "xpu")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@torch.library.custom_op("fewbit::linear_triton", mutates_args=())
def linear_triton(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    bits: int,
    format: str,
    group_size: int,
) -> Tensor:
    """``x @ weightᵀ``: (…, in) → (…, out) in x's dtype. `group_size` is 0 where groups are not consecutive inputs."""
    from .triton_products import product

    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if not rows.shape[0]:
        return x.new_empty((*x.shape[:-1], scales.shape[1]))
    y = product(rows, qweight, qzeros, scales, g_idx, bits, format == "gptq", group_size)
    return y.view(*x.shape[:-1], scales.shape[1])


@linear_triton.register_fake
def _(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    bits: int,
    format: str,
    group_size: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], scales.shape[1]))


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    save_weight(ctx, inputs[:-1], output)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (*gradient_to_x(ctx, grad), None)


linear_triton.register_autograd(_gradients, setup_context=_save_weight)


class TritonKernel(Kernel):
    """Codes unpacked on the chip, products on the tensor cores."""

    name = "triton"
    summary = "fewbit's own for GPUs: unpacks on the chip, sums in float32"

    def why_not(
        self, spec: KernelSpec, device: torch.device, dtype: torch.dtype, trainable: bool
    ) -> str | None:
        """See `Kernel.why_not`."""
        if spec.kind != "linear":
            return f"the layer is a {spec.kind}, not a linear layer"
        if device.type not in _DEVICES:
            return f"device is {device.type}, not cuda or xpu"
        if dtype not in _DTYPES:
            return f"activations are {str(dtype).removeprefix('torch.')}, not float16, bfloat16 or float32"
        if find_spec("triton") is None:
            return "the package triton is not installed (pip install triton)"
        return None

    def linear(self, x: Tensor, layer: QuantizedBuffers) -> Tensor:
        """See `Kernel.linear`."""
        spec, tensors = layer.spec, layer.tensors
        size = spec.in_features if spec.group_size == -1 else spec.group_size
        y: Tensor = torch.ops.fewbit.linear_triton(
            x,
            *(tensors[name] for name in layout.PARTS),
            spec.bits,
            spec.format,
            0 if spec.act_order else size,
        )
        return y if layer.bias is None else y + layer.bias.to(y.dtype)
