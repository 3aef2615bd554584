"""compressed-tensors, format pack-quantized: vLLM and SGLang read 2, 3, 4 and 8 bits of it, and unequal settings.

That is on GPUs; vLLM on CPUs reads 4 bits only (docs/vllm.md).

A row's codes are a little-endian stream of bits along the inputs, as in GPTQ, cut off after the last word:

    weight_packed      int32 (out, ⌈in · bits / 32⌉)
    weight_scale       (out, groups)
    weight_shape       int64 (2,): out, in
    weight_zero_point  int32 (⌈out · bits / 32⌉, groups), packed along the outputs; asymmetric layers only

Source: compressed_tensors.compressors.pack_quantized, version 0.20.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.layout import Shaped, pack_rows
from ..checkpoint.quantization_config import OUTPUT_EMBEDDINGS
from ..quantized_matrix import QuantizedMatrix
from .target import EXACT, LayerGrid, Target, Verdict, refuse_order_and_short_groups

Scheme = tuple[int, int, bool]  # bits, group size, sym


class CompressedTensors(Target):
    name = "compressed-tensors"
    title = "compressed-tensors, pack-quantized (vLLM, SGLang)"

    def judge(self, grid: LayerGrid) -> Verdict:
        outside = (grid.zeros < 0) | (grid.zeros >= 2**grid.bits)
        if bool(outside.any()):
            return Verdict(f"{int(outside.sum())} zero points are outside 0 … {2**grid.bits - 1}")
        return refuse_order_and_short_groups(grid) or EXACT

    def planned(self, grid: LayerGrid) -> dict[str, Shaped]:
        out, n = grid.shape
        groups = grid.scales.shape[1]
        result: dict[str, Shaped] = {
            "weight_packed": torch.empty(out, _words(n, grid.bits), dtype=torch.int32, device="meta"),
            "weight_scale": torch.empty(out, groups, dtype=grid.scales.dtype, device="meta"),
            "weight_shape": torch.empty(2, dtype=torch.int64, device="meta"),
        }
        if not grid.sym:
            shape = (_words(out, grid.bits), groups)
            result["weight_zero_point"] = torch.empty(shape, dtype=torch.int32, device="meta")
        return result

    def tensors(self, codes: QuantizedMatrix) -> dict[str, Tensor]:
        out, n = codes.shape
        result = {
            "weight_packed": pack_rows(codes.codes, codes.bits)[:, : _words(n, codes.bits)].contiguous(),
            "weight_scale": codes.scales,
            "weight_shape": torch.tensor([out, n]),
        }
        if bool((codes.zeros != 2 ** (codes.bits - 1)).any()):
            packed = pack_rows(codes.zeros.to(torch.uint8).t().contiguous(), codes.bits)
            result["weight_zero_point"] = packed[:, : _words(out, codes.bits)].t().contiguous()
        return result

    def config(
        self, config: Mapping[str, Any], grids: Sequence[LayerGrid], plain: Sequence[str]
    ) -> dict[str, Any]:
        schemes: dict[Scheme, list[str]] = {}
        for grid in grids:
            schemes.setdefault((grid.bits, grid.group_size, grid.sym), []).append(grid.name)
        # Engines differ in whether the name of a layer or of its class comes first: with several schemes, only names.
        groups = {
            f"group_{number}": {
                "targets": ["Linear"] if len(schemes) == 1 else names,
                "weights": _weights(*scheme),
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
            for number, (scheme, names) in enumerate(schemes.items())
        }
        quantization = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(plain),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }
        return {**config, "quantization_config": quantization}

    def notes(self, grids: Sequence[LayerGrid]) -> list[str]:
        found = [
            "vLLM rounds scales to the model's dtype: serve with --dtype float16, which keeps them exact"
        ]
        heads = [grid.name for grid in grids if grid.name.rpartition(".")[2] in OUTPUT_EMBEDDINGS]
        if heads:
            found.append(
                f"vLLM refuses a quantized {heads[0]} in this format: quantize without --lm-head for it"
            )
        return found


def _words(values: int, bits: int) -> int:
    return -(-values * bits // 32)


def _weights(bits: int, group_size: int, sym: bool) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": sym,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "actorder": None,
        "dynamic": False,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
