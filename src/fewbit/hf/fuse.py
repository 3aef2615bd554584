"""What makes a loaded model fast on the CPU without changing what it is: fewer calls per token, an 8-bit output layer.

`load` and `register` do this by default. Names, parameters and saved checkpoints stay the same. Every replacement was
first compared with the model's own code, which still runs with gradients, hooks, a compiler, or on another device.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from .. import native
from ..kernels.cpu.fused_ops import fuse_gated_mlps, fuse_norms
from ..kernels.cpu.kernel import Cpu, Cpu16, CpuInt8, can_bypass_dispatch
from ..kernels.cpu.lm_head import add_int8_lm_head, reason_against_int8
from ..kernels.cpu.merged import MergedCpuKernel, merge_layers
from ..transformers_internals import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    restore_attention_after,
    sdpa_attention_forward,
    set_attention,
    uses_attention,
)

_LOG = logging.getLogger("fewbit")

FAST_KERNELS = ("auto", "auto_a16", Cpu.name, Cpu16.name, CpuInt8.name)
# These round no activations, so the output layer is not rounded for them.
EXACT_KERNELS = ("auto_a16", Cpu16.name)
AUTO = "auto"

# Names of the attention in transformers' registry. transformers packs requests of unequal length without a mask for
# functions that have "flash" in their name.
ATTENTION, PACKED_ATTENTION = "fewbit", "fewbit_flash"

# Arguments that change what attention computes.
_UNUSUAL = ("position_bias", "softcap", "cache", "s_aux")


def make_fast(model: nn.Module, kernel: str, *, fuse: bool = True, lm_head: int | str | None = AUTO) -> None:
    """Apply what `fewbit.load` describes as `fuse` and `lm_head_runtime`, and log what was done and why not.

    Args:
        model: a loaded model.
        kernel: the name of the kernel that was asked for.
        fuse: make fewer calls per token.
        lm_head: bits of the output layer while running: 8, 16 or None (as it is), or "auto".

    Raises:
        ConfigError: the output layer cannot run in the bits that were asked for.
    """
    if fuse and kernel in FAST_KERNELS:
        found = merge_and_fuse(model)
        _LOG.info("fused: %s", ", ".join(f"{count} {what}" for what, count in found.items()))
    if lm_head == AUTO:
        exact = kernel not in FAST_KERNELS or kernel in EXACT_KERNELS
        reason = f"kernel {kernel} rounds nothing" if exact else reason_against_int8(model)
        _LOG.info("output layer: %s", f"as it is, {reason}" if reason else "8 bits while running")
        lm_head = 16 if reason else 8
    if lm_head not in (16, None):
        add_int8_lm_head(model, lm_head)


def merge_and_fuse(model: nn.Module) -> dict[str, int]:
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
        # With AMX torch's attention is 2 to 3 times as fast for prompts (benchmarks/attention_cpu.py).
        and not (query.shape[2] > 1 and query.dtype == torch.bfloat16 and native.has_amx())
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


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The same for continuous batching: the queries of all requests follow each other, and so do the keys.

    torch's attention would let every query see the keys of all requests, through a mask. Calls from elsewhere, while
    batches run, have a mask of padding or none.
    """
    kwargs |= {"dropout": dropout, "scaling": scaling, "is_causal": True}
    if "cu_seq_lens_q" not in kwargs:
        if attention_mask is not None:
            attention_mask = attention_mask[:, None, None].bool() & _causal(query.shape[2], key.shape[2])
        return attention_forward(module, query, key, value, attention_mask, **kwargs)
    queries, keys = kwargs.pop("cu_seq_lens_q").tolist(), kwargs.pop("cu_seq_lens_k").tolist()
    parts = []
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(queries), itertools.pairwise(keys), strict=True):
        count, length = q1 - q0, k1 - k0
        # The last token sees all; other parts of a prompt see what was read before them.
        mask = None if count in (1, length) else _causal(count, length)
        request = query[:, :, q0:q1], key[:, :, k0:k1], value[:, :, k0:k1], mask
        parts.append(attention_forward(module, *request, **kwargs)[0])
    return torch.cat(parts, dim=1), None


def _causal(queries: int, keys: int) -> Tensor:
    """True where a query sees a key; the last query sees all."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


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


@contextmanager
def fast_attention(model: nn.Module) -> Iterator[None]:
    """Use `attention_forward` while entered, where the model can."""
    replaced = native.available() and _replace_attention(model)
    try:
        yield
    finally:
        if replaced:
            cast(PreTrainedModel, model).set_attn_implementation("sdpa")


def _fuse_attention(model: nn.Module) -> bool:
    if not _replace_attention(model):
        return False
    if hasattr(model, "init_continuous_batching"):
        instance: Any = model
        instance.init_continuous_batching = _ContinuousBatching(instance)
    return True


def _replace_attention(model: nn.Module) -> bool:
    """Use `attention_forward` if all parts of the model use torch's attention through transformers' interface."""
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not isinstance(model, PreTrainedModel) or not all(uses_attention(part, "sdpa") for part in parts):
        return False
    AttentionInterface.register(ATTENTION, attention_forward)
    AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)
    AttentionMaskInterface.register(PACKED_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    model.set_attn_implementation(ATTENTION)
    return True


class _ContinuousBatching:
    """`init_continuous_batching` of a model: it checks the name of the attention, and batches have another form."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        fused = uses_attention(self._model, ATTENTION)
        if fused:
            sliding = getattr(self._model.config.get_text_config(), "sliding_window", None)
            set_attention(self._model, "sdpa" if sliding else PACKED_ATTENTION)
        manager = type(self._model).init_continuous_batching(self._model, *args, **kwargs)
        if fused:
            restore_attention_after(manager, ATTENTION)
        return manager
