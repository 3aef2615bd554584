"""Less work around the products of a token: layers that read the same input (q, k, v; gate, up) in one call.

The layers stay where they are, with their names and their own tensors: the tiles of all of them lie one after the
other in one tensor, of which each has its part, and so do their scales and zero points. The first layer that sees an
input computes for all; the others find their part of the result. Whoever calls them in another order, or one alone,
gets the same numbers. `steps` does the same for what lies between the products.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ... import native
from ...modeling.input_groups import INPUT_GROUPS
from ..linear import QuantLinear
from ..spec import QuantizedBuffers
from . import layout as packed
from .fused_ops import fuse_steps
from .kernel import Cpu, can_bypass_dispatch, packed_weight
from .layout import PackedWeight, Rounding

# From here on the products take so long that a call more does not matter, and their parts would have to be copied.
MOST_TOKENS = 8


class MergedLinear:
    """One layer or several as one weight, and the result that some of them have not fetched yet."""

    def __init__(self, weight: PackedWeight, rounding: Rounding) -> None:
        self.weight, self.rounding = weight, rounding
        self.pending: tuple[Tensor, int, Tensor] | None = None
        self._view = packed.native_view(weight)  # making one takes as long as a small product

    def __reduce__(self) -> tuple[Any, ...]:
        return MergedLinear, (self.weight, self.rounding)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """All outputs for x (…, in). No gradients."""
        return packed.multiply(x, self.weight, bias, self.rounding, view=self._view)

    def part(self, x: Tensor, first: int, last: int) -> Tensor:
        """Outputs first … last for x (…, in)."""
        version = 0 if x.is_inference() else x._version
        found = self.pending
        if found is None or found[0] is not x or found[1] != version:
            found = (x, version, self(x))
        self.pending = None if last == self.weight.out_features else found
        return found[2][..., first:last]


class MergedCpuKernel(Cpu):
    """The kernel of one layer of several."""

    summary = "fewbit's own, one call for layers with the same input"

    def __init__(self, merged: MergedLinear, alone: Cpu, first: int, last: int) -> None:
        self.name, self.rounding = alone.name, alone.rounding
        self.merged, self._first, self._last = merged, first, last

    def linear(self, x: Tensor, layer: QuantizedBuffers) -> Tensor:
        """See `Kernel.linear`."""
        merged = self.merged
        if not can_bypass_dispatch(x, layer.bias):
            return super().linear(x, layer)
        if self._last - self._first == merged.weight.out_features:
            return merged(x, layer.bias)
        if x.numel() > MOST_TOKENS * x.shape[-1]:
            return super().linear(x, layer)
        y = merged.part(x, self._first, self._last)
        return y if layer.bias is None else y + layer.bias.to(y.dtype)


def fuse(model: nn.Module) -> dict[str, int]:
    """Join what can be joined in a model on the CPU, and fuse what lies between (`steps`).

    Layers are joined where their bits, groups, order of inputs and kernel are the same. Casting or moving a layer, or
    choosing another kernel for it, undoes it for that layer.

    Returns:
        What was done, and how often: "calls saved" by joining, and what `fuse_steps` returns; only the first, and 0,
        without layers that run on one of fewbit's own kernels for CPUs.
    """
    saved = 0
    for module in model.modules():
        children = dict(module.named_children())
        for group in INPUT_GROUPS:
            layers = [layer for name in group.names if isinstance(layer := children.get(name), QuantLinear)]
            for _, alike in groupby(layers, _what_must_be_alike):
                saved += _join(list(alike))
    for layer in model.modules():
        if (
            isinstance(layer, QuantLinear)
            and isinstance(layer.kernel, Cpu)
            and not isinstance(layer.kernel, MergedCpuKernel)
        ):
            _take([layer], packed_weight(layer))
    ours = any(isinstance(getattr(module, "kernel", None), MergedCpuKernel) for module in model.modules())
    return {"calls saved": saved, **(fuse_steps(model) if ours else {})}


def _what_must_be_alike(layer: QuantLinear) -> object:
    if not isinstance(layer.kernel, Cpu) or isinstance(layer.kernel, MergedCpuKernel):
        return id(layer)
    tensors, spec = layer.tensors, layer.spec
    return (
        type(layer.kernel),
        spec.bits,
        spec.in_features,
        tensors["block_scales"].dtype,
        tuple(tensors["starts"].tolist()),
        tuple(tensors["order"].tolist()),
    )


def _join(layers: list[QuantLinear]) -> int:
    # Blocks of 16 outputs cannot be shared.
    if len(layers) < 2 or any(layer.out_features % 16 for layer in layers[:-1]):
        return 0
    first = layers[0]
    weight = PackedWeight(
        _one_after_the_other(layers, "tiles"),
        _one_after_the_other(layers, "block_scales"),
        _one_after_the_other(layers, "zeros"),
        first.tensors["order"],
        first.tensors["starts"],
        first.spec.bits,
        first.in_features,
        sum(layer.out_features for layer in layers),
    )
    _take(layers, weight)
    return len(layers) - 1


def _one_after_the_other(layers: list[QuantLinear], name: str) -> Tensor:
    """The blocks of all layers in one tensor, of which each gets its part as its buffer."""
    own = [layer.tensors[name] for layer in layers]
    if all(part.numel() == 1 and torch.equal(part, own[0]) for part in own):
        return own[0]  # the zero point of all of them
    if name == "zeros":
        own = [part.expand_as(layer.tensors["block_scales"]) for part, layer in zip(own, layers, strict=True)]
    joined = own[0].new_empty((sum(map(len, own)), *own[0].shape[1:]))
    native.advise_huge_pages(joined)
    torch.cat(own, out=joined)
    block = 0
    for layer, part in zip(layers, own, strict=True):
        layer._buffers[name] = joined[block : block + len(part)]
        block += len(part)
    return joined


def _take(layers: list[QuantLinear], weight: PackedWeight) -> None:
    """Give each layer its part of the weight."""
    kernel, start = layers[0].kernel, 0
    assert isinstance(kernel, Cpu)
    merged = MergedLinear(weight, kernel.rounding)
    for layer in layers:
        layer.kernel = MergedCpuKernel(merged, kernel, start, start + layer.out_features)
        start += layer.out_features
