"""The trainable part of a quantized model: scales, norm weights and biases. The codes stay packed and frozen.

Every trained tensor is p = p₀ + u ∘ d. d is trained, float32. The unit u makes a step of one rate fit all of them: |p₀|
for scales, so that d is a relative change, and the root mean square of p₀ for vectors. The model computes with p
rounded to its stored dtype, so what is judged is what is written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .. import native
from ..checkpoint.layout import G_IDX, QWEIGHT, QZEROS, SCALES, unpack_rows, unpack_zeros
from ..hf.quantized_layers import quantized_layers
from ..kernels.linear import QuantizedLayer, QuantLinear
from ..pipeline.scheduler import forward_replaced
from ..planning import block_of

_SMALLEST_UNIT = 1e-2  # of a vector of zeros, such as a bias before any training


@dataclass
class TrainedTensor:
    """One trained tensor.

    Attributes:
        name: name in the model: ``<layer>.scales``, or the name of a parameter.
        start: p₀ as it is stored.
        unit: u, float32, of p₀'s shape or a scalar.
        d: the trained part, float32, of p₀'s shape.
    """

    name: str
    start: Tensor
    unit: Tensor
    d: nn.Parameter

    @classmethod
    def of(cls, name: str, start: Tensor, *, relative: bool) -> TrainedTensor:
        """Start from `start`; `relative` makes d a relative change of each number."""
        values = start.detach().float()
        rms = values.square().mean().sqrt()
        unit = values.abs() if relative else torch.where(rms > 0, rms, _SMALLEST_UNIT)
        return cls(name, start.detach().clone(), unit, nn.Parameter(torch.zeros_like(values)))

    def value(self) -> Tensor:
        """p in its stored dtype, as a function of d."""
        p = self.start.float() + self.unit * self.d
        rounded = p.detach().to(self.start.dtype)
        # The gradient of rounding is taken as 1.
        return rounded if not torch.is_grad_enabled() else p + (rounded.float() - p).detach()


class Student:
    """A quantized model whose scales, norm weights and biases are trained.

    Args:
        model: a loaded checkpoint whose layers have the reference kernel. Use `training` to run it.
        stored: names in the model of the tensors that the files hold as they are in the model.

    Attributes:
        model: the model.
        tensors: what is trained, in the model's order.
        left_out: names of the quantized layers whose scales are not trained, because they are convolutions.
    """

    def __init__(self, model: nn.Module, stored: Collection[str]) -> None:
        self.model = model
        model.requires_grad_(False)
        self.scales: dict[str, TrainedTensor] = {}
        self.left_out: list[str] = []
        self._layers: dict[str, QuantLinear] = {}
        for name, layer in quantized_layers(model):
            if isinstance(layer, QuantLinear):
                self._layers[name] = layer
                self.scales[name] = TrainedTensor.of(f"{name}.{SCALES}", layer.scales, relative=True)
            else:
                self.left_out.append(name)
        self.vectors = {
            name: TrainedTensor.of(name, parameter, relative=False)
            for name, parameter in model.named_parameters()
            if name in stored and _is_trained_vector(model, name, parameter)
        }
        self.tensors = [*self.scales.values(), *self.vectors.values()]

    @contextmanager
    def training(self) -> Iterator[None]:
        """Let the model compute with the trained tensors, and recompute each block in the backward pass."""
        with ExitStack() as stack:
            for name, layer in self._layers.items():
                stack.enter_context(forward_replaced(layer, partial(_linear, layer, self.scales[name])))
            for name, vector in self.vectors.items():
                stack.enter_context(_computed(self.model, name, vector))
            blocks = {block_of(name) for name in self._layers if block_of(name) != name}
            for name in sorted(blocks):
                block = self.model.get_submodule(name)
                stack.enter_context(forward_replaced(block, partial(_recomputed, block.forward)))
            yield

    def state(self) -> dict[str, Tensor]:
        """Copies of all d by name."""
        return {tensor.name: tensor.d.detach().clone() for tensor in self.tensors}

    def set_state(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        for tensor in self.tensors:
            tensor.d.data.copy_(state[tensor.name])

    @torch.no_grad()
    def values(self) -> dict[str, Tensor]:
        """The trained tensors by name, in their stored dtypes."""
        return {tensor.name: tensor.value() for tensor in self.tensors}


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Dtype of the matrix products: bfloat16 where the device multiplies it fast, else the activations' own."""
    fast = device.type == "cuda" or (device.type == "cpu" and "avx512_bf16" in native.instruction_sets())
    return torch.bfloat16 if fast and dtype is torch.float32 else dtype


def _is_trained_vector(model: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    owner, _, key = name.rpartition(".")
    kind = type(model.get_submodule(owner)).__name__.lower()
    return parameter.ndim == 1 and parameter.is_floating_point() and (key == "bias" or "norm" in kind)


class _ScaledProduct(torch.autograd.Function):
    """y = x Ŵᵀ with Ŵ = s ∘ (q − z), and the gradients of x and of the scales s.

    ∂L/∂s = Σ over the inputs i of a group of (q − z)_oi (∂L/∂Ŵ)_oi, with ∂L/∂Ŵ = (∂L/∂y)ᵀ x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Tensor, layer: QuantizedLayer) -> Tensor:
        centered, dtype = _centered(layer), product_dtype(x.device, x.dtype)
        # int8 codes of one block at a time: the first forward pass of a recomputed block saves nothing.
        ctx.save_for_backward(x, scales, centered)
        ctx.layer = layer
        return functional.linear(x.to(dtype), _scaled(centered.float(), scales, layer).to(dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, scales, centered = ctx.saved_tensors
        layer: QuantizedLayer = ctx.layer
        dtype, grad_x, grad_s = product_dtype(x.device, x.dtype), None, None
        grad = grads[0].to(dtype)
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ _scaled(centered.float(), scales, layer).to(dtype)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            product = grad.flatten(0, -2).t() @ x.to(dtype).flatten(0, -2)  # ∂L/∂Ŵ (out, in)
            grad_s = _sum_groups(product.float().mul_(centered), layer).t()
        return grad_x, grad_s, None


def _linear(layer: QuantizedLayer, scales: TrainedTensor, x: Tensor) -> Tensor:
    y: Tensor = _ScaledProduct.apply(x, scales.value(), layer)  # type: ignore[no-untyped-call]
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


def _centered(layer: QuantizedLayer) -> Tensor:
    """q − z, int8 (out, in; int16 at 8 bits), from the packed codes."""
    spec = layer.spec
    codes = unpack_rows(layer.get_buffer(QWEIGHT).t().contiguous(), spec.bits, spec.in_features)
    zeros = unpack_zeros(layer.get_buffer(QZEROS), spec.bits, spec.format, spec.out_features).t()
    dtype = torch.int16 if spec.bits == 8 else torch.int8
    groups = _sequential_groups(layer)
    if groups is None:
        return codes.to(dtype).sub_(zeros.to(dtype).index_select(1, layer.get_buffer(G_IDX).long()))
    return (codes.to(dtype).view(len(codes), groups, -1) - zeros.to(dtype)[..., None]).view(codes.shape)


def _scaled(centered: Tensor, scales: Tensor, layer: QuantizedLayer) -> Tensor:
    """Ŵ = s ∘ (q − z), float32 (out, in), in place of q − z."""
    groups, s = _sequential_groups(layer), scales.t().float()
    if groups is None:
        return centered.mul_(s.index_select(1, layer.get_buffer(G_IDX).long()))
    centered.view(len(centered), groups, -1).mul_(s[..., None])
    return centered


def _sum_groups(values: Tensor, layer: QuantizedLayer) -> Tensor:
    """Sum values (out, in) over the inputs of each group: (out, groups)."""
    groups = _sequential_groups(layer)
    if groups is not None:
        return values.view(len(values), groups, -1).sum(-1)
    result = values.new_zeros(len(values), layer.get_buffer(SCALES).shape[0])
    return result.index_add_(1, layer.get_buffer(G_IDX).long(), values)


def _sequential_groups(layer: QuantizedLayer) -> int | None:
    """The number of groups if they are consecutive inputs and equally long, else None."""
    size, n = layer.spec.group_size, layer.spec.in_features
    if layer.spec.act_order:
        return None
    return 1 if size == -1 else n // size if n % size == 0 else None


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a block and keep nothing of it but its arguments until the backward pass."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


@contextmanager
def _computed(model: nn.Module, name: str, vector: TrainedTensor) -> Iterator[None]:
    """Make a parameter a function of d while entered; it gets its new value at the end."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    parameter, kind = module._parameters.pop(key), type(module)
    assert parameter is not None
    module.__class__ = type(kind.__name__, (kind,), {key: property(lambda self: vector.value())})
    try:
        yield
    finally:
        module.__class__ = kind
        module._parameters[key] = parameter
        parameter.data.copy_(vector.value().detach())
