"""MLX's affine quantization, 2, 3, 4 and 8 bits: mlx-lm reads it on Apple silicon.

weight  uint32 (out, in · bits / 32): the stream of bits of GPTQ, along the inputs
scales  (out, groups)
biases  (out, groups): w = scale · q + bias, so bias = −scale · zero
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.layout import Shaped, pack_rows
from ..quantized_matrix import QuantizedMatrix
from .target import LayerGrid, Target, Verdict, most_common, refuse_order_and_short_groups

_GROUP_SIZES = (128, 64, 32)  # that MLX has kernels for


class Mlx(Target):
    name = "mlx"
    title = "MLX, affine (mlx-lm, LM Studio)"
    metadata = "mlx"

    def judge(self, grid: LayerGrid) -> Verdict:
        if grid.shape[1] % 32:
            return Verdict(f"{grid.shape[1]} inputs are no multiple of 32")
        refused = refuse_order_and_short_groups(grid)
        if refused or _group_size(grid.shape[1], grid.group_size) is None:
            return refused or Verdict(f"groups of {grid.group_size}: MLX has {sorted(_GROUP_SIZES)}")
        exact = -grid.scales.double() * grid.zeros.double()
        change = (exact - _biases(grid.scales, grid.zeros).double()).abs() / grid.scales.double().abs()
        error = float(change.nan_to_num(0.0).max())
        return Verdict(None, error, "−scale · zero is rounded to the scales' dtype" if error else "")

    def planned(self, grid: LayerGrid) -> dict[str, Shaped]:
        out, n = grid.shape
        groups = n // (_group_size(n, grid.group_size) or 1)
        scales = torch.empty(out, groups, dtype=grid.scales.dtype, device="meta")
        words = torch.empty(out, n * grid.bits // 32, dtype=torch.uint32, device="meta")
        return {"weight": words, "scales": scales, "biases": scales}

    def tensors(self, codes: QuantizedMatrix) -> dict[str, Tensor]:
        n = codes.shape[1]
        groups = n // (_group_size(n, codes.group_size) or 1)
        repeats = groups // codes.scales.shape[1]
        scales, biases = (
            part.repeat_interleave(repeats, dim=1)
            for part in (codes.scales, _biases(codes.scales, codes.zeros))
        )
        return {
            "weight": pack_rows(codes.codes, codes.bits).view(torch.uint32),
            "scales": scales,
            "biases": biases,
        }

    def config(
        self, config: Mapping[str, Any], grids: Sequence[LayerGrid], plain: Sequence[str]
    ) -> dict[str, Any]:
        kinds = {grid.name: (_group_size(grid.shape[1], grid.group_size) or 0, grid.bits) for grid in grids}
        usual = most_common(list(kinds.values()))
        quantization: dict[str, Any] = {"group_size": usual[0], "bits": usual[1], "mode": "affine"}
        for name, (group_size, bits) in kinds.items():
            if (group_size, bits) != usual:
                quantization[name] = {"group_size": group_size, "bits": bits}
        return {**config, "quantization": quantization, "quantization_config": quantization}


def _group_size(inputs: int, group_size: int) -> int | None:
    """The group size of MLX that holds these groups, repeated where they are larger; None if there is none."""
    whole = inputs if group_size == -1 else group_size
    return next((size for size in _GROUP_SIZES if whole % size == 0), None)


def _biases(scales: Tensor, zeros: Tensor) -> Tensor:
    return (-scales.float() * zeros.float()).to(scales.dtype)
