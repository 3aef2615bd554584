"""A quantized weight as numbers: what the solver returns, the checkpoint stores and the kernels read.

`QuantizedMatrix` knows nothing of packing, files or kernels. Its contract is one line:
``weight[i, j] = scales[i, g] * (codes[i, j] - zeros[i, g])`` with ``g = g_idx[j]``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def group_count(in_features: int, group_size: int) -> int:
    """Number of groups of a row: ``ceil(in / group_size)``, or 1 for group size −1."""
    return 1 if group_size == -1 else math.ceil(in_features / group_size)


def sequential_groups(
    in_features: int, group_size: int, *, device: torch.device | str | None = None
) -> Tensor:
    """The group of each input without act-order: ``i // group_size``, int32 of shape (in,)."""
    size = in_features if group_size == -1 else group_size
    return torch.arange(in_features, dtype=torch.int32, device=device) // max(size, 1)


@dataclass(frozen=True)
class QuantizedMatrix:
    """Integer codes with their grid.

    Attributes:
        codes: uint8 (out, in), values 0 … 2^bits − 1.
        scales: float16 or bfloat16 (out, groups), exactly as stored. May be negative.
        zeros: int16 (out, groups). fewbit writes 1 … 2^bits − 1; other writers also 0 and 2^bits.
        g_idx: int32 (in,), the group of each input.
        bits: 2, 3, 4 or 8.
        group_size: inputs per group, or −1 for one group.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def has_act_order(self) -> bool:
        """Whether the groups are anything other than consecutive inputs."""
        return not torch.equal(self.g_idx.cpu(), sequential_groups(self.codes.shape[1], self.group_size))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (out, in): computed in float32, then rounded once to `dtype`."""
        W, scales, zeros = self.codes.float(), self.scales.float(), self.zeros.float()
        whole = scales.shape[1] * self.group_size == W.shape[1] or scales.shape[1] == 1
        if whole and not self.has_act_order:
            W.view(*scales.shape, -1).sub_(zeros[:, :, None]).mul_(scales[:, :, None])
        else:
            groups = self.g_idx.long()
            W.sub_(zeros.index_select(1, groups)).mul_(scales.index_select(1, groups))
        return W.to(dtype)
