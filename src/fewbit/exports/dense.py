"""Dequantized weights in 16 or 32 bits, for everything that reads no quantized format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.layout import Shaped
from ..quantized_matrix import QuantizedMatrix
from .target import EXACT, LayerGrid, Target, Verdict


class Dense(Target):
    name = "dense"
    title = "weights in 16 bits (everything)"

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def judge(self, grid: LayerGrid) -> Verdict:
        return EXACT  # except for the dtype, which `notes` names

    def planned(self, grid: LayerGrid) -> dict[str, Shaped]:
        return {"weight": torch.empty(grid.shape, dtype=self.dtype, device="meta")}

    def tensors(self, codes: QuantizedMatrix) -> dict[str, Tensor]:
        return {"weight": codes.dequantize(self.dtype)}

    def config(
        self, config: Mapping[str, Any], grids: Sequence[LayerGrid], plain: Sequence[str]
    ) -> dict[str, Any]:
        return dict(config)

    def notes(self, grids: Sequence[LayerGrid]) -> list[str]:
        if self.dtype is torch.float32:
            return []
        name = str(self.dtype).removeprefix("torch.")
        return [f"each weight is rounded to {name}: by at most {torch.finfo(self.dtype).eps / 2:.2%} of it"]
