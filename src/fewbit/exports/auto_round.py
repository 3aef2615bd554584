"""auto-round's configuration over GPTQ's own tensors: engines read bits and groups per layer from it.

The tensors stay as they are. Symmetric layers only: engines use zero points as they are stored, so the asymmetric
ones of format v1 would be off by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..checkpoint import layout
from ..checkpoint.layout import Shaped
from ..checkpoint.quantization_config import OUTPUT_EMBEDDINGS
from ..quantized_matrix import QuantizedMatrix
from .target import EXACT, LayerGrid, Target, Verdict, most_common, refuse_order_and_short_groups


class AutoRound(Target):
    name = "auto-round"
    title = "auto-round over GPTQ's tensors (vLLM, SGLang)"

    def judge(self, grid: LayerGrid) -> Verdict:
        if not grid.sym:
            return Verdict("an asymmetric grid, whose zero points engines would misread")
        return refuse_order_and_short_groups(grid) or EXACT

    def planned(self, grid: LayerGrid) -> dict[str, Shaped]:
        packed = layout.empty_layer(grid.bits, grid.group_size, grid.shape[1], grid.shape[0])
        scales = grid.scales.t().to("meta")
        return {**packed, layout.SCALES: scales}

    def tensors(self, codes: QuantizedMatrix) -> dict[str, Tensor]:
        return layout.pack(codes, "gptq")

    def config(
        self, config: Mapping[str, Any], grids: Sequence[LayerGrid], plain: Sequence[str]
    ) -> dict[str, Any]:
        kinds = {grid.name: (grid.group_size, grid.bits) for grid in grids}
        usual = most_common(list(kinds.values()))
        extra: dict[str, Any] = {
            name: {"bits": bits, "group_size": group_size, "sym": True}
            for name, (group_size, bits) in kinds.items()
            if (group_size, bits) != usual
            or name.rpartition(".")[2] in OUTPUT_EMBEDDINGS  # only if it is named
        }
        extra |= {name: {"bits": 16, "data_type": "float"} for name in plain}
        quantization = {
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq",
            "bits": usual[1],
            "group_size": usual[0],
            "sym": True,
            "data_type": "int",
            "extra_config": extra,
        }
        return {**config, "quantization_config": quantization}
