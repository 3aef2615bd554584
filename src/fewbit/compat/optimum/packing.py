"""Tensors for layers that were rounded elsewhere, or that wait for theirs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint import layout
from ...config import LayerSettings
from ...hf.replace import kernel_spec
from ...kernels import registry
from ...modeling.layers import weight_matrix
from ...planning import LayerPlan, Plan, Skipped
from ...quantized_matrix import QuantizedMatrix, group_count, sequential_groups


def packed_tensors(
    layer: nn.Module, parts: Sequence[Any], settings: LayerSettings, fmt: str
) -> dict[str, Tensor]:
    """The checkpoint's tensors of a layer whose weight lies on a grid.

    Args:
        layer: with the rounded weight.
        parts: anything, scales (out, groups), zero points (out, groups), g_idx (in,).
        settings: of the layer. fmt: "gptq" or "gptq_v2".

    Raises:
        CheckpointError: the grid does not fit the settings.
    """
    scales, zeros, g_idx = (torch.as_tensor(part).cpu() for part in parts[1:4])
    groups = g_idx.long()
    weight = weight_matrix(layer).cpu().float()
    codes = weight / scales.float()[:, groups] + zeros.float()[:, groups]
    result = QuantizedMatrix(
        codes.round_().clamp_(0, 2**settings.bits - 1).to(torch.uint8),
        scales.to(torch.float16),
        zeros.round().to(torch.int16),
        g_idx.to(torch.int32),
        settings.bits,
        settings.group_size,
    )
    return layout.pack(layout.without_zero_point_0(result) if fmt == "gptq" else result, fmt)


def empty_tensors(layer: LayerPlan) -> dict[str, Tensor]:
    """Room for the checkpoint's tensors of a layer."""
    out_features, in_features, settings = layer.out_features, layer.in_features, layer.settings
    groups = group_count(in_features, settings.group_size)
    return {
        layout.QWEIGHT: torch.zeros(
            layout.word_count(in_features, settings.bits), out_features, dtype=torch.int32
        ),
        layout.QZEROS: torch.zeros(groups, layout.word_count(out_features, settings.bits), dtype=torch.int32),
        layout.SCALES: torch.zeros(groups, out_features, dtype=torch.float16),
        layout.G_IDX: sequential_groups(in_features, settings.group_size),
    }


def only(plan: Plan, names: Mapping[str, Any]) -> Plan:
    """The part of the plan that is about the layers called `names`."""
    others = [layer for layer in plan.layers if layer.name not in names]
    skipped = [Skipped(o.name, (o.out_features, o.in_features), "was not packed") for o in others]
    layers = tuple(layer for layer in plan.layers if layer.name in names)
    return dataclasses.replace(plan, layers=layers, skipped=(*plan.skipped, *skipped))


def check_kernel(layer: LayerPlan, fmt: str, like: Tensor, kernel: str) -> None:
    """Refuse a kernel that could not run the layer, on the device and in the dtype of `like`.

    Raises:
        KernelError: the message names the condition.
    """
    registry.choose(kernel_spec(layer, fmt), like.device, like.dtype, kernel)
