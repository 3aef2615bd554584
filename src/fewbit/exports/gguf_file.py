"""`export_gguf`: a checkpoint as one GGUF file for llama.cpp and what builds on it (Ollama, LM Studio).

The quantized layers become blocks with the same weights (`gguf_blocks`). Other matrices keep their dtype, vectors
become float32, as llama.cpp expects. Layers and settings are named by the tables of the package gguf. Models whose
tensors llama.cpp only renames are supported; in LLAMA's, the rows of q and k also come in another order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic_io import temporary_path
from ..checkpoint.layout import PARTS, QWEIGHT
from ..checkpoint.reader import Checkpoint
from ..errors import CheckpointError, DependencyError
from .gguf_blocks import TYPES, blocks_of, type_of
from .gguf_vocabulary import add_vocabulary
from .target import LayerGrid

# model_type → architecture of llama.cpp.
ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
_DENSE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def package() -> Any:
    """Import the package gguf.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise DependencyError("GGUF files need the package gguf: pip install gguf") from error
    return gguf


def check_model(checkpoint: Checkpoint) -> str:
    """Return llama.cpp's name of the architecture.

    Raises:
        CheckpointError: the model type or one of its settings is not supported; the message says which.
    """
    config = checkpoint.config
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise CheckpointError(
            f"export to gguf knows the model types {', '.join(ARCHITECTURES)}, and this one is {kind!r}. Export it "
            "with --to dense, then convert that folder with llama.cpp's own script"
        )
    scaling = _rope(config).get("rope_type", "default")
    if scaling not in ("default", "llama3", "linear"):
        raise CheckpointError(f"export to gguf does not know the rope scaling {scaling!r}")
    return ARCHITECTURES[kind]


def write_gguf(checkpoint: Checkpoint, grids: Mapping[str, LayerGrid], output: Path) -> None:
    """Write the file. One tensor is in memory at a time.

    Raises:
        CheckpointError: a tensor has no name in llama.cpp, or the vocabulary is of a kind that is not supported.
    """
    gguf = package()
    arch = check_model(checkpoint)
    kind = gguf.MODEL_ARCH[arch]
    unfinished = temporary_path(output)
    writer = gguf.GGUFWriter(unfinished, gguf.MODEL_ARCH_NAMES[kind])
    try:
        _add_settings(writer, checkpoint, gguf)
        add_vocabulary(writer, checkpoint, gguf)
        tensors = list(_tensors(checkpoint, grids, kind, gguf))
        for name, shape, dtype, _ in tensors:
            raw = gguf.GGMLQuantizationType[dtype]
            nbytes = _nbytes(shape, dtype)
            stored = _stored_shape(shape, dtype)
            writer.add_tensor_info(name, stored, _numpy_dtype(dtype), nbytes, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, _, _, read in tensors:
            writer.write_tensor_data(read().contiguous().view(torch.uint8).numpy().reshape(-1))
        writer.close()
        unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)


Entry = tuple[str, tuple[int, ...], str, Callable[[], Tensor]]


def _tensors(checkpoint: Checkpoint, grids: Mapping[str, LayerGrid], kind: Any, gguf: Any) -> Iterator[Entry]:
    """Yield name, shape (out, in), type, and a function that reads the data, for every tensor of the file."""
    config = checkpoint.config
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    factors = _rope_factors(config)
    if factors is not None:
        yield "rope_freqs.weight", tuple(factors.shape), "F32", lambda: factors
    for name, info in checkpoint.tensors.items():
        layer, _, part = name.rpartition(".")
        order = _row_order(layer, kind, gguf, config)
        if layer not in grids or part not in PARTS:
            dtype = "F32" if len(info.shape) == 1 else _DENSE.get(info.dtype)
            if dtype is None:
                raise CheckpointError(
                    f"tensor {name} is {info.dtype}, which a GGUF file does not hold as it is"
                )
            yield _renamed(names, name), info.shape, dtype, partial(_read_plain, checkpoint, name, order)
        elif part == QWEIGHT:
            blocks = type_of(grids[layer])
            assert blocks is not None
            read = partial(_read_blocks, checkpoint, layer, blocks, order)
            yield _renamed(names, f"{layer}.weight"), grids[layer].shape, blocks, read


def _read_blocks(checkpoint: Checkpoint, layer: str, kind: str, order: Tensor | None) -> Tensor:
    return _ordered(blocks_of(checkpoint.codes(layer), kind), order)


def _read_plain(checkpoint: Checkpoint, name: str, order: Tensor | None) -> Tensor:
    tensor = checkpoint.tensor(name)
    return _ordered(tensor.float() if tensor.ndim == 1 else tensor, order)


def _renamed(names: Any, name: str) -> str:
    found: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise CheckpointError(f"llama.cpp has no name for the tensor {name}")
    return found


def _row_order(layer: str, kind: Any, gguf: Any, config: Mapping[str, Any]) -> Tensor | None:
    """Order of the rows of q and k: llama.cpp pairs neighbors for rotary embeddings, transformers halves of a head."""
    leaf = layer.rpartition(".")[2]
    if kind != gguf.MODEL_ARCH.LLAMA or leaf not in ("q_proj", "k_proj"):
        return None
    heads = config["num_attention_heads"]
    if leaf == "k_proj":
        heads = config.get("num_key_value_heads") or heads
    rows = heads * _head_size(config)
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def _ordered(tensor: Tensor, order: Tensor | None) -> Tensor:
    return tensor if order is None else tensor.index_select(0, order)


def _head_size(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of rotary embeddings, wherever this version of transformers keeps them."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {"rope_theta": config.get("rope_theta", 10000.0), **found}


def _rope_factors(config: Mapping[str, Any]) -> Tensor | None:
    """Divisors of the frequencies with Llama 3.1's scaling (Hugging Face's rope_type llama3); None without it."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    size, factor = _head_size(config), rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    smooth = (original / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    result = torch.where(wavelengths < original / high, 1.0, between)
    return torch.where(wavelengths > original / low, float(factor), result).float()


def _add_settings(writer: Any, checkpoint: Checkpoint, gguf: Any) -> None:
    config, rope = checkpoint.config, _rope(checkpoint.config)
    writer.add_name(str(config.get("_name_or_path") or config["model_type"]).rstrip("/").rpartition("/")[2])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_key_length(_head_size(config))
    writer.add_value_length(_head_size(config))
    writer.add_rope_dimension_count(_head_size(config))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _nbytes(shape: tuple[int, ...], dtype: str) -> int:
    if dtype in TYPES:
        return math.prod(shape) // 32 * TYPES[dtype][2]
    return math.prod(shape) * (4 if dtype == "F32" else 2)


def _stored_shape(shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    """The writer takes the shape in bytes for blocks and for bfloat16, which numpy lacks."""
    if dtype in TYPES:
        return (*shape[:-1], shape[-1] // 32 * TYPES[dtype][2])
    return (*shape[:-1], shape[-1] * 2) if dtype == "BF16" else shape


def _numpy_dtype(dtype: str) -> Any:
    import numpy as np

    return np.dtype({"F32": "float32", "F16": "float16"}.get(dtype, "uint8"))
