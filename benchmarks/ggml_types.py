"""Rounding of matrices to ggml's types with its own functions, and the sums of squares that it calls importance matrix.

Needs libggml-base, which `pip install llama-cpp-python` builds, and the package gguf to read the blocks back.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from torch import Tensor, nn


class Ggml:
    """ggml's quantization functions.

    Args:
        folder: folder of libggml-base.so; None for the one in the package llama_cpp.
    """

    def __init__(self, folder: Path | None) -> None:
        from baselines import _library_folder

        library = ctypes.CDLL(str(_library_folder(folder) / "libggml-base.so"))
        self._chunk = library.ggml_quantize_chunk
        self._chunk.restype = ctypes.c_size_t
        self._chunk.argtypes = (
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            *[ctypes.c_int64] * 3,
            ctypes.c_void_p,
        )

    def round_trip(self, W: Tensor, name: str, importance: Tensor | None) -> tuple[Tensor, int]:
        """Quantize W (out, in) to a type, and read it back.

        A block is 256 weights of a row. Where the width is no multiple of it, rows are joined until it fits, so that
        every type has its own size; llama.cpp takes a larger type for such a matrix.

        Args:
            importance: Σ x² of each input (in,); None without.

        Returns:
            The matrix, float32, and the bytes of its blocks.
        """
        kind = GGMLQuantizationType[name]
        block, size = GGML_QUANT_SIZES[kind]
        joined = block // math.gcd(block, W.shape[1])
        rows = np.ascontiguousarray(W.float().numpy()).reshape(-1, joined * W.shape[1])
        out = np.zeros((rows.shape[0], rows.shape[1] // block * size), dtype=np.uint8)
        weights = None if importance is None else np.tile(importance.float().numpy(), joined)
        written = self._chunk(
            int(kind),
            rows.ctypes.data,
            out.ctypes.data,
            0,
            *rows.shape,
            None if weights is None else weights.ctypes.data,
        )
        assert written == out.nbytes
        return torch.from_numpy(quants.dequantize(out, kind).copy()).view_as(W), out.nbytes


def importance_matrix(
    model: nn.Module, layers: Sequence[str], batches: Sequence[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Mean of x² over all tokens, for each input of each layer."""
    sums = {name: torch.zeros(()) for name in layers}

    def hook(name: str) -> Any:
        def add(module: nn.Module, args: Any) -> None:
            sums[name] = sums[name] + args[0].float().square().flatten(0, -2).mean(0)

        return add

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in layers]
    with torch.inference_mode():
        for batch in batches:
            model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: total.clone() for name, total in sums.items()}
