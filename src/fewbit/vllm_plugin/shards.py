"""The part of a quantized layer that one process of an engine multiplies with. Knows nothing of vLLM.

An engine merges layers with the same input (q, k and v), and spreads a layer over processes: by its outputs, or by its
inputs. A `Shard` holds a layer's tensors in canonical form, a `DenseShard` the weight of one that is not quantized.
`outputs`, `inputs` and `merge` do the rest, exactly, and a `Projection` multiplies.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from ..checkpoint import layout
from ..errors import CheckpointError
from ..kernels.cpu import packed
from ..kernels.cpu.kernel import Cpu
from ..kernels.cpu.merged import MergedLinear
from ..kernels.cpu.packed import PackedWeight
from ..quantized_matrix import group_count, sequential_groups

WEIGHT = "weight"  # the tensor of a layer that is not quantized


@dataclass(frozen=True)
class Shard:
    """Some outputs and inputs of one quantized layer.

    Attributes:
        qweight: int32 (words, out), codes packed along the inputs.
        scales: (groups, out), in the dtype of the file.
        zeros: int16 (groups, out).
        g_idx: int32 (in,), the group of each input.
        bits: 2, 3, 4 or 8.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor
    bits: int

    def outputs(self, rows: Tensor) -> Shard:
        """The outputs `rows`, int64 (n,)."""
        first = int(rows[0])
        if torch.equal(rows, torch.arange(first, first + len(rows))):
            parts = [tensor.narrow(1, first, len(rows)) for tensor in (self.qweight, self.scales, self.zeros)]
        else:
            parts = [tensor.index_select(1, rows) for tensor in (self.qweight, self.scales, self.zeros)]
        return replace(self, qweight=parts[0], scales=parts[1], zeros=parts[2])

    def inputs(self, first: int, last: int) -> Shard:
        """Inputs first … last, and the groups that they belong to."""
        everything, unit = self.g_idx.numel(), packed.tile_inputs(self.bits)
        if (first, last) == (0, everything):
            return self
        if first % unit == 0 and (last % unit == 0 or last == everything):
            start = first * self.bits // 32
            qweight = self.qweight[start : start + layout.word_count(last - first, self.bits)]
        else:
            codes = layout.unpack_rows(self.qweight.t().contiguous(), self.bits, everything)
            qweight = layout.pack_rows(codes[:, first:last].contiguous(), self.bits).t()
        groups, g_idx = torch.unique(self.g_idx[first:last].long(), return_inverse=True)
        return replace(
            self,
            qweight=qweight,
            scales=self.scales.index_select(0, groups),
            zeros=self.zeros.index_select(0, groups),
            g_idx=g_idx.int(),
        )

    def pack(self) -> PackedWeight:
        """The weight as the kernels for CPUs read it."""
        return packed.pack(
            self.qweight.contiguous(), self.scales.contiguous(), self.zeros, self.g_idx, self.bits
        )


@dataclass(frozen=True)
class DenseShard:
    """Some outputs and inputs of a layer that is not quantized: `weight` (out, in)."""

    weight: Tensor

    def outputs(self, rows: Tensor) -> DenseShard:
        """The outputs `rows`, int64 (n,)."""
        return DenseShard(self.weight.index_select(0, rows))

    def inputs(self, first: int, last: int) -> DenseShard:
        """Inputs first … last."""
        return DenseShard(self.weight[:, first:last].contiguous())


def kept(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of a loaded tensor, because an engine may use its memory again; dense weights in the model's dtype."""
    return tensor.to(dtype if name == WEIGHT else tensor.dtype, copy=True)


def read(
    tensors: Mapping[str, Tensor],
    formats: Collection[tuple[int, int]],
    fmt: str,
    in_features: int,
    where: str,
) -> Shard | DenseShard:
    """A whole layer from its tensors.

    Args:
        tensors: by short name, as in the checkpoint: ``weight``, or the parts of a quantized layer, perhaps
            without ``g_idx``.
        formats: (bits, group size) of the layers that it can be; the shapes decide.
        fmt: "gptq" or "gptq_v2".
        in_features: number of inputs of the whole layer.
        where: its name, for messages.

    Raises:
        CheckpointError: the tensors fit none of the formats, or g_idx has a group that does not exist.
    """
    if WEIGHT in tensors:
        return DenseShard(tensors[WEIGHT])
    out_features = tensors[layout.SCALES].shape[1] if layout.SCALES in tensors else 0
    problems: list[str] = []
    for bits, group_size in formats:
        groups = group_count(in_features, group_size)
        found = layout.shape_problems(tensors, bits, groups, in_features, out_features)
        if found:
            problems.append(f"{bits} bits in groups of {group_size}: {'; '.join(found)}")
            continue
        g_idx = tensors.get(layout.G_IDX)
        if g_idx is None:
            g_idx = sequential_groups(in_features, group_size)
        layout.check_groups(g_idx, groups)
        zeros = layout.unpack_zeros(tensors[layout.QZEROS], bits, fmt, out_features)
        return Shard(tensors[layout.QWEIGHT], tensors[layout.SCALES], zeros, g_idx.int(), bits)
    raise CheckpointError(
        f"{where}: the tensors in the files do not fit its settings ({' / '.join(problems)})"
    )


def merge(shards: Sequence[Shard | DenseShard]) -> list[Shard | DenseShard]:
    """The same outputs in the same order, in as few shards as possible: one for neighbors with equal settings."""
    merged: list[Shard | DenseShard] = []
    for shard in shards:
        last = merged[-1] if merged else None
        if isinstance(shard, Shard) and isinstance(last, Shard) and _mergeable(last, shard):
            merged[-1] = _concatenate(last, shard)
        else:
            merged.append(shard)
    return merged


def _mergeable(a: Shard, b: Shard) -> bool:
    alike = (a.bits, a.scales.dtype, a.qweight.shape[0]) == (b.bits, b.scales.dtype, b.qweight.shape[0])
    return alike and torch.equal(a.g_idx, b.g_idx)


def _concatenate(a: Shard, b: Shard) -> Shard:
    return replace(
        a,
        qweight=torch.cat([a.qweight, b.qweight], dim=1),
        scales=torch.cat([a.scales, b.scales], dim=1),
        zeros=torch.cat([a.zeros, b.zeros], dim=1),
    )


class Projection:
    """Products of one input with several shards, side by side: (…, in) → (…, out). No gradients.

    Attributes:
        products: number of products; neighbors with equal settings share one.
    """

    def __init__(self, shards: Sequence[Shard | DenseShard]) -> None:
        merged = merge(shards)
        self.products = len(merged)
        self._multiply = [
            partial(_dense_product, shard.weight)
            if isinstance(shard, DenseShard)
            else MergedLinear(shard.pack(), Cpu.rounding)
            for shard in merged
        ]

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.products == 1:
            return self._multiply[0](x, bias)
        y = torch.cat([multiply(x) for multiply in self._multiply], dim=-1)
        return y if bias is None else y + bias


def _dense_product(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.linear(x, weight, bias)
