"""What a fused model does between its products, each in one call of the compiled module: norms, gated MLPs, and
attention.

A model's own code takes a dozen operations for them, which for one token is mostly the way into the operators. It is
replaced only where the replacement gave the same numbers on random inputs (`fuse_steps` tries), up to their rounding.
It still runs where somebody watches: a compiler, a tracer, gradients, hooks on a layer that would be left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from ... import native
from ..linear import QuantLinear
from .kernel import can_bypass_dispatch
from .layout import NUMBERS

ATTENTION = "fewbit"  # what transformers calls it

# Layers of a gated MLP: those whose outputs lie one after the other, then the one that takes the product.
GATED = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("w1", "w3"), "w2"),
    (("gate_up_proj",), "down_proj"),
)

# Arguments with which attention is something else.
_UNUSUAL = ("position_bias", "softcap", "cache", "s_aux")


class Norm:
    """``forward`` of a norm: weight · x / √(mean(x²) + eps).

    Args:
        module: with a ``weight`` (n,).
    """

    def __init__(self, module: nn.Module, eps: float) -> None:
        self._module, self._eps = module, eps

    def __call__(self, x: Tensor) -> Tensor:
        """(…, n) → (…, n)"""
        weight: Tensor = self._module.weight  # type: ignore[assignment]
        if not (
            can_bypass_dispatch(x, weight) and x.dtype == weight.dtype and x.is_contiguous() and x.is_cpu
        ):
            y: Tensor = type(self._module).forward(self._module, x)
            return y
        return rms_norm(x, weight, self._eps)


class GatedMlp:
    """``forward`` of an MLP: down(silu(gate(x)) · up(x)).

    Args:
        layers: those that are multiplied in one call.
        down: name of the last layer.
    """

    def __init__(self, module: nn.Module, layers: dict[str, QuantLinear], down: str) -> None:
        self._module, self._layers, self._down = module, layers, down
        self._kernels = [layer.kernel for layer in layers.values()]

    def __call__(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)"""
        module = self._module
        if not (can_bypass_dispatch(x, None) and self._unchanged()):
            y: Tensor = type(module).forward(module, x)
            return y
        gated = silu_gate(self._kernels[0].merged(x))  # type: ignore[attr-defined]
        found: Tensor = module._modules[self._down](gated)  # type: ignore[misc]
        return found

    def _unchanged(self) -> bool:
        """Whether the layers are those that were joined, and nobody listens to one of them."""
        children = self._module._modules
        return all(
            children[name] is layer and layer.kernel is kernel and not layer._forward_hooks
            and not layer._forward_pre_hooks
            for (name, layer), kernel in zip(self._layers.items(), self._kernels, strict=True)
        )  # fmt: skip


def fuse_steps(model: nn.Module) -> dict[str, int]:
    """Replace what can be replaced in a model on the CPU whose layers were joined (`fused.fuse`).

    Returns:
        How many of each: "norms", "gated MLPs", and "attention" (1 where the model takes it).
    """
    with torch.inference_mode():
        found = {"norms": sum(map(_fuse_norm, list(model.modules())))}
        found["gated MLPs"] = sum(map(_fuse_mlp, list(model.modules())))
    found["attention"] = int(_fuse_attention(model))
    return found


def rms_norm(x: Tensor, weight: Tensor, eps: float, isa: str = "best") -> Tensor:
    """weight · x / √(mean(x²) + eps) over the last dimension, rounded before the weight as in transformers' models.

    Args:
        x: (…, n), contiguous. weight: (n,) in the same dtype: float32, float16 or bfloat16.
        isa: one of `native.instruction_sets`, or "best".
    """
    y, n = torch.empty_like(x), weight.numel()
    native.module().rms_norm(
        x.data_ptr(), weight.data_ptr(), y.data_ptr(), NUMBERS[x.dtype], x.numel() // n, n, eps,
        torch.get_num_threads(), isa,
    )  # fmt: skip
    return y


def silu_gate(x: Tensor, isa: str = "best") -> Tensor:
    """silu(gate) · up, rounded after silu, for x = gate, up.

    Args:
        x: (…, 2n), contiguous, float32, float16 or bfloat16.
    """
    n = x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype)
    native.module().silu_gate(
        x.data_ptr(), y.data_ptr(), NUMBERS[x.dtype], x.numel() // (2 * n), n, torch.get_num_threads(), isa
    )
    return y


def attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool = False, isa: str = "best"
) -> Tensor:
    """softmax(scale · Q Kᵀ) V.

    Args:
        query: (batch, heads, queries, size). key, value: (batch, key heads, length, size), length > 0; heads is a
            multiple of key heads. All in one dtype, float32, float16 or bfloat16, each vector contiguous.
        causal: query i sees the keys 0 … i, and there are as many keys as queries.

    Returns:
        (batch, queries, heads, size)
    """
    batch, heads, queries, size = query.shape
    _, key_heads, length, _ = key.shape
    y = torch.empty((batch, queries, heads, size), dtype=query.dtype)
    native.module().attention(
        query.data_ptr(), key.data_ptr(), value.data_ptr(), y.data_ptr(), NUMBERS[query.dtype], batch, heads,
        key_heads, queries, length, size, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], scale, causal,
        torch.get_num_threads(), isa,
    )  # fmt: skip
    return y


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
    """What transformers calls for attention: `attention` where there is no mask, else torch's."""
    if (
        attention_mask is None
        and not dropout
        and not any(kwargs.get(name) is not None for name in _UNUSUAL)
        and can_bypass_dispatch(query, key)
        and can_bypass_dispatch(value, None)
        and _fit(query, key, value)
    ):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        # As transformers has it: a single token sees all keys, several with as many keys those before them.
        causal = query.shape[2] > 1 and (
            getattr(module, "is_causal", True) if is_causal is None else is_causal
        )
        if not causal or query.shape[2] == key.shape[2]:
            return attention(query, key, value, scale, causal=causal), None
    result: tuple[Tensor, None] = sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **kwargs,
    )
    return result


def _fit(query: Tensor, key: Tensor, value: Tensor) -> bool:
    batch, heads, _, size = query.shape
    return (
        key.shape == value.shape
        and key.shape[0] == batch
        and key.shape[3] == size
        and key.shape[2] > 0
        and heads % key.shape[1] == 0
        and query.dtype == key.dtype == value.dtype
        and query.dtype in NUMBERS
        and all(tensor.is_cpu and tensor.stride(3) == 1 for tensor in (query, key, value))
    )


def _fuse_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if (
        not type(module).__name__.endswith("RMSNorm")
        or "forward" in vars(module)
        or weight is None
        or weight.dim() != 1
        or weight.dtype not in NUMBERS
        or not weight.is_cpu
        or not isinstance(eps, float)
    ):
        return False
    fused = Norm(module, eps)
    if not all(_same(module.forward(x), fused(x)) for x in _inputs(weight.numel(), weight.dtype)):
        return False
    module.forward = fused
    return True


def _fuse_mlp(module: nn.Module) -> bool:
    for names, down in GATED:
        layers = {
            name: child for name in names if isinstance(child := module._modules.get(name), QuantLinear)
        }
        last = module._modules.get(down)
        if len(layers) < len(names) or not isinstance(last, QuantLinear) or "forward" in vars(module):
            continue
        first, *_ = layers.values()
        merged = getattr(first.kernel, "merged", None)
        rows = sum(layer.out_features for layer in layers.values())
        if (
            merged is None
            or any(getattr(layer.kernel, "merged", None) is not merged for layer in layers.values())
            or any(layer.bias is not None for layer in layers.values())
            or merged.weight.out_features != rows
            or rows != 2 * last.in_features
        ):
            continue
        fused = GatedMlp(module, layers, down)
        if all(_same(module.forward(x), fused(x)) for x in _inputs(first.in_features, first.compute_dtype)):
            module.forward = fused
            return True
    return False


def _fuse_attention(model: nn.Module) -> bool:
    """Take `attention_forward` where the model and all its parts take torch's through transformers' interface."""
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not isinstance(model, PreTrainedModel) or not all(
        part._supports_attention_backend and part.config._attn_implementation == "sdpa" for part in parts
    ):
        return False
    AttentionInterface.register(ATTENTION, attention_forward)
    AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(ATTENTION)
    return True


def _inputs(n: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """One of the usual size, and one so small that eps counts."""
    generator = torch.Generator().manual_seed(0)
    for size in (1.0, 1e-3):
        yield (torch.randn(1, 1, n, generator=generator) * size).to(dtype)


def _same(a: object, b: Tensor) -> bool:
    """Whether two results differ by no more than a few roundings."""
    if not isinstance(a, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    tolerance = 8 * torch.finfo(a.dtype).eps
    return bool((a.float() - b.float()).norm() <= tolerance * a.float().norm())
