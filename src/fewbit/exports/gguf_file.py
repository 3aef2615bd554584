"""`write_gguf`: a checkpoint as one GGUF file for llama.cpp and what builds on it (Ollama, LM Studio).

The quantized layers become blocks with the same weights (`gguf_blocks`). Other matrices keep their dtype or get the
one that is asked for, vectors become float32, as llama.cpp expects. Tensors are named by the tables of the package
gguf; `gguf_models` says what differs between types of models.
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
from .gguf_blocks import BLOCK, TYPES, blocks_of, type_of
from .gguf_models import ModelKind, add_settings, kind_of, rope_factors, row_order
from .gguf_vocabulary import add_vocabulary
from .target import LayerGrid

_DENSE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
Q8_0 = "q8_0"


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


def write_gguf(
    checkpoint: Checkpoint,
    grids: Mapping[str, LayerGrid],
    output: Path,
    plain: torch.dtype | str | None = None,
) -> list[str]:
    """Write the file. One tensor is in memory at a time.

    Args:
        checkpoint: the source.
        grids: its quantized layers.
        output: the file.
        plain: dtype of matrices that are not quantized, or "q8_0"; None keeps theirs.

    Returns:
        Sentences for the user.

    Raises:
        CheckpointError: a tensor has no name in llama.cpp, or the vocabulary is of a kind that is not supported.
    """
    gguf = package()
    kind = kind_of(checkpoint.config)
    arch = gguf.MODEL_ARCH[kind.arch]
    unfinished = temporary_path(output)
    writer = gguf.GGUFWriter(unfinished, gguf.MODEL_ARCH_NAMES[arch])
    try:
        notes = add_settings(writer, checkpoint.config, kind, gguf)
        add_vocabulary(writer, checkpoint.path, checkpoint.config["vocab_size"], gguf)
        names = gguf.get_tensor_name_map(arch, checkpoint.config["num_hidden_layers"])
        tensors = list(_tensors(checkpoint, grids, kind, names, plain))
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
    return notes


Entry = tuple[str, tuple[int, ...], str, Callable[[], Tensor]]


def _tensors(
    checkpoint: Checkpoint,
    grids: Mapping[str, LayerGrid],
    kind: ModelKind,
    names: Any,
    plain: torch.dtype | str | None,
) -> Iterator[Entry]:
    """Yield name, shape (out, in), type, and a function that reads the data, for every tensor of the file."""
    config = checkpoint.config
    factors = rope_factors(config)
    if factors is not None:
        yield "rope_freqs.weight", tuple(factors.shape), "F32", lambda: factors
    for name, info in checkpoint.tensors.items():
        layer, _, part = name.rpartition(".")
        order = row_order(layer, kind, config)
        if layer not in grids or part not in PARTS:
            dtype = _plain_type(name, info, plain)
            offset = kind.norm_offset if layer.endswith("norm") else 0.0
            read = partial(_read_plain, checkpoint, name, dtype, order, offset)
            yield _renamed(names, name), info.shape, dtype, read
        elif part == QWEIGHT:
            blocks = type_of(grids[layer])
            assert blocks is not None
            read = partial(_read_blocks, checkpoint, layer, blocks, order)
            yield _renamed(names, f"{layer}.weight"), grids[layer].shape, blocks, read


def _plain_type(name: str, info: Any, plain: torch.dtype | str | None) -> str:
    """Type of a tensor that is not quantized."""
    if len(info.shape) == 1:
        return "F32"
    if plain == Q8_0:
        if info.shape[-1] % BLOCK:
            raise CheckpointError(
                f"{name} has {info.shape[-1]} columns, which blocks of {BLOCK} do not divide"
            )
        return "Q8_0"
    dtype = plain if isinstance(plain, torch.dtype) else info.dtype
    if dtype not in _DENSE:
        raise CheckpointError(f"tensor {name} is {dtype}, which a GGUF file does not hold as it is")
    return _DENSE[dtype]


def _read_blocks(checkpoint: Checkpoint, layer: str, kind: str, order: Tensor | None) -> Tensor:
    return _ordered(blocks_of(checkpoint.codes(layer), kind), order)


def _read_plain(checkpoint: Checkpoint, name: str, dtype: str, order: Tensor | None, offset: float) -> Tensor:
    tensor = _ordered(checkpoint.tensor(name), order)
    if dtype == "Q8_0":
        gguf = package()
        return torch.from_numpy(gguf.quants.quantize(tensor.float().numpy(), gguf.GGMLQuantizationType.Q8_0))
    wanted = next(one for one, known in _DENSE.items() if known == dtype)
    return (tensor.float() + offset if offset else tensor).to(wanted)


def _renamed(names: Any, name: str) -> str:
    found: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise CheckpointError(f"llama.cpp has no name for the tensor {name}")
    return found


def _ordered(tensor: Tensor, order: Tensor | None) -> Tensor:
    return tensor if order is None else tensor.index_select(0, order)


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
