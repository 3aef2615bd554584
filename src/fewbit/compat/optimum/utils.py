"""Questions about a model that optimum's scripts ask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ...errors import ConfigError
from ...kernels.linear import QuantizedLayer
from ..settings import LOG
from .constants import BLOCK_PATTERNS, SEQLEN_KEYS_TRANSFORMERS

_DEFAULT_SEQLEN = 2048


def get_layers(
    module: nn.Module,
    layers: Sequence[type[nn.Module]] = (Conv1D, nn.Conv2d, nn.Linear),
    prefix: str | None = None,
    name: str = "",
) -> dict[str, nn.Module]:
    """The modules of given types by their names, in order; quantized ones only if their type is given.

    Args:
        module: where to look.
        layers: the types.
        prefix: only names that begin with it.
        name: of `module` itself.
    """
    types = tuple(layers)
    quantized = tuple(kind for kind in types if issubclass(kind, QuantizedLayer))
    found = {
        ".".join(filter(None, (name, own))): child
        for own, child in module.named_modules()
        if isinstance(child, quantized if isinstance(child, QuantizedLayer) else types)
    }
    return {key: child for key, child in found.items() if key.startswith(prefix or "")}


def get_block_name_with_pattern(model: nn.Module) -> str:
    """The name of the list of transformer blocks, such as "model.layers".

    Raises:
        ConfigError: there is none at the usual places.
    """
    names = {name for name, _ in model.named_modules()}
    for name in BLOCK_PATTERNS:
        if name in names:
            return name
    raise ConfigError(
        f"{type(model).__name__} has its blocks at none of {', '.join(BLOCK_PATTERNS)}: pass block_name_to_quantize"
    )


def get_preceding_modules(model: nn.Module, module_name: str) -> list[str]:
    """Names of the modules before the one called `module_name`, without those that contain it.

    Raises:
        ConfigError: there is no such module.
    """
    names = [name for name, _ in model.named_modules()]
    if module_name not in names:
        raise ConfigError(f"Module {module_name} was not found in {type(model).__name__}")
    before = names[: names.index(module_name)]
    return [name for name in before if name and not module_name.startswith(f"{name}.")]


def get_seqlen(model: nn.Module) -> int:
    """The longest sequence that the model's configuration names; 2048 if it names none."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    for key in SEQLEN_KEYS_TRANSFORMERS:
        value = getattr(config, key, None)
        if isinstance(value, int):
            return value
    LOG.warning(
        "%s names no longest sequence: %d is used; model_seqlen sets it",
        type(model).__name__,
        _DEFAULT_SEQLEN,
    )
    return _DEFAULT_SEQLEN
