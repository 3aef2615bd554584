"""Tiny configurations of every architecture of transformers, from its defaults and a few rules.

A rule maps the name of a setting to a small value. What the rules get wrong for one class stands in `OVERRIDES`.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import transformers
from special_settings import OVERRIDES
from transformers import PreTrainedConfig

TASKS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM")
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, LAYERS, VOCAB, EXPERTS = 64, 4, 2, 16, 96, 2, 160, 4

# Setting (full name) → value. A rule applies to whole numbers above it; to others it does not apply.
_RULES: list[tuple[str, int]] = [
    (r"(.*_)?(head_dim|head_size|kv_channels|d_kv|d_head|global_head_dim|attention_head_dim)", HEAD_DIM),
    (r"(qk_nope|qk_rope|v|linear_key|linear_value|mamba|index|linear)_(head_)?dim", HEAD_DIM),
    (r"(.*_)?vocab(ulary)?_size(_per_layer_input)?|.*vocab_size", VOCAB),
    (r"(moe|expert|shared_expert|expert_ffn|moe_latent|ffn_expert)_.*(intermediate|hidden|ffn|inner)_?(size|dim)|"
     r".*expert.*_size", 32),
    (r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|hidden_dim|projection_dim|embedding_size|model_dim|dim_model|"
     r"word_embed_proj_dim|proj_dim|out_hidden_size|projection_hidden_size|output_size|encoder_dim|lru_width|d_inner_gate|"
     r"attention_hidden_size|input_hidden_size|latent_dim|n_embed|embed_size|width|dim|channels)", HIDDEN),
    (r"(.*_)?(intermediate_size|ffn_dim|d_ff|n_inner|ffn_hidden_size|inner_dim|feed_forward_size|ff_dim|mlp_dim|dim_ff|"
     r"d_inner|feedforward_dim|ffn_size|inner_size|intermediate_dim|multi_query_ffn)", INNER),
    (r"(.*_)?(num_hidden_layers|n_layers?|num_layers|depth|num_blocks|encoder_layers|decoder_layers|num_decoder_layers|"
     r"num_encoder_layers|num_attention_layers|n_blocks|layers)", LAYERS),
    (r"(.*_)?(num_key_value_heads|num_kv_heads|n_kv_heads|kv_heads|num_key_heads|linear_num_key_heads)", KV_HEADS),
    (r"(.*_)?(num_attention_heads|n_heads?|num_heads|attention_heads|linear_num_value_heads|linear_num_heads|mamba_n_heads|num_value_heads|"
     r"mamba_num_heads|index_n_heads)", HEADS),
    (r"(q|kv|o)_lora_rank|.*lora_rank|.*low_rank_dim", 32),
    (r"(num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_routed_experts|n_experts|"
     r"num_moe_experts)", EXPERTS),
    (r"(.*_)?(experts_per_tok(en)?|top_k|moe_topk|moe_k|num_selected_experts|experts_top_k|moe_router_topk|topk)", 2),
    (r"n_group|n_groups|topk_group|num_expert_groups?|mamba_n_groups", 1),
    (r"(n|num)_shared_experts|moe_num_shared_experts", 1),
    (r"max_position_embeddings|n_positions|max_source_positions|max_target_positions|n_ctx|seq_length|max_seq_len|"
     r"max_sequence_length|original_max_position_embeddings|position_embedding_size|max_length", 128),
    (r"(.*_)?(state_size|mamba_d_state|ssm_state_size|d_state)", 16),
    (r"(sliding|attention|local)_(window|chunk_size)|window_size|attention_window_size|chunk_size|"
     r"mamba_chunk_size", 16),
    (r"(.*_)?image_size|input_size|crop_size", 32),
    (r"(.*_)?num_mel_bins|n_mels|num_mels|input_feat_per_channel", 16),
    (r"first_k_dense_replace|num_dense_layers|first_dense_layers|moe_layer_start_index|first_num_dense_layers", 1),
    (r"num_nextn_predict_layers|mtp_num_hidden_layers|num_mtp_layers", 0),
    (r"time_step_rank|num_query_tokens|num_queries|n_query|num_latents|max_2d_position_embeddings", 8),
    (r"index_topk", 8),
]  # fmt: skip
_TOKEN = re.compile(r".*(token_id|token_index|_id|token_ids)$")
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def tiny_config(cls: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A small configuration of the class; every part of it is small too."""
    return cls(**_settings(cls()))


def _settings(default: PreTrainedConfig) -> dict[str, Any]:
    """The settings of `default` that have to change."""
    names = [field.name for field in dataclasses.fields(default)] if dataclasses.is_dataclass(default) else []
    settings: dict[str, Any] = {}
    for name in dict.fromkeys([*names, *default.attribute_map.values()]):
        value = _value(default, name)
        if isinstance(value, PreTrainedConfig):
            settings[name] = {"model_type": value.model_type, **_settings(value)}
        else:
            small = _small(name, value)
            if small is not None:
                settings[name] = small
    settings |= _dependent(default, settings)
    settings |= OVERRIDES.get(default.model_type, {})
    return {name: value for name, value in settings.items() if value is not ...}


def _value(default: PreTrainedConfig, name: str) -> Any:
    try:
        return getattr(default, name, None)
    except Exception:  # noqa: BLE001 - a setting that differs between layers
        found = [field.default for field in dataclasses.fields(default) if field.name == name]
        return found[0] if found else None


def _dependent(default: PreTrainedConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that have to agree with others: one layer of each type, rotary sections, heads of latent attention."""
    result: dict[str, Any] = {}
    head_dim = settings.get("head_dim", 0)
    if not head_dim and "num_attention_heads" in settings and _value(default, "head_dim") is None:
        head_dim = HIDDEN // HEADS
        if hasattr(type(default), "head_dim"):
            result["head_dim"] = head_dim
    if settings.get("kv_lora_rank") and "num_key_value_heads" in settings:
        result["num_key_value_heads"] = settings["num_attention_heads"]
    types = getattr(default, "layer_types", None)
    field = default.attribute_map.get("layer_types", "layer_types")
    if isinstance(types, (list, tuple)) and len(set(types)) > 1 and field in _field_names(default):
        distinct = list(dict.fromkeys(reversed(types)))[::-1]
        result |= {field: distinct, "num_hidden_layers": len(distinct)}
    rope = getattr(default, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:
        half = int((head_dim or HEAD_DIM) * (rope.get("partial_rotary_factor") or 1)) // 2
        third = half // 3
        result["rope_parameters"] = {**rope, "mrope_section": [half - 2 * third, third, third]}
    return result


def _field_names(default: PreTrainedConfig) -> set[str]:
    return (
        {field.name for field in dataclasses.fields(default)} if dataclasses.is_dataclass(default) else set()
    )


def _small(name: str, value: object) -> Any:
    if _TOKEN.fullmatch(name):
        if name in _SPECIAL:
            return _SPECIAL[name] if value is not None or name == "pad_token_id" else None
        if isinstance(value, int) and not isinstance(value, bool) and value >= VOCAB - 20:
            return VOCAB - 20 + sum(map(ord, name)) % 20
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    for pattern, small in _RULES:
        if re.fullmatch(pattern, name):
            return min(value, small)
    return None


def model_pairs() -> list[tuple[str, str]]:
    """(task, model_type) of every architecture that is judged."""
    from transformers.models.auto import modeling_auto

    chosen: dict[
        str, tuple[str, str]
    ] = {}  # class → pair; the first task and the class's own model_type count
    for task in TASKS:
        mapping = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
        own: dict[str, list[str]] = {}
        for model_type, names in mapping.items():
            own.setdefault(names if isinstance(names, str) else names[0], []).append(model_type)
        for class_name, types in own.items():
            best = min(types, key=lambda name: _distance(name, class_name))
            chosen.setdefault(class_name, (task, best))
    return list(chosen.values())


def _distance(model_type: str, class_name: str) -> tuple[bool, bool]:
    """How badly a model_type fits a class that several share: `llama`, not `exaone`; `qwen3_5_text`, not `qwen3_5`."""
    stem = re.sub(r"_text$", "", model_type).replace("_", "").replace("-", "")
    return not class_name.lower().replace("_", "").startswith(stem), not model_type.endswith("_text")


def classes(task: str, model_type: str) -> tuple[type[PreTrainedConfig], Any]:
    """The configuration class and the model class of a pair."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    name = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")[model_type]
    cls = getattr(transformers, name if isinstance(name, str) else name[0])
    return cls.config_class or CONFIG_MAPPING[model_type], cls
