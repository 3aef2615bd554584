"""The operations of a model between its products, each as one call of the compiled module: norms and gated MLPs.

A model's own code takes a dozen operations for each of them, and for one token most of the time is dispatch. A module's
``forward`` is replaced only if the replacement gives the same numbers on random inputs, up to rounding. The model's own
code still runs under a compiler or tracer, with gradients, and with hooks on a layer that would be skipped.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ... import native
from ..linear import QuantLinear
from .kernel import can_bypass_dispatch

# Layers of a gated MLP: the layers whose outputs are concatenated, then the layer that reads the gated product.
GATED_MLPS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("w1", "w3"), "w2"),
    (("gate_up_proj",), "down_proj"),
)


class FusedRMSNorm:
    """``forward`` of a norm: weight · x / √(mean(x²) + eps).

    Args:
        module: the norm, with a ``weight`` (n,).
        eps: the eps of the formula.
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
        return native.rms_norm(x, weight, self._eps)


class FusedGatedMLP:
    """``forward`` of an MLP: down(silu(gate(x)) · up(x)).

    Args:
        module: the MLP.
        layers: the layers by name that are multiplied in one call.
        down: name of the last layer.
    """

    def __init__(self, module: nn.Module, layers: dict[str, QuantLinear], down: str) -> None:
        self._module, self._layers, self._down = module, layers, down
        self._kernels = [layer.kernel for layer in layers.values()]

    def __call__(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)"""
        module = self._module
        if not (can_bypass_dispatch(x, None) and self._is_unchanged()):
            y: Tensor = type(module).forward(module, x)
            return y
        gated = native.silu_mul(self._kernels[0].merged(x))  # type: ignore[attr-defined]
        found: Tensor = module._modules[self._down](gated)  # type: ignore[misc]
        return found

    def _is_unchanged(self) -> bool:
        """Whether the layers are the ones that were merged, without hooks."""
        children = self._module._modules
        return all(
            children[name] is layer and layer.kernel is kernel and not layer._forward_hooks
            and not layer._forward_pre_hooks
            for (name, layer), kernel in zip(self._layers.items(), self._kernels, strict=True)
        )  # fmt: skip


def fuse_norms(model: nn.Module) -> int:
    """Replace the RMS norms of a model on the CPU where possible; the number of replaced ones."""
    with torch.inference_mode():
        return sum(map(_fuse_norm, list(model.modules())))


def fuse_gated_mlps(model: nn.Module) -> int:
    """Replace the gated MLPs of a model whose layers were merged (`merged.merge_layers`); the number of them."""
    with torch.inference_mode():
        return sum(map(_fuse_gated_mlp, list(model.modules())))


def _fuse_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if (
        not type(module).__name__.endswith("RMSNorm")
        or "forward" in vars(module)
        or weight is None
        or weight.dim() != 1
        or weight.dtype not in native.DTYPES
        or not weight.is_cpu
        or not isinstance(eps, float)
    ):
        return False
    fused = FusedRMSNorm(module, eps)
    if not all(_same(module.forward(x), fused(x)) for x in _inputs(weight.numel(), weight.dtype)):
        return False
    module.forward = fused
    return True


def _fuse_gated_mlp(module: nn.Module) -> bool:
    for names, down in GATED_MLPS:
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
        fused = FusedGatedMLP(module, layers, down)
        if all(_same(module.forward(x), fused(x)) for x in _inputs(first.in_features, first.compute_dtype)):
            module.forward = fused
            return True
    return False


def _inputs(n: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """An input of the usual magnitude, and one so small that eps matters."""
    generator = torch.Generator().manual_seed(0)
    for size in (1.0, 1e-3):
        yield (torch.randn(1, 1, n, generator=generator) * size).to(dtype)


def _same(a: object, b: Tensor) -> bool:
    """Whether two results differ by no more than a few roundings."""
    if not isinstance(a, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    tolerance = 8 * torch.finfo(a.dtype).eps
    return bool((a.float() - b.float()).norm() <= tolerance * a.float().norm())
