"""What the model that config.json names needs from its checkpoint. The model is built without memory.

Only classes of transformers itself are built, never a checkpoint's own code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..checkpoint import layout
from ..errors import CheckpointError
from .file_names import FileNames


@dataclass(frozen=True)
class Expected:
    """A model without memory, seen from a checkpoint's tensor names.

    Attributes:
        class_name: of the model. missing: parameters that it needs and the checkpoint lacks, in its order.
        kinds: "linear" or "conv2d" for every quantized layer whose module the model has.
    """

    class_name: str
    missing: list[str]
    kinds: dict[str, str]


def expected(folder: Path, config: Mapping[str, Any], names: Iterable[str]) -> Expected | None:
    """Compare the tensor `names` of the checkpoint in `folder` with the model that `config` describes.

    A quantized layer counts as its weight, names go through transformers' own renaming, and one of two tied
    parameters is enough.

    Returns:
        None where transformers does not know the architecture.

    Raises:
        CheckpointError: transformers knows the architecture, but config.json does not describe one.
    """
    model = _meta_model(folder, config)
    if model is None:
        return None
    names = list(names)
    places = _places(model, names)
    provided = {place for found in places.values() for place in found}
    missing = [name for name in _required(model, provided) if name not in provided]
    modules = dict(model.named_modules())
    kinds = {}
    for name in names:
        layer, _, part = name.rpartition(".")
        module = modules.get(places[name][0].rpartition(".")[0])
        if part == layout.QWEIGHT and module is not None:
            kinds[layer] = "conv2d" if isinstance(module, nn.Conv2d) else "linear"
    return Expected(type(model).__name__, missing, kinds)


def _meta_model(folder: Path, config: Mapping[str, Any]) -> PreTrainedModel | None:
    import transformers

    architectures = config.get("architectures") or [""]
    model_class: Any = getattr(transformers, str(architectures[0]), None)
    known = isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)
    if not known or config.get("model_type") not in CONFIG_MAPPING:
        return None
    try:
        parsed = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        if hasattr(parsed, "quantization_config"):
            del parsed.quantization_config
        with torch.device("meta"):
            model: PreTrainedModel = model_class._from_config(parsed)
    except ImportError:
        return None  # a package that this architecture needs is not here
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"config.json does not describe a {architectures[0]}: {reason}") from error
    return model


def _places(model: PreTrainedModel, names: list[str]) -> dict[str, list[str]]:
    """Tensor name in the file → the model's names for what it holds; several where transformers splits it."""
    suffix = f".{layout.QWEIGHT}"
    in_model = FileNames(model, [name.removesuffix(suffix) for name in names if name.endswith(suffix)])
    places = {}
    for name in names:
        layer, _, part = name.rpartition(".")
        renamed, split = in_model.place(f"{layer}.weight" if part == layout.QWEIGHT else name)
        places[name] = [renamed, *(renamed.replace(split[0], other) for other in split[1:])]
    return places


def _required(model: PreTrainedModel, provided: set[str]) -> list[str]:
    """Parameters and persistent buffers, less what is tied to a provided one and what transformers ignores."""
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    tied: dict[str, str] = model.all_tied_weights_keys
    tied_to_provided = {source for target, source in tied.items() if target in provided}
    return [
        name
        for name in model.state_dict()
        if name not in tied
        and name not in tied_to_provided
        and not any(pattern.search(name) for pattern in ignored)
    ]
