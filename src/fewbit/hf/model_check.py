"""Compare a checkpoint's tensors with the model that its config.json describes, built on the meta device.

Only classes of transformers itself are built, never a checkpoint's own code. A configuration of a far larger model than
the files hold is refused before the model is built, because config.json is untrusted input.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .. import torch_internals, transformers_internals
from ..checkpoint import layout
from ..checkpoint.safetensors_file import TensorInfo
from ..errors import CheckpointError
from .quantized_layers import FileNames

# What transformers raises for configurations that do not describe a model.
UNBUILDABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
# Keys whose number becomes the length of a list before any parameter is made: counts of blocks, experts, labels, and
# the like. Widths and sizes (`block_dim`, `vocab_size_per_layer_input`) make parameters, which `_limited` counts.
_COUNT = re.compile(r"(?:layer|block|depth|stage|expert|label|codebook|branch|level)(?:e?s)?$", re.I)
_LARGEST_COUNT = 1_000_000
_LARGEST_BUFFERS = 1 << 30  # bytes that a model computes when it is built, such as position tables


@dataclass(frozen=True)
class Expected:
    """Result of comparing a model with a checkpoint's tensors.

    Attributes:
        class_name: name of the model class.
        missing: parameters that the checkpoint lacks, in the model's order.
        mismatches: tensor name → what is wrong with its shape or dtype.
        kinds: quantized layer → "linear" or "conv2d", for layers that the model has.
    """

    class_name: str
    missing: list[str]
    mismatches: dict[str, str]
    kinds: dict[str, str]


def expected(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Expected | None:
    """Compare the `tensors` of the checkpoint in `folder` with the model that `config` describes.

    A quantized layer counts as its weight, names are mapped by transformers' own conversion, and one of two tied
    parameters is enough.

    Returns:
        The result, or None if transformers does not know the architecture.

    Raises:
        CheckpointError: config.json does not describe a model, or one that is far larger than the files.
    """
    model = _meta_model(folder, config, len(tensors))
    if model is None:
        return None
    with _limited(4 * len(tensors) + 2_000):
        names, converted = _parameter_names(model, list(tensors))  # may unfuse experts
    state = model.state_dict()
    provided = {target for targets in names.values() for target in targets}
    missing = [name for name in _required(model, state, provided) if name not in provided]
    modules = dict(model.named_modules())
    kinds = {}
    mismatches = {}
    for name, info in tensors.items():
        layer, _, part = name.rpartition(".")
        target = names[name][0]
        module = modules.get(target.rpartition(".")[0])
        if part == layout.QWEIGHT and module is not None:
            kinds[layer] = "conv2d" if isinstance(module, nn.Conv2d) else "linear"
        elif part not in layout.PARTS and target in state and name not in converted:
            shape, is_float = tuple(state[target].shape), state[target].is_floating_point()
            if shape != info.shape:
                mismatches[name] = f"has shape {info.shape}, but {type(model).__name__} needs {shape}"
            elif is_float and not info.dtype.is_floating_point:
                mismatches[name] = f"is {info.dtype}, but {type(model).__name__} needs floating-point numbers"
    return Expected(type(model).__name__, missing, mismatches, kinds)


def is_model_class(found: object) -> bool:
    """Return whether an attribute of transformers is a model class that can be built."""
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    return is_model and getattr(found, "config_class", None) is not None


def check_numbers(config: Mapping[str, Any]) -> None:
    """Refuse counts that no model has, before a list of that length is made."""
    for key, value in _numbers(config):
        if _COUNT.search(key) and value > _LARGEST_COUNT:
            raise CheckpointError(f"config.json says {key} {value:g}, which cannot be: no model has as many")


def _numbers(values: object, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(values, Mapping):
        for inner, value in values.items():
            yield from _numbers(value, str(inner))
    elif isinstance(values, list):
        for value in values:
            yield from _numbers(value, key)
    elif isinstance(values, (int, float)):
        yield key, min(values, 1e300)


def _meta_model(folder: Path, config: Mapping[str, Any], tensors: int) -> PreTrainedModel | None:
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    model_class: Any = getattr(transformers, name, None)
    model_type = config.get("model_type")
    if not is_model_class(model_class) or not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return None
    check_numbers(config)
    try:
        parsed = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        if hasattr(parsed, "quantization_config"):
            del parsed.quantization_config
        with torch.device("meta"), _limited(4 * tensors + 2_000):
            model: PreTrainedModel = transformers_internals.build(model_class, parsed)
    except ImportError:
        return None  # a package that this architecture needs is not here
    except UNBUILDABLE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"config.json does not describe a {name}: {reason}") from error
    own = sum(buffer.nbytes for buffer in model.buffers())
    if own > _LARGEST_BUFFERS:
        raise CheckpointError(f"config.json describes a {name} with {own:,} bytes of tables, which cannot be")
    return model


@contextmanager
def _limited(most: int) -> Iterator[None]:
    """Limit the number of parameters that can be created to `most`."""
    made = 0

    def count(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal made
        made += 1
        if made > most:
            raise CheckpointError(
                f"config.json describes a model of more than {most:,} parameters, far more than the files hold"
            )

    handle = torch_internals.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _parameter_names(model: PreTrainedModel, names: list[str]) -> tuple[dict[str, list[str]], set[str]]:
    """Return tensor name → parameter names, and the names of tensors that transformers converts to another shape."""
    suffix = f".{layout.QWEIGHT}"
    file_names = FileNames(model, [name.removesuffix(suffix) for name in names if name.endswith(suffix)])
    targets, converted = {}, set()
    for name in names:
        layer, _, part = name.rpartition(".")
        renamed, split = file_names.rename(f"{layer}.weight" if part == layout.QWEIGHT else name)
        targets[name] = [renamed, *(renamed.replace(split[0], other) for other in split[1:])]
        if split:
            converted.add(name)
    return targets, converted


def _required(model: PreTrainedModel, state: Mapping[str, Tensor], provided: set[str]) -> list[str]:
    """Return parameters and persistent buffers that are not tied to a provided one and not optional."""
    ignored = [re.compile(pattern) for pattern in transformers_internals.optional_parameters(model)]
    tied: dict[str, str] = model.all_tied_weights_keys
    tied_to_provided = {source for target, source in tied.items() if target in provided}
    return [
        name
        for name in state
        if name not in tied
        and name not in tied_to_provided
        and not any(pattern.search(name) for pattern in ignored)
    ]
