"""Small checkpoints: fewbit's own, and others in the style of the older tools, packed by their own code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from fewbit.checkpoint.layout import pack
from fewbit.checkpoint.quantization_config import build
from fewbit.checkpoint.writer import CheckpointWriter
from fewbit.config import QuantConfig
from fewbit.quantized_matrix import QuantizedMatrix, group_count, sequential_groups

LAYERS = {"model.layers.0.self_attn.q_proj": (32, 64), "model.layers.1.mlp.down_proj": (64, 96)}
# Two layers are no model that transformers knows.
CONFIG = {"model_type": "sample", "architectures": ["SampleForCausalLM"], "torch_dtype": "float16"}


def random_codes(
    out: int, n: int, bits: int = 4, group_size: int = 32, low: int = 1, seed: int = 0
) -> QuantizedMatrix:
    generator = torch.Generator().manual_seed(seed)
    groups = group_count(n, group_size)
    return QuantizedMatrix(
        codes=torch.randint(0, 2**bits, (out, n), dtype=torch.uint8, generator=generator),
        scales=torch.rand(out, groups, generator=generator).add(0.01).half(),
        zeros=torch.randint(low, 2**bits, (out, groups), dtype=torch.int16, generator=generator),
        g_idx=sequential_groups(n, group_size),
        bits=bits,
        group_size=group_size,
    )


def write_fewbit(
    folder: Path, config: QuantConfig | None = None, max_shard_size: int | str = "5GB"
) -> dict[str, QuantizedMatrix]:
    """A finished fewbit checkpoint of two layers; returns its codes."""
    config = config or QuantConfig(bits=4, group_size=32, sym=False)
    written = {}
    tensors = {"model.embed_tokens.weight": torch.randn(10, 64).bfloat16()}
    for seed, (name, (out, n)) in enumerate(LAYERS.items()):
        codes = random_codes(out, n, config.bits, config.group_size, seed=seed)
        if config.sym:
            codes.zeros.fill_(2 ** (config.bits - 1))
        written[name] = codes
        tensors |= {f"{name}.{part}": tensor for part, tensor in pack(codes, config.format).items()}
        tensors[f"{name}.bias"] = torch.zeros(out, dtype=torch.float16)
    with CheckpointWriter(folder, tensors, max_shard_size) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        quantization = build(
            config, dict.fromkeys(LAYERS, config.defaults), ["lm_head"], {"calibration": "none"}
        )
        writer.finish(CONFIG, quantization, {"tokenizer.json": b"{}", "README.md": b"card\n"})
    return written


def write_base(folder: Path, written: dict[str, QuantizedMatrix]) -> None:
    """A float model whose rounded weights are exactly the checkpoint."""
    folder.mkdir()
    tensors = {f"{name}.weight": codes.dequantize() for name, codes in written.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def autogptq_pack(codes: QuantizedMatrix, style: str = "autogptq") -> dict[str, Tensor]:
    """2, 4 and 8 bits in format v1, word by word, as the older writers do it.

    style "autogptq": zero − 1 as unsigned 32 bits, or-ed in, so that −1 sets all fields above;
    style "gptqmodel": zeros packed, then one taken off every field of the whole word at once.
    """
    per = 32 // codes.bits
    q = codes.codes.t().numpy().astype(np.uint32)
    qweight = np.zeros((q.shape[0] // per, q.shape[1]), np.uint32)
    for row in range(qweight.shape[0]):
        for j in range(per):
            qweight[row] |= q[row * per + j] << np.uint32(codes.bits * j)
    z = codes.zeros.t().numpy().astype(np.int64) - (1 if style == "autogptq" else 0)
    z = (z % 2**32).astype(np.uint32)
    qzeros = np.zeros((z.shape[0], z.shape[1] // per), np.uint32)
    for column in range(qzeros.shape[1]):
        for j in range(per):
            qzeros[:, column] |= z[:, column * per + j] << np.uint32(codes.bits * j)
    if style == "gptqmodel":
        ones = np.uint64(sum(1 << codes.bits * j for j in range(per)))
        qzeros = ((qzeros.astype(np.uint64) + np.uint64(2**32) - ones) % np.uint64(2**32)).astype(np.uint32)
    return {
        "qweight": torch.from_numpy(qweight.view(np.int32)),
        "qzeros": torch.from_numpy(qzeros.view(np.int32)),
        "scales": codes.scales.t().contiguous(),
        "g_idx": codes.g_idx.clone(),
    }


def autogptq_tensors(written: dict[str, QuantizedMatrix], style: str = "autogptq") -> dict[str, Tensor]:
    return {
        f"{name}.{part}": tensor
        for name, codes in written.items()
        for part, tensor in autogptq_pack(codes, style).items()
    }


def write_autogptq(
    folder: Path, tensors: dict[str, Tensor], quantize_config: dict[str, Any] | None = None
) -> None:
    """A folder as AutoGPTQ left it: no quantization_config in config.json, its own file names."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    values = {
        "bits": 4,
        "group_size": 32,
        "damp_percent": 0.01,
        "desc_act": False,
        "sym": False,
        "true_sequential": True,
        "model_name_or_path": "/home/somebody/model",
        "model_file_base_name": "gptq_model-4bit-32g",
    }
    (folder / "quantize_config.json").write_text(json.dumps(values | (quantize_config or {})))
    save_file(tensors, folder / "gptq_model-4bit-32g.safetensors", metadata={"format": "pt"})


def rewrite(folder: Path, change: Any) -> None:
    """Change the tensors of a one-file checkpoint in place (and drop the manifest, as another tool would)."""
    from safetensors.torch import load_file

    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / "fewbit_manifest.json").unlink(missing_ok=True)


def edit_json(path: Path, change: Any) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    (path.parent / "fewbit_manifest.json").unlink(missing_ok=True)
