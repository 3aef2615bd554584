"""Fewer calls per token in a transformers model on the CPU: merged layers, fused norms and MLPs, fewbit's attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from .. import native
from ..internals import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_attention_forward, uses_sdpa
from ..kernels.cpu.fused_ops import fuse_gated_mlps, fuse_norms
from ..kernels.cpu.kernel import can_bypass_dispatch
from ..kernels.cpu.merged import MergedCpuKernel, merge_layers

ATTENTION = "fewbit"  # the name of the attention in transformers' registry

# Arguments that change what attention computes.
_UNUSUAL = ("position_bias", "softcap", "cache", "s_aux")


def fuse(model: nn.Module) -> dict[str, int]:
    """Merge layers with the same input, and replace norms, gated MLPs and attention where possible.

    Returns:
        Counts of what was done: "calls saved" per token by merging, "norms", "gated MLPs", and "attention" (1 if the
        model uses fewbit's). Only "calls saved": 0 if no layer runs on one of fewbit's own kernels for CPUs.
    """
    found = {"calls saved": merge_layers(model)}
    if any(isinstance(getattr(module, "kernel", None), MergedCpuKernel) for module in model.modules()):
        found["norms"] = fuse_norms(model)
        found["gated MLPs"] = fuse_gated_mlps(model)
        found["attention"] = int(_fuse_attention(model))
    return found


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The function that transformers calls for attention: `native.attention` without a mask, otherwise torch's."""
    if (
        attention_mask is None
        and not dropout
        and not any(kwargs.get(name) is not None for name in _UNUSUAL)
        and can_bypass_dispatch(query, key)
        and can_bypass_dispatch(value, None)
        and _is_supported(query, key, value)
    ):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        # As in transformers: a single token sees all keys; several tokens, with as many keys, see those before them.
        causal = query.shape[2] > 1 and (
            getattr(module, "is_causal", True) if is_causal is None else is_causal
        )
        if not causal or query.shape[2] == key.shape[2]:
            return native.attention(query, key, value, scale, causal=causal), None
    kwargs |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
    result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return result


def _is_supported(query: Tensor, key: Tensor, value: Tensor) -> bool:
    batch, heads, _, size = query.shape
    return (
        key.shape == value.shape
        and key.shape[0] == batch
        and key.shape[3] == size
        and key.shape[2] > 0
        and heads % key.shape[1] == 0
        and query.dtype == key.dtype == value.dtype
        and query.dtype in native.DTYPES
        and all(tensor.is_cpu and tensor.stride(3) == 1 for tensor in (query, key, value))
    )


def _fuse_attention(model: nn.Module) -> bool:
    """Use `attention_forward` if all parts of the model use torch's attention through transformers' interface."""
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not isinstance(model, PreTrainedModel) or not all(map(uses_sdpa, parts)):
        return False
    AttentionInterface.register(ATTENTION, attention_forward)
    AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(ATTENTION)
    return True
