"""What llama.cpp expects of each type of model: its name there, its settings, and the tensors that it stores otherwise.

Two differences occur. llama.cpp pairs neighboring rows of q and k for rotary embeddings where transformers pairs the
halves of a head (`row_order`), and it stores the norms of Gemma with the 1 that transformers adds (`norm_offset`).
Every type in `KINDS` was compared with llama.cpp itself (tests/engines/test_llama_cpp.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError


@dataclass(frozen=True)
class ModelKind:
    """One type of model.

    Attributes:
        arch: name of the architecture in the package gguf.
        activations: values of ``hidden_act`` that llama.cpp computes.
        permuted: whether rows of q and k are stored in another order.
        norm_offset: number that is added to the weights of norms.
        period: every so manieth layer attends to all tokens, the others to a window; 0 for no windows.
    """

    arch: str
    activations: tuple[str, ...] = ("silu",)
    permuted: bool = False
    norm_offset: float = 0.0
    period: int = 0


_GELU = ("gelu_pytorch_tanh",)
KINDS = {
    "llama": ModelKind("LLAMA", permuted=True),
    "mistral": ModelKind("LLAMA", permuted=True),
    "qwen2": ModelKind("QWEN2"),
    "qwen3": ModelKind("QWEN3"),
    "gemma2": ModelKind("GEMMA2", _GELU, norm_offset=1.0, period=2),
    "gemma3_text": ModelKind("GEMMA3", _GELU, norm_offset=1.0, period=6),
    "phi3": ModelKind("PHI3"),
    "olmo2": ModelKind("OLMO2"),
    "granite": ModelKind("GRANITE", permuted=True),
    "smollm3": ModelKind("SMOLLM3", permuted=True),
}
_ELSEWHERE = "Export it with --to dense, then convert that folder with llama.cpp's own script"


def kind_of(config: Mapping[str, Any]) -> ModelKind:
    """Return the kind of a model.

    Args:
        config: content of its config.json.

    Raises:
        CheckpointError: the model type or one of its settings is not supported; the message says which.
    """
    name = config.get("model_type")
    if name not in KINDS:
        raise CheckpointError(
            f"export to gguf knows the model types {', '.join(KINDS)}, and this one is {name!r}. {_ELSEWHERE}"
        )
    kind = KINDS[name]
    problem = next(filter(None, _problems(config, kind)), None)
    if problem is not None:
        raise CheckpointError(
            f"export to gguf does not know {problem} in a model of type {name}. {_ELSEWHERE}"
        )
    return kind


def _problems(config: Mapping[str, Any], kind: ModelKind) -> list[str | None]:
    """What llama.cpp would compute otherwise, in words."""
    rope, layers = rope_of(config), config["num_hidden_layers"]
    scaling, act = (
        rope.get("rope_type", "default"),
        config.get("hidden_act") or config.get("hidden_activation"),
    )
    act = act or kind.activations[0]
    windows = [(i + 1) % kind.period != 0 for i in range(layers)] if kind.period else None
    types = [one == "sliding_attention" for one in config.get("layer_types") or ()]
    scale = config.get("query_pre_attn_scalar")
    rotated = config.get("no_rope_layers") or [int((i + 1) % 4 != 0) for i in range(layers)]
    return [
        None if scaling in ("default", "llama3", "linear") else f"the rope scaling {scaling!r}",
        None if act in kind.activations else f"the activation {act!r}",
        None
        if rope.get("partial_rotary_factor", 1) == 1 or kind.arch == "PHI3"
        else "partial rotary embeddings",
        None if windows is None or not types or types == windows else "this pattern of attention windows",
        # llama.cpp takes the size of a head; Gemma's 27B models, whose scale is another one, are told by their depth.
        None if scale in (None, head_size(config)) else f"query_pre_attn_scalar {scale}",
        None
        if kind.arch != "SMOLLM3" or rotated == [int((i + 1) % 4 != 0) for i in range(layers)]
        else "this pattern of layers without rotary embeddings",
        None if not config.get("clip_qkv") else "clip_qkv",
    ]


def row_order(layer: str, kind: ModelKind, config: Mapping[str, Any]) -> Tensor | None:
    """Return llama.cpp's order of the rows of a layer; None if it is transformers' own."""
    leaf = layer.rpartition(".")[2]
    if not kind.permuted or leaf not in ("q_proj", "k_proj"):
        return None
    heads = config["num_attention_heads"]
    if leaf == "k_proj":
        heads = config.get("num_key_value_heads") or heads
    rows = heads * head_size(config)
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def head_size(config: Mapping[str, Any]) -> int:
    """Return the width of a head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope_of(config: Mapping[str, Any], layers: str = "full_attention") -> dict[str, Any]:
    """Return the settings of rotary embeddings, wherever this version of transformers keeps them.

    Args:
        config: content of config.json.
        layers: "full_attention" or "sliding_attention", for models whose layers differ.
    """
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = config.get("rope_theta", 10000.0)
    if layers != "full_attention":
        theta = config.get("rope_local_base_freq", theta)
    return {"rope_theta": theta, **found.get(layers, found)}


def rope_factors(config: Mapping[str, Any]) -> Tensor | None:
    """Divisors of the frequencies with Llama 3.1's scaling (Hugging Face's rope_type llama3); None without it."""
    rope = rope_of(config)
    if rope.get("rope_type") != "llama3":
        return None
    size, factor = head_size(config), rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    smooth = (original / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    result = torch.where(wavelengths < original / high, 1.0, between)
    return torch.where(wavelengths > original / low, float(factor), result).float()


def window_of(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens a layer with windows attends to; None where all layers attend to all tokens."""
    types = config.get("layer_types")
    used = config.get("use_sliding_window", config["model_type"] not in ("qwen2", "qwen3", "smollm3"))
    if not used or (types and "sliding_attention" not in types):
        return None
    return config.get("sliding_window")


def add_settings(writer: Any, config: Mapping[str, Any], kind: ModelKind, gguf: Any) -> list[str]:
    """Write the settings of a model. Returns sentences for the user."""
    rope, window, notes = rope_of(config), window_of(config), []
    context = config["max_position_embeddings"]
    if window and not kind.period and window < context:  # llama.cpp has no windows for this architecture
        notes.append(f"context limited to {window} of {context} tokens: llama.cpp ignores the model's window")
        context = window
    writer.add_name(str(config.get("_name_or_path") or config["model_type"]).rstrip("/").rpartition("/")[2])
    writer.add_context_length(context)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_rope_dimension_count(int(head_size(config) * rope.get("partial_rotary_factor", 1)))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind.period and window:
        writer.add_sliding_window(window)
        writer.add_rope_freq_base_swa(float(rope_of(config, "sliding_attention")["rope_theta"]))
    _add_numbers(writer, config)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return notes


def _add_numbers(writer: Any, config: Mapping[str, Any]) -> None:
    """Write the numbers that only some models have."""
    for key, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
        ("attention_multiplier", writer.add_attention_scale),
        ("embedding_multiplier", writer.add_embedding_scale),
        ("residual_multiplier", writer.add_residual_scale),
        ("logits_scaling", writer.add_logit_scale),
    ):
        if config.get(key):
            add(float(config[key]))
