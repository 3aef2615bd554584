"""Everything that fewbit uses of transformers' private interfaces.

No other module imports a private module of transformers or reads a private attribute of a model, so a new release can
break only this file. ``tests/test_internals.py`` checks each entry against the installed version.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import LoadStateDictConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

__all__ = [
    "ALL_MASK_ATTENTION_FUNCTIONS",
    "AUTO_QUANTIZATION_CONFIG_MAPPING",
    "AUTO_QUANTIZER_MAPPING",
    "Concatenate",
    "DynamicLayer",
    "MergeModulelist",
    "WeightConverter",
    "WeightNames",
    "WeightRenaming",
    "WeightTransform",
    "get_model_conversion_mapping",
    "revert_weight_conversion",
    "sdpa_attention_forward",
]


# transformers: names and layouts of weights
class WeightNames:
    """Names of tensors in checkpoint files → names of parameters, as transformers maps them while loading.

    Args:
        model: may be on the meta device.
        conversions: renamings and converters, from `conversions` or ``get_model_conversion_mapping``.
    """

    def __init__(self, model: PreTrainedModel, conversions: Sequence[WeightTransform]) -> None:
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self._targets = {
            source: entry.target_patterns for entry in self._converters for source in entry.source_patterns
        }
        self._prefix = model.base_model_prefix
        self._state = model.state_dict()

    def rename(self, name: str) -> tuple[str, list[str]]:
        """Map one tensor name.

        Returns:
            The name in the model, and the target patterns of the converter that merges or splits the tensor; an empty
            list if the tensor is only renamed.
        """
        renamed, pattern = rename_source_key(
            name, self._renamings, self._converters, self._prefix, self._state
        )
        if renamed not in self._state:  # a pattern may also fit a name that it is not meant for
            for other in (name, rename_source_key(name, self._renamings, [], self._prefix, self._state)[0]):
                if other in self._state:
                    return other, []
        return renamed, self._targets[pattern] if pattern is not None else []


def conversions(model: nn.Module) -> list[WeightTransform] | None:
    """Return the conversions that `model` was loaded with; None if it was not loaded from files."""
    found: list[WeightTransform] | None = getattr(model, "_weight_conversions", None)
    return found


def conversions_of(model: PreTrainedModel) -> list[WeightTransform]:
    """Return the conversions `model` was loaded with, or the default ones of its class if it was not loaded."""
    used = conversions(model)
    if used is not None:
        return list(used)
    # As in transformers' own saving: without a file, prefixes are unknown.
    default = get_model_conversion_mapping(model, add_legacy=False)
    return [entry for entry in default if not isinstance(entry, PrefixChange)]


def converters_of(parameters: Iterable[str], conversions: Iterable[WeightTransform]) -> list[WeightConverter]:
    """Find the converters that make one of the `parameters` (names in the model) among `conversions`."""
    parameters = list(parameters)
    reverse = [(c, c.reverse_transform()) for c in conversions if isinstance(c, WeightConverter)]
    return [c for c, back in reverse if any(back.rename_source_key(name)[1] for name in parameters)]


def set_conversions(model: nn.Module, value: list[WeightTransform] | None) -> None:
    """Set the conversions that ``save_pretrained`` reverts."""
    model._weight_conversions = value  # type: ignore[assignment]


def with_prefix(converter: WeightConverter, prefix: str) -> WeightConverter:
    """Return a converter whose source patterns begin with the regular expression `prefix`."""
    sources = [prefix + pattern for pattern in converter._original_source_patterns]
    changed: WeightConverter = converter.copy(
        sources, list(converter._original_target_patterns), operations=list(converter.operations)
    )
    return changed


def guarded(renaming: WeightRenaming, guard: str) -> WeightRenaming:
    """Return a renaming that acts backwards, when the model is saved, only where `guard` (a lookbehind) matches."""
    targets = [guard + pattern for pattern in renaming._original_target_patterns]
    changed: WeightRenaming = renaming.copy(list(renaming._original_source_patterns), targets)
    return changed


def load_converted(model: nn.Module, tensors: Mapping[str, Any], device: torch.device) -> None:
    """Load tensors under their names in the files into `model`, merged and split by its conversions."""
    kept = conversions(model)
    options = LoadStateDictConfig(device_map={"": device}, weight_mapping=kept)
    convert_and_load_state_dict_in_model(model, tensors, options)
    set_conversions(model, kept)  # transformers keeps only those that this call used


def is_loaded(tensor: Tensor) -> bool:
    """Return whether transformers has marked `tensor` as read from a file or initialized."""
    return bool(getattr(tensor, "_is_hf_initialized", False))


def mark_loaded(target: Tensor | nn.Module) -> None:
    """Keep transformers from initializing `target` after loading."""
    target._is_hf_initialized = True  # type: ignore[union-attr]


def untie(model: PreTrainedModel, names: Collection[str]) -> None:
    """Remove the parameters `names` from those that are tied to another one."""
    tied = model.all_tied_weights_keys.keys() & set(names)
    for name in tied:
        del model.all_tied_weights_keys[name]
    if tied and isinstance(model._tied_weights_keys, Mapping):
        # A new dict, because all models of the class share the class attribute.
        model._tied_weights_keys = {
            target: source
            for target, source in model._tied_weights_keys.items()
            if not any(re.search(target, name) for name in tied)
        }


def unexpected_in_files(model: nn.Module) -> list[str]:
    """Return the patterns of tensors that old files hold and the model class does not need."""
    return list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())


def optional_parameters(model: PreTrainedModel) -> list[str]:
    """Return the patterns of parameters that a checkpoint may lack."""
    return list(model._keys_to_ignore_on_load_missing or ())


# transformers: models
def build(model_class: Any, config: Any) -> PreTrainedModel:
    """Build a model from its configuration, on the current default device, without reading weights."""
    model: PreTrainedModel = model_class._from_config(config)
    return model


def cache_argument(model: PreTrainedModel) -> str:
    """Return the name of the argument for a key-value cache: transformers 5.24 renamed ``past_key_values``."""
    known = inspect.signature(model.prepare_inputs_for_generation).parameters
    return "cache" if "cache" in known else "past_key_values"


def uses_attention(model: PreTrainedModel, name: str) -> bool:
    """Return whether `model` runs the attention `name`, which can be replaced through `AttentionInterface`."""
    return bool(model._supports_attention_backend) and model.config._attn_implementation == name


def set_attention(model: PreTrainedModel, name: str) -> None:
    """As ``set_attn_implementation``, without looking for a flash kernel of that name on the Hub."""
    model.config._attn_implementation = name


def restore_attention_after(manager: Any, name: str) -> None:
    """Let a manager of continuous batching set its model's attention to `name` when it stops."""
    manager._original_attn_impl = name


def class_mapping(auto_class: Any) -> Mapping[Any, Any] | None:
    """Return configuration class → model class of an auto class (AutoModelForCausalLM …); None for other classes."""
    found: Mapping[Any, Any] | None = getattr(auto_class, "_model_mapping", None)
    return found


def expert_activation(experts: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the function from the concatenated gate and up projections, or from up alone, to the input of down."""
    found: Any = experts._apply_gate if experts.has_gate else experts.act_fn
    return found  # type: ignore[no-any-return]


def has_adapter(model: PreTrainedModel) -> bool:
    """Return whether an adapter was loaded with transformers' own ``load_adapter``."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


# transformers: its server
def pin_served_model(server: Any, name: str, model: PreTrainedModel, processor: Any) -> None:
    """Let a ``transformers.cli.serve.Serve`` answer for `name` only, with a model that is loaded already.

    Its endpoints that load and unload models then change nothing.
    """
    models = server._model_manager
    models._load_model = lambda *args, **kwargs: model
    models._load_processor = lambda *args, **kwargs: processor
    models.force_model, models.model_timeout = name, -1
    models.load_model_and_processor(models.process_model_name(name))


def wrap_generation(server: Any, wrap: Callable[[Any], Any]) -> None:
    """Let `server` use `wrap(manager)` for each of its generation managers."""
    state = server._generation_state
    original = state.get_manager
    state.get_manager = lambda *args, **kwargs: wrap(original(*args, **kwargs))


def on_messages(server: Any, action: Callable[..., Any]) -> None:
    """Call `action` where `server` would prepare the messages of a chat."""
    for handler in (server._chat_handler, server._response_handler):
        handler.get_processor_inputs_from_messages = action
