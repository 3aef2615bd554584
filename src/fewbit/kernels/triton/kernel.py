"""The kernel for GPUs, written in Triton: every bit width, group size, zero point, column order and float dtype.

`fragments` holds the codes, `kernels` the mathematics, and `tile_config` decides how a product is cut into programs.
"auto" takes the kernel only after `self_check`. Results are the same from run to run, because partial sums are added in
a fixed order. **fewbit's authors have never run it on a GPU**: it is tested in Triton's interpreter, and compiled for
GPUs that are not present (docs/gpu.md).
"""

from __future__ import annotations

import functools
import logging
from importlib.util import find_spec
from subprocess import SubprocessError
from typing import Any

import torch
from torch import Tensor

from ...checkpoint import layout
from ...quantized_matrix import QuantizedMatrix
from ..spec import Kernel, KernelSpec, QuantizedBuffers
from . import fragments
from .fragments import Fragments
from .tile_config import DENSE_FROM, heuristic_config, problem_key

_LOG = logging.getLogger(__name__)

_DEVICES = ("cuda", "xpu")
# Largest relative error of the self-check. A correct kernel stays below a third of it; a wrong weight is far above.
_TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2e-2, torch.float32: 1e-4}
_DTYPES = tuple(_TOLERANCE)
_CHECK_SHAPE, _CHECK_GROUP = (96, 512), 128


@torch.library.custom_op("fewbit::linear_fragments", mutates_args=())
def linear_fragments(
    x: Tensor, words: Tensor, zeros: Tensor, scales: Tensor, order: Tensor, bits: int, group: int
) -> Tensor:
    """``x @ weightᵀ``: (…, in) → (…, out) in x's dtype. See `Fragments`; scales are (groups, out)."""
    from .kernels import device_guard, multiply

    rows = x.reshape(-1, x.shape[-1]).contiguous()
    outputs = scales.shape[1]
    if not rows.shape[0]:
        return x.new_empty((*x.shape[:-1], outputs))
    with device_guard(x.device):
        y = multiply(rows, Fragments(words, zeros, order, group), scales, bits)
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
    from .kernels import dequantize, device_guard

    rows = order.numel() or in_features
    with device_guard(scales.device):
        found = dequantize(Fragments(words, zeros, order, group), scales, bits, rows, dtype)
    if not order.numel():
        return found
    # Padding goes to an extra row, which is dropped.
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
        """See `Kernel.self_check`: a small product on the device, once per process, device, bits and dtype."""
        return self_check(device, spec.bits, dtype)

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
        spec, tensors = layer.spec, layer.tensors
        codes = fragments.unpack(
            tensors["words"], spec.bits, tensors["order"], spec.out_features, spec.in_features
        )
        return layout.pack_rows(codes, spec.bits).t().contiguous()

    def linear(self, x: Tensor, layer: QuantizedBuffers) -> Tensor:
        spec, tensors = layer.spec, layer.tensors
        scales, order = tensors[layout.SCALES], tensors["order"]
        group = fragments.group_of(order, scales.shape[0], spec.group_size)
        y: Tensor = torch.ops.fewbit.linear_fragments(
            x, tensors["words"], tensors["zeros"], scales, order, spec.bits, group
        )
        return y if layer.bias is None else y + layer.bias.to(y.dtype)


@functools.cache
def self_check(device: torch.device, bits: int, dtype: torch.dtype) -> str | None:
    """None where the kernel computes the right numbers on this device; otherwise what is wrong, which is also logged.

    A new device, driver or version of Triton must not be discovered by a model that writes nonsense. A small layer is
    multiplied on every path of the kernel, one with act-order on the shortest, and compared with float64. The first
    time on a machine this compiles a few kernels, which takes seconds; Triton caches them.
    """
    from triton.errors import TritonError

    # Errors of Triton, of the driver, and of a missing compiler.
    failures = (TritonError, RuntimeError, ValueError, TypeError, AssertionError, OSError, SubprocessError)
    try:
        reason = _first_error(device, bits, dtype)
    except failures as error:
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    if reason is None:
        return None
    reason = f"its self-check on {device} failed ({reason})"
    _LOG.warning(
        "kernel triton, %d bits, %s: %s; the reference kernel, which is slow, takes its place",
        bits, dtype, reason,
    )  # fmt: skip
    return reason


def _first_error(device: torch.device, bits: int, dtype: torch.dtype) -> str | None:
    from .kernels import device_guard, multiply

    outputs, inputs = _CHECK_SHAPE
    for act_order in (False, True):
        codes = _random_codes(bits, act_order)
        groups = codes.scales.shape[1]
        order = fragments.positions(codes.g_idx, _CHECK_GROUP, groups)
        group = fragments.group_of(order, groups, _CHECK_GROUP)
        words = fragments.pack(codes.codes, bits, order)
        zeros = codes.zeros.t().to(torch.uint8).contiguous()
        weight = Fragments(words.to(device), zeros.to(device), order.to(device), group)
        scales = codes.scales.t().contiguous().to(device)
        exact = codes.dequantize(torch.float64).t()
        for tokens in (1,) if act_order else (1, 16, 40, DENSE_FROM):
            x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(tokens)).to(dtype)
            config = heuristic_config(problem_key(tokens, outputs, inputs, bits, group, dtype))
            with device_guard(device):
                found = multiply(x.to(device), weight, scales, bits, config).cpu().double()
            truth = x.double() @ exact
            error = float((found - truth).norm() / truth.norm())
            if not error < _TOLERANCE[dtype]:  # NaN is not
                return f"error {error:.1e} at {tokens} tokens{', act-order' if act_order else ''}"
    return None


def _random_codes(bits: int, act_order: bool) -> QuantizedMatrix:
    generator = torch.Generator().manual_seed(bits)
    outputs, inputs = _CHECK_SHAPE
    groups, levels = inputs // _CHECK_GROUP, 2**bits
    g_idx = torch.arange(inputs, dtype=torch.int32) // _CHECK_GROUP
    if act_order:
        g_idx = g_idx[torch.randperm(inputs, generator=generator)]
    return QuantizedMatrix(
        codes=torch.randint(0, levels, (outputs, inputs), generator=generator, dtype=torch.uint8),
        scales=((torch.rand((outputs, groups), generator=generator) + 0.5) / levels / 8).half(),
        zeros=torch.randint(1, levels, (outputs, groups), generator=generator, dtype=torch.int16),
        g_idx=g_idx,
        bits=bits,
        group_size=_CHECK_GROUP,
    )
