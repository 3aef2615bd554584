"""What the model that config.json names needs from its checkpoint. The model is built without memory.

Only classes of transformers itself are built, never a checkpoint's own code. A configuration that describes a far
larger model than the files hold is refused before it is built: a stranger may write any number into it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .. import internals
from ..checkpoint import layout
from ..checkpoint.safetensors_file import TensorInfo
from ..errors import CheckpointError
from .layers import FileNames

# What transformers raises for configurations that describe no model.
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
# Numbers in a configuration that make lists or modules when it is read: blocks come with tensors, others do not.
_BLOCKS = re.compile(r"layer|block|depth|stage", re.I)
_LISTED = re.compile(r"expert|label|codebook|branch|level", re.I)
_MOST_LISTED = 100_000
_LARGEST_BUFFERS = 1 << 30  # bytes of what a model makes for itself, such as tables of positions


@dataclass(frozen=True)
class Expected:
    """A model without memory, seen from a checkpoint's tensor names.

    Attributes:
        class_name: of the model. missing: parameters that it needs and the checkpoint lacks, in its order.
        misfits: tensor name → what is wrong with its shape or dtype.
        kinds: "linear" or "conv2d" for every quantized layer whose module the model has.
    """

    class_name: str
    missing: list[str]
    misfits: dict[str, str]
    kinds: dict[str, str]


def expected(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Expected | None:
    """Compare the `tensors` of the checkpoint in `folder` with the model that `config` describes.

    A quantized layer counts as its weight, names go through transformers' own renaming, and one of two tied
    parameters is enough.

    Returns:
        None where transformers does not know the architecture.

    Raises:
        CheckpointError: transformers knows the architecture, but config.json does not describe one, or one that
            is far larger than the files.
    """
    model = _meta_model(folder, config, len(tensors))
    if model is None:
        return None
    with _limited(4 * len(tensors) + 2_000):
        places, converted = _places(model, list(tensors))  # may take fused experts apart
    state = model.state_dict()
    provided = {place for found in places.values() for place in found}
    missing = [name for name in _required(model, state, provided) if name not in provided]
    modules = dict(model.named_modules())
    kinds = {}
    misfits = {}
    for name, info in tensors.items():
        layer, _, part = name.rpartition(".")
        place = places[name][0]
        module = modules.get(place.rpartition(".")[0])
        if part == layout.QWEIGHT and module is not None:
            kinds[layer] = "conv2d" if isinstance(module, nn.Conv2d) else "linear"
        elif part not in layout.PARTS and place in state and name not in converted:
            shape, is_float = tuple(state[place].shape), state[place].is_floating_point()
            if shape != info.shape:
                misfits[name] = f"has shape {info.shape}, but {type(model).__name__} needs {shape}"
            elif is_float and not info.dtype.is_floating_point:
                misfits[name] = f"is {info.dtype}, but {type(model).__name__} needs floating-point numbers"
    return Expected(type(model).__name__, missing, misfits, kinds)


def is_model_class(found: object) -> bool:
    """Whether what transformers has under a name is a model that can be built."""
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    return is_model and getattr(found, "config_class", None) is not None


def check_numbers(config: Mapping[str, Any], tensors: int) -> None:
    """Refuse counts of blocks that so many `tensors` cannot fill, and counts that no model has.

    Raises:
        CheckpointError: before transformers makes lists or modules of that length.
    """
    for key, value in _numbers(config):
        limit = tensors if _BLOCKS.search(key) else _MOST_LISTED if _LISTED.search(key) else None
        if limit is not None and value > max(limit, 200):
            raise CheckpointError(
                f"config.json says {key} {value:g}, which cannot be: the checkpoint has {tensors} tensors"
            )


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
    import transformers

    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    model_class: Any = getattr(transformers, name, None)
    model_type = config.get("model_type")
    if not is_model_class(model_class) or not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return None
    check_numbers(config, tensors)
    try:
        parsed = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        if hasattr(parsed, "quantization_config"):
            del parsed.quantization_config
        with torch.device("meta"), _limited(4 * tensors + 2_000):
            model: PreTrainedModel = internals.build(model_class, parsed)
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
    """While entered, no more than `most` parameters can be made."""
    made = 0

    def count(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal made
        made += 1
        if made > most:
            raise CheckpointError(
                f"config.json describes a model of more than {most:,} parameters, far more than the files hold"
            )

    handle = internals.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _places(model: PreTrainedModel, names: list[str]) -> tuple[dict[str, list[str]], set[str]]:
    """Tensor name in the file → the model's names for what it holds; several where transformers splits it.

    Also the names of all that transformers stores in another shape.
    """
    suffix = f".{layout.QWEIGHT}"
    file_names = FileNames(model, [name.removesuffix(suffix) for name in names if name.endswith(suffix)])
    places, converted = {}, set()
    for name in names:
        layer, _, part = name.rpartition(".")
        renamed, split = file_names.rename(f"{layer}.weight" if part == layout.QWEIGHT else name)
        places[name] = [renamed, *(renamed.replace(split[0], other) for other in split[1:])]
        if split:
            converted.add(name)
    return places, converted


def _required(model: PreTrainedModel, state: Mapping[str, Tensor], provided: set[str]) -> list[str]:
    """Parameters and persistent buffers, less what is tied to a provided one and what transformers ignores."""
    ignored = [re.compile(pattern) for pattern in internals.optional_parameters(model)]
    tied: dict[str, str] = model.all_tied_weights_keys
    tied_to_provided = {source for target, source in tied.items() if target in provided}
    return [
        name
        for name in state
        if name not in tied
        and name not in tied_to_provided
        and not any(pattern.search(name) for pattern in ignored)
    ]
