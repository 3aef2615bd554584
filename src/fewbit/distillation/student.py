"""The trainable part of a quantized model: scales, norm weights and biases. The codes stay packed and frozen.

Every trained tensor is p = p₀ + u ∘ d. d is trained, float32. The unit u makes a step of one rate fit all of them: |p₀|
for scales, so that d is a relative change, and the root mean square of p₀ for vectors. The model computes with p
rounded to its stored dtype, so what is judged is what is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..checkpoint.layout import G_IDX, QWEIGHT, QZEROS, SCALES, unpack_rows, unpack_zeros
from ..hf.quantized_layers import quantized_layers
from ..kernels.linear import QuantizedLayer, QuantLinear
from ..modeling.layers import forward_replaced
from ..planning import block_of

# Values saved for the backward pass, as a multiple of the inputs and outputs of all quantized layers.
_SAVED = 2
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


class TrainedMatrix:
    """The matrix Ŵ = s ∘ (q − z) of one layer, with trained scales.

    Args:
        name: name of the layer.
        layer: the layer.
        keep: keep q − z, and Ŵ until `forget`, instead of decoding them for every product.
    """

    def __init__(self, name: str, layer: QuantLinear, *, keep: bool) -> None:
        self.layer = layer
        self.scales = TrainedTensor.of(f"{name}.{SCALES}", layer.scales, relative=True)
        self._dense: Tensor | None = None
        self._groups = _sequential_groups(layer)
        self._kept = self._decoded() if keep else None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Ŵ (out, in)."""
        if self._dense is None or self._dense.dtype is not dtype:
            with torch.no_grad():
                W = self._times_scales(self._centered().float()).to(dtype)
            if self._kept is None:
                return W
            self._dense = W
        return self._dense

    def forget(self) -> None:
        """Drop the kept Ŵ, because s has changed."""
        self._dense = None

    def gradient(self, dW: Tensor) -> Tensor:
        """∂L/∂d from ∂L/∂Ŵ (out, in): ∂L/∂s = Σ over the inputs of a group of (q − z) ∂L/∂Ŵ."""
        return self._sum_groups(dW.float().mul_(self._centered())).t() * self.scales.unit

    def _centered(self) -> Tensor:
        """q − z, int8 (out, in; int16 at 8 bits)."""
        return self._decoded() if self._kept is None else self._kept

    def _decoded(self) -> Tensor:
        spec, layer = self.layer.spec, self.layer
        codes = unpack_rows(layer.get_buffer(QWEIGHT).t().contiguous(), spec.bits, spec.in_features)
        zeros = unpack_zeros(layer.get_buffer(QZEROS), spec.bits, spec.format, spec.out_features).t()
        dtype = torch.int16 if spec.bits == 8 else torch.int8
        if self._groups is None:
            return codes.to(dtype).sub_(zeros.to(dtype).index_select(1, layer.get_buffer(G_IDX).long()))
        split = codes.to(dtype).view(len(codes), self._groups, -1)
        return (split - zeros.to(dtype)[..., None]).view(codes.shape)

    def _times_scales(self, values: Tensor) -> Tensor:
        """s ∘ values, float32 (out, in), in place."""
        s = self.scales.value().t().float()
        if self._groups is None:
            return values.mul_(s.index_select(1, self.layer.get_buffer(G_IDX).long()))
        values.view(len(values), self._groups, -1).mul_(s[..., None])
        return values

    def _sum_groups(self, values: Tensor) -> Tensor:
        """Sum values (out, in) over the inputs of each group: (out, groups)."""
        if self._groups is not None:
            return values.view(len(values), self._groups, -1).sum(-1)
        result = values.new_zeros(len(values), self.layer.get_buffer(SCALES).shape[0])
        return result.index_add_(1, self.layer.get_buffer(G_IDX).long(), values)


class Student:
    """A quantized model whose scales, norm weights and biases are trained.

    Args:
        model: a loaded checkpoint whose layers have the reference kernel. Use `training` to run it.
        stored: names in the model of the tensors that the files hold as they are in the model, with their values.
        keep: keep decoded matrices and all activations of a step: faster, but takes more memory (`bytes_kept`).

    Attributes:
        model: the model.
        tensors: what is trained, in the model's order.
        left_out: names of the quantized layers whose scales are not trained, because they are convolutions.
    """

    def __init__(self, model: nn.Module, stored: Mapping[str, Tensor], *, keep: bool = True) -> None:
        self.model, self._keep = model, keep
        model.requires_grad_(False)
        self.left_out: list[str] = []
        self.matrices: dict[str, TrainedMatrix] = {}
        for name, layer in quantized_layers(model):
            if isinstance(layer, QuantLinear):
                self.matrices[name] = TrainedMatrix(name, layer, keep=keep)
            else:
                self.left_out.append(name)
        self.vectors = {
            name: TrainedTensor.of(name, stored[name].to(parameter.device), relative=False)
            for name, parameter in model.named_parameters()
            if name in stored and _is_trained_vector(model, name, parameter)
        }
        self.tensors = [*(matrix.scales for matrix in self.matrices.values()), *self.vectors.values()]

    @contextmanager
    def training(self) -> Iterator[None]:
        """Let the model compute with the trained tensors; without `keep`, recompute each block in the backward pass."""
        with ExitStack() as stack:
            for matrix in self.matrices.values():
                stack.enter_context(forward_replaced(matrix.layer, partial(_linear, matrix)))
            for name, vector in self.vectors.items():
                stack.enter_context(_computed(self.model, name, vector))
            blocks = {block_of(name) for name in self.matrices if block_of(name) != name}
            for name in sorted(blocks if not self._keep else ()):
                block = self.model.get_submodule(name)
                stack.enter_context(forward_replaced(block, partial(_recomputed, block.forward)))
            yield

    def changed(self) -> None:
        """Drop what was decoded from the values before a step."""
        for matrix in self.matrices.values():
            matrix.forget()

    @torch.no_grad()
    def values(self) -> dict[str, Tensor]:
        """The trained tensors by name, in their stored dtypes."""
        return {tensor.name: tensor.value().clone() for tensor in self.tensors}


def bytes_kept(shapes: Iterable[tuple[int, int]], tokens: int, dtype: torch.dtype) -> int:
    """About how many bytes `keep` takes: decoded matrices and the activations of one step.

    Args:
        shapes: (in, out) of every quantized layer.
        tokens: tokens of a step.
        dtype: dtype of the activations.
    """
    return sum(
        (dtype.itemsize + 1) * n * out + dtype.itemsize * _SAVED * tokens * (n + out) for n, out in shapes
    )


def _is_trained_vector(model: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    owner, _, key = name.rpartition(".")
    kind = type(model.get_submodule(owner)).__name__.lower()
    return parameter.ndim == 1 and parameter.is_floating_point() and (key == "bias" or "norm" in kind)


class _Product(torch.autograd.Function):
    """y = x Ŵᵀ, and the gradients of x and of the scales' d, with ∂L/∂Ŵ = (∂L/∂y)ᵀ x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, d: Tensor, matrix: TrainedMatrix) -> Tensor:
        ctx.save_for_backward(x)
        ctx.matrix = matrix
        return functional.linear(x, matrix.dense(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None]:
        (x,), (grad,) = ctx.saved_tensors, grads
        grad_x = grad @ ctx.matrix.dense(x.dtype) if ctx.needs_input_grad[0] else None
        dW = grad.flatten(0, -2).t() @ x.flatten(0, -2)  # (out, in)
        return grad_x, ctx.matrix.gradient(dW), None


def _linear(matrix: TrainedMatrix, x: Tensor) -> Tensor:
    y: Tensor = _Product.apply(x, matrix.scales.d, matrix)  # type: ignore[no-untyped-call]
    bias = matrix.layer.bias
    return y if bias is None else y + bias.to(y.dtype)


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
    module.__class__ = type(
        kind.__name__, (kind,), {key: property(lambda self: vector.value().to(parameter.dtype))}
    )
    try:
        yield
    finally:
        module.__class__ = kind
        module._parameters[key] = parameter
        parameter.data.copy_(vector.value().detach())
