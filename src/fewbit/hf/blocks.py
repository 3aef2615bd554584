"""Blocks and sequence length of a transformers model, and settings for a selection of its layers."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..config import QuantConfig
from ..errors import ConfigError
from ..modeling.experts import unfuse
from ..modeling.layers import is_layer
from ..planning import make_plan, output_embedding_name

LOG = logging.getLogger("fewbit")

# Names of transformers' lists of blocks, the most specific first.
BLOCK_PATTERNS = (
    "transformer.h",
    "model.decoder.layers",
    "gpt_neox.layers",
    "model.layers",
    "model.language_model.layers",
    "h",
    "decoder.layers",
    "layers",
)
# What a model's configuration calls its maximum sequence length.
SEQLEN_KEYS = ("max_position_embeddings", "seq_length", "n_positions")
_DEFAULT_SEQLEN = 2048


def get_block_name_with_pattern(model: nn.Module) -> str:
    """Return the name of the list of transformer blocks, such as "model.layers".

    Raises:
        ConfigError: it has none of the usual names.
    """
    names = {name for name, _ in model.named_modules()}
    for name in BLOCK_PATTERNS:
        if name in names:
            return name
    raise ConfigError(
        f"{type(model).__name__} has its blocks at none of {', '.join(BLOCK_PATTERNS)}: pass block_name_to_quantize"
    )


def get_preceding_modules(model: nn.Module, module_name: str) -> list[str]:
    """Return the names of the modules before `module_name`, without those that contain it.

    Raises:
        ConfigError: there is no such module.
    """
    names = [name for name, _ in model.named_modules()]
    if module_name not in names:
        raise ConfigError(f"Module {module_name} was not found in {type(model).__name__}")
    before = names[: names.index(module_name)]
    return [name for name in before if name and not module_name.startswith(f"{name}.")]


def get_seqlen(model: nn.Module) -> int:
    """Return the maximum sequence length in the model's configuration; 2048 if there is none."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    for key in SEQLEN_KEYS:
        value = getattr(config, key, None)
        if isinstance(value, int):
            return value
    model_name = type(model).__name__
    LOG.warning("%s names no longest sequence: %d is used; model_seqlen sets it", model_name, _DEFAULT_SEQLEN)
    return _DEFAULT_SEQLEN


def restrict(
    config: QuantConfig, model: nn.Module, block_name: str | None, modules: Sequence[Sequence[str]] | None
) -> QuantConfig:
    """Return settings that ignore every layer outside the selected blocks and modules.

    Args:
        config: the settings.
        model: its fused experts are unfused, as quantizing it would.
        block_name: name of the list of blocks, such as "model.layers"; None for all blocks.
        modules: layer names inside a block, in any grouping; None or empty for all.

    Raises:
        ConfigError: a name is not in the model.
    """
    listed = [name for names in modules or () for name in ([names] if isinstance(names, str) else names)]
    if block_name is None and not listed:
        return config
    unfuse(model)
    blocks = r"(?:.*\.)?\d+" if block_name is None else rf"{re.escape(block_name)}\.\d+"
    _check_names(model, blocks, block_name, listed)
    ending = rf"(?:{'|'.join(map(re.escape, listed))})$" if listed else ""
    wanted = rf"{blocks}\.{ending}"
    head = output_embedding_name(model)
    asked = config.lm_head or any(re.search(pattern, head or "") for pattern in config.override)
    if head is not None and asked:
        wanted = rf"(?:{wanted}|{re.escape(head)}$)"
    if not all(re.match(wanted, layer.name) for layer in make_plan(model, config).layers):
        config = replace(config, ignore=(*config.ignore, f"^(?!{wanted})"))
    for item in make_plan(model, config).skipped if listed else ():
        if re.match(wanted, item.name):
            LOG.warning("modules_in_block_to_quantize %s: stays as it is: %s", item.name, item.reason)
    return config


def _check_names(model: nn.Module, blocks: str, block_name: str | None, listed: Sequence[str]) -> None:
    """Check that blocks matching the pattern `blocks` contain each listed layer."""
    model_name = type(model).__name__
    layers = [name for name, module in model.named_modules() if is_layer(module)]
    inside = [name for name in layers if re.match(rf"{blocks}\.", name)]
    if not inside:
        raise ConfigError(
            f"block_name_to_quantize {block_name!r} is no list of blocks with linear layers in {model_name}; "
            f"its layers are called {_some(layers)}"
        )
    for name in listed:
        if not any(re.match(rf"{blocks}\.{re.escape(name)}$", layer) for layer in inside):
            short = dict.fromkeys(re.sub(rf"^{blocks}\.", "", layer) for layer in inside)
            raise ConfigError(
                f"modules_in_block_to_quantize: no block of {model_name} has a linear layer {name!r}; "
                f"they have {_some(short)}"
            )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:7]) + (", …" if len(names) > 7 else "") if names else "(it has none)"
