"""AWQ's gemm layout, 4 bits: vLLM, SGLang, GPTQModel and mlx-lm read it.

qweight  int32 (in, out / 8): eight outputs in a word, in the order 0, 2, 4, 6, 1, 3, 5, 7
qzeros   int32 (groups, out / 8): zero points in the same order, nothing subtracted
scales   float16 (groups, out)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.layout import Shaped
from ..quantized_matrix import QuantizedMatrix
from .target import EXACT, LayerGrid, Target, Verdict, refuse_order_and_short_groups

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PER_WORD = 8


class Awq(Target):
    name = "awq"
    title = "AWQ, gemm (vLLM, SGLang, GPTQModel, mlx-lm)"

    def judge(self, grid: LayerGrid) -> Verdict:
        if grid.bits != 4:
            return Verdict(f"{grid.bits} bits: the format has 4")
        if grid.shape[0] % _PER_WORD:
            return Verdict(f"{grid.shape[0]} outputs are no multiple of {_PER_WORD}")
        if bool(((grid.zeros < 0) | (grid.zeros > 15)).any()):
            return Verdict("zero points are outside 0 … 15")
        refused = refuse_order_and_short_groups(grid)
        if refused or grid.scales.dtype is torch.float16:
            return refused or EXACT
        scales = grid.scales.float()
        change = (scales.half().float() - scales).abs() / scales.abs().clamp(min=1e-30)
        return Verdict(None, 15 * float(change.max()), "scales are rounded to float16")

    def judge_all(self, grids: Iterable[LayerGrid]) -> str | None:
        sizes = {grid.group_size for grid in grids}
        return f"the format has one group size, the layers have {sorted(sizes)}" if len(sizes) > 1 else None

    def planned(self, grid: LayerGrid) -> dict[str, Shaped]:
        out, n = grid.shape
        groups = grid.scales.shape[1]
        return {
            "qweight": torch.empty(n, out // _PER_WORD, dtype=torch.int32, device="meta"),
            "qzeros": torch.empty(groups, out // _PER_WORD, dtype=torch.int32, device="meta"),
            "scales": torch.empty(groups, out, dtype=torch.float16, device="meta"),
        }

    def tensors(self, codes: QuantizedMatrix) -> dict[str, Tensor]:
        return {
            "qweight": _pack(codes.codes.t()),
            "qzeros": _pack(codes.zeros.t()),
            "scales": codes.scales.t().half().contiguous(),
        }

    def config(
        self, config: Mapping[str, Any], grids: Sequence[LayerGrid], plain: Sequence[str]
    ) -> dict[str, Any]:
        quantization = {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": grids[0].group_size,
            "zero_point": True,
            "modules_to_not_convert": list(plain),
        }
        return {**config, "quantization_config": quantization}


def _pack(values: Tensor) -> Tensor:
    """(rows, out) → int32 (rows, out / 8)."""
    words = values.to(torch.int64).reshape(len(values), -1, _PER_WORD)
    packed = torch.zeros(words.shape[:2], dtype=torch.int64)
    for position, output in enumerate(_ORDER):
        packed |= words[..., output] << (4 * position)
    return ((packed + 2**31) % 2**32 - 2**31).to(torch.int32)
