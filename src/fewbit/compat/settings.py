"""What the older tools call their settings → `QuantConfig`, and which layers their arguments select."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..config import QuantConfig
from ..errors import ConfigError, ModelError
from ..modeling.experts import unfuse
from ..modeling.layers import is_layer
from ..planning import make_plan, output_embedding_name
from ..preparation import resolve_device

LOG = logging.getLogger("fewbit")


@dataclass(frozen=True)
class PadToken:
    """The one thing that batches of token ids need of a tokenizer."""

    pad_token_id: int | None


def quant_config(
    *,
    bits: int,
    group_size: int,
    damp_percent: float,
    desc_act: bool,
    act_group_aware: bool = True,
    static_groups: bool = False,
    **settings: Any,
) -> QuantConfig:
    """The settings under their names here; `settings` are those that have the same name.

    Raises:
        ConfigError: a value is out of range.
    """
    order = "full" if desc_act and not static_groups else "group" if desc_act or act_group_aware else "none"
    return QuantConfig(bits=bits, group_size=group_size, damp=damp_percent, act_order=order, **settings)


def say(reasons: Mapping[str, str]) -> None:
    """Log, for each argument that was given, why it changes nothing here."""
    for argument, reason in reasons.items():
        LOG.warning("%s: %s", argument, reason)


def note_order(desc_act: bool, static_groups: bool, true_sequential: bool) -> None:
    """Log where columns or layers are quantized in another order than the one asked for."""
    if desc_act and static_groups:
        say(
            {
                "static_groups": "groups are always static here; with desc_act, columns are ordered inside their "
                "groups, which needs no g_idx, so the checkpoint says desc_act: false"
            }
        )
    if not true_sequential:
        say(
            {
                "true_sequential=False": "every layer sees its inputs through the quantized layers before it, "
                "which costs nothing extra here"
            }
        )


def kernel_name(backend: Any) -> str:
    """The kernel that a `backend` (a name or an enumeration's member) asks for; "auto" for None.

    Raises:
        ConfigError: it is no name.
    """
    name = getattr(backend, "value", backend)
    if name is None:
        return "auto"
    if not isinstance(name, str):
        raise ConfigError(f"backend must be the name of a kernel, such as 'auto', not {backend!r}")
    return name.lower()


def needs_gradients(backend: Any) -> bool:
    """Whether a `backend` asks for a kernel that gives gradients to a layer's inputs."""
    return str(getattr(backend, "value", backend)).lower() == "auto_trainable"


def check_in_memory(model: nn.Module) -> None:
    """Refuse a model of which accelerate keeps parts elsewhere.

    Raises:
        ConfigError: the message names the first.
    """
    device_map = getattr(model, "hf_device_map", None) or {}
    away = [name for name, device in device_map.items() if device == "disk"]
    away += [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if away:
        raise ConfigError(
            f"device_map keeps {away[0] or 'the model'} offloaded, and a model in memory is quantized where it is. "
            "Nothing needs to be offloaded: fewbit.quantize(FOLDER, output=OUT) streams the weights block by block"
        )


def note_device(model: nn.Module) -> None:
    """Log where a model on the CPU could be quantized faster."""
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.device.type != "cpu":
        return
    best = resolve_device("auto").type
    if best != "cpu":
        say(
            {
                "device": f"the model is on the CPU and is quantized there. Move it first (model.to({best!r})), or let "
                f"fewbit.quantize(FOLDER, output=OUT) stream it through the {best} device"
            }
        )
    elif parameter.dtype == torch.float16:
        say(
            {
                "torch_dtype": "float16 is slow on CPUs: load the model in bfloat16, which is several times faster"
            }
        )


def restrict(
    config: QuantConfig, model: nn.Module, block_name: str | None, modules: Sequence[Sequence[str]] | None
) -> QuantConfig:
    """The same settings for some of the layers: the others are ignored.

    Args:
        model: its fused experts are taken apart, as quantizing it does.
        block_name: of the list of blocks, such as "model.layers"; None for all blocks.
        modules: names inside a block, in any grouping; None or empty for all.

    Raises:
        ConfigError: a name is not in the model.
    """
    listed = [name for names in modules or () for name in ([names] if isinstance(names, str) else names)]
    if block_name is None and not listed:
        return config
    unfuse(model)
    layers = [name for name, module in model.named_modules() if is_layer(module)]
    blocks = r"(?:.*\.)?\d+" if block_name is None else rf"{re.escape(block_name)}\.\d+"
    inside = [name for name in layers if re.match(rf"{blocks}\.", name)]
    if not inside:
        raise ConfigError(
            f"block_name_to_quantize {block_name!r} is no list of blocks with linear layers in {type(model).__name__}; "
            f"its layers are called {_some(layers)}"
        )
    for name in listed:
        if not any(re.match(rf"{blocks}\.{re.escape(name)}$", layer) for layer in inside):
            short = dict.fromkeys(re.sub(rf"^{blocks}\.", "", layer) for layer in inside)
            raise ConfigError(
                f"modules_in_block_to_quantize: no block of {type(model).__name__} has a linear layer {name!r}; "
                f"they have {_some(short)}"
            )
    ending = rf"(?:{'|'.join(map(re.escape, listed))})$" if listed else ""
    wanted = rf"{blocks}\.{ending}"
    if config.lm_head and (head := output_embedding_name(model)):
        wanted = rf"(?:{wanted}|{re.escape(head)}$)"
    if not all(re.match(wanted, layer.name) for layer in make_plan(model, config).layers):
        config = replace(config, ignore=(*config.ignore, f"^(?!{wanted})"))
    if listed:
        for item in make_plan(model, config).skipped:
            if re.match(wanted, item.name):
                say({f"modules_in_block_to_quantize {item.name}": f"stays as it is: {item.reason}"})
    return config


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:7]) + (", …" if len(names) > 7 else "") if names else "(it has none)"


def require_saveable(model: nn.Module) -> Any:
    """The model, if it knows how to save itself.

    Raises:
        ModelError: it is no transformers model.
    """
    if not hasattr(model, "save_pretrained"):
        raise ModelError(
            f"{type(model).__name__} has no save_pretrained; only transformers models can be saved as a checkpoint. "
            "Save its state_dict() yourself"
        )
    return model
