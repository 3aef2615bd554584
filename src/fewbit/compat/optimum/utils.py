"""Functions about a model's modules that optimum's scripts import."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from ...hf.blocks import get_block_name_with_pattern, get_preceding_modules, get_seqlen
from ...kernels.linear import QuantizedLayer

__all__ = ["get_block_name_with_pattern", "get_layers", "get_preceding_modules", "get_seqlen"]


def get_layers(
    module: nn.Module,
    layers: Sequence[type[nn.Module]] = (Conv1D, nn.Conv2d, nn.Linear),
    prefix: str | None = None,
    name: str = "",
) -> dict[str, nn.Module]:
    """Return the modules of the given types by name, in order; quantized layers only if their type is given.

    Args:
        module: root module.
        layers: module types.
        prefix: start of the names to return; None for all.
        name: name of `module` itself.
    """
    types = tuple(layers)
    quantized = tuple(kind for kind in types if issubclass(kind, QuantizedLayer))
    found = {
        ".".join(filter(None, (name, own))): child
        for own, child in module.named_modules()
        if isinstance(child, quantized if isinstance(child, QuantizedLayer) else types)
    }
    return {key: child for key, child in found.items() if key.startswith(prefix or "")}
