"""Tiny mixtures of experts whose experts differ and whose routing is uneven.

Routers send most tokens to experts 0 to 3, few to expert 4 and none to expert 5: of v·x, −v·x, u·x and −u·x
two are never negative, so that the score 0 of the last expert is never among the two largest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from models import tiny_model, tiny_tokenizer

EXPERTS, TOP_K, HIDDEN, INNER = 6, 2, 32, 32
UNDER_ROUTED, UNREACHED = 4, 5

_BASE = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": TOP_K,
}
MOE_SHAPES: dict[str, dict[str, Any]] = {
    "mixtral": {**_BASE, "intermediate_size": INNER, "num_local_experts": EXPERTS},
    "qwen3_moe": {
        **_BASE, "intermediate_size": 64, "moe_intermediate_size": INNER, "num_experts": EXPERTS, "head_dim": 8,
    },
    "olmoe": {**_BASE, "intermediate_size": INNER, "num_experts": EXPERTS},
    "deepseek_v3": {
        **_BASE, "num_key_value_heads": 4, "intermediate_size": 64, "moe_intermediate_size": INNER,
        "n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
}  # fmt: skip
OTHER_SHAPES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {
        **_BASE, "intermediate_size": 64, "moe_intermediate_size": INNER, "shared_expert_intermediate_size": INNER,
        "num_experts": EXPERTS,
    },
    "gpt_oss": {**_BASE, "intermediate_size": INNER, "num_local_experts": EXPERTS, "head_dim": 8},
}  # fmt: skip


def tiny_moe(family: str, seed: int = 0, **changes: Any) -> Any:
    """A mixture of experts in float32, in evaluation mode, with transformers' fused experts."""
    shape = {**MOE_SHAPES, **OTHER_SHAPES}[family]
    model = tiny_model(family, seed, **{**shape, **changes})
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3:
            torch.nn.init.normal_(parameter, std=0.8 / parameter.shape[-1] ** 0.5)
        elif parameter.shape == (EXPERTS, HIDDEN) and name.endswith(("gate.weight", "router.weight")):
            v, u, small = torch.randn(3, HIDDEN)
            parameter.data = torch.stack([v, -v, u, -u, 0.04 * small, torch.zeros(HIDDEN)]) / HIDDEN**0.5
    # Correlated inputs, as in trained models: otherwise there is little for GPTQ to gain.
    embedding = model.get_input_embeddings().weight
    embedding.data = (
        torch.randn(len(embedding), HIDDEN) * 0.7 ** torch.arange(HIDDEN) @ torch.randn(HIDDEN, HIDDEN)
    )
    model.set_experts_implementation("eager")
    return model


def save_tiny_moe(folder: Path, family: str, **changes: Any) -> Path:
    """A model folder with its tokenizer, as `save_pretrained` writes it."""
    tiny_moe(family, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
