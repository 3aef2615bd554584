"""Layers that read the same input (q, k, v; gate, up) as one product, which saves calls for single tokens.

The layers stay where they are in the model, with their names and their own tensors. The tiles of all of them are
concatenated in one tensor, and each layer's buffer is a view of its part; likewise for scales and zero points. The
first layer that gets an input computes the product for all; the others fetch their part of the result. Calling them in
another order, or only one of them, gives the same numbers. `fused_ops` fuses the operations between the products.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ... import native
from ...input_groups import INPUT_GROUPS
from ..linear import QuantLinear
from ..spec import QuantizedBuffers
from . import packed
from .kernel import Cpu, can_bypass_dispatch, packed_weight
from .packed import PackedWeight, Rounding

# With more tokens, one call more is negligible, and the parts of the result would have to be copied.
_MAX_TOKENS = 8


class MergedLinear:
    """One or several layers as one weight, and the last result as long as some layers have not fetched their part."""

    def __init__(self, weight: PackedWeight, rounding: Rounding) -> None:
        self.weight, self.rounding = weight, rounding
        self.pending: tuple[Tensor, int, Tensor] | None = None
        self._view = packed.native_view(weight)  # creating it takes as long as a small product

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
    """The kernel of one layer of a `MergedLinear`."""

    summary = "fewbit's own, one call for layers with the same input"

    def __init__(self, merged: MergedLinear, unmerged: Cpu, first: int, last: int) -> None:
        self.name, self.rounding = unmerged.name, unmerged.rounding
        self.merged, self._first, self._last = merged, first, last

    def linear(self, x: Tensor, layer: QuantizedBuffers) -> Tensor:
        merged = self.merged
        if not can_bypass_dispatch(x, layer.bias):
            return super().linear(x, layer)
        if self._last - self._first == merged.weight.out_features:
            return merged(x, layer.bias)
        if x.numel() > _MAX_TOKENS * x.shape[-1]:
            return super().linear(x, layer)
        y = merged.part(x, self._first, self._last)
        return y if layer.bias is None else y + layer.bias.to(y.dtype)


def merge_layers(model: nn.Module) -> int:
    """Merge the layers of a model on the CPU that read the same input.

    Layers are merged where their bits, groups, order of inputs and kernel are the same. Casting or moving a layer, or
    choosing another kernel for it, undoes it for that layer. Layers that cannot be merged get a `MergedLinear` of their
    own, so that the compiled module's view of their weight is created once.

    Returns:
        The number of calls saved per token.
    """
    saved = 0
    for module in model.modules():
        children = dict(module.named_children())
        for group in INPUT_GROUPS:
            layers = [layer for name in group.names if isinstance(layer := children.get(name), QuantLinear)]
            for _, mergeable in groupby(layers, _merge_key):
                saved += _merge(list(mergeable))
    for layer in model.modules():
        if isinstance(layer, QuantLinear) and _has_unmerged_kernel(layer):
            _assign([layer], packed_weight(layer))
    return saved


def _has_unmerged_kernel(layer: QuantLinear) -> bool:
    return isinstance(layer.kernel, Cpu) and not isinstance(layer.kernel, MergedCpuKernel)


def _merge_key(layer: QuantLinear) -> object:
    """What merged layers must have in common."""
    if not _has_unmerged_kernel(layer):
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


def _merge(layers: list[QuantLinear]) -> int:
    # Blocks of 16 outputs cannot be shared.
    if len(layers) < 2 or any(layer.out_features % 16 for layer in layers[:-1]):
        return 0
    first = layers[0]
    weight = PackedWeight(
        _concatenate(layers, "tiles"),
        _concatenate(layers, "block_scales"),
        _concatenate(layers, "zeros"),
        first.tensors["order"],
        first.tensors["starts"],
        first.spec.bits,
        first.in_features,
        sum(layer.out_features for layer in layers),
    )
    _assign(layers, weight)
    return len(layers) - 1


def _concatenate(layers: list[QuantLinear], name: str) -> Tensor:
    """The blocks of all layers in one tensor; each layer's buffer becomes a view of its part."""
    parts = [layer.tensors[name] for layer in layers]
    if all(part.numel() == 1 and torch.equal(part, parts[0]) for part in parts):
        return parts[0]  # one zero point for all
    if name == "zeros":
        parts = [
            part.expand_as(layer.tensors["block_scales"]) for part, layer in zip(parts, layers, strict=True)
        ]
    joined = parts[0].new_empty((sum(map(len, parts)), *parts[0].shape[1:]))
    native.advise_huge_pages(joined)
    torch.cat(parts, out=joined)
    block = 0
    for layer, part in zip(layers, parts, strict=True):
        layer._buffers[name] = joined[block : block + len(part)]
        block += len(part)
    return joined


def _assign(layers: list[QuantLinear], weight: PackedWeight) -> None:
    """Give each layer the kernel for its part of the weight."""
    kernel, start = layers[0].kernel, 0
    assert isinstance(kernel, Cpu)
    merged = MergedLinear(weight, kernel.rounding)
    for layer in layers:
        layer.kernel = MergedCpuKernel(merged, kernel, start, start + layer.out_features)
        start += layer.out_features
