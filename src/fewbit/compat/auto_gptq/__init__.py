"""AutoGPTQ's public names, done by fewbit: change ``from auto_gptq`` to ``from fewbit.compat.auto_gptq``.

docs/migrating.md explains each argument.
"""

from __future__ import annotations

from typing import Any

from ...errors import ConfigError, DependencyError
from ...gptq_arguments import warn_not_needed
from ...hf.quantized_layers import quantized_layers
from .config import BaseQuantizeConfig
from .modeling import AutoGPTQForCausalLM, BaseGPTQForCausalLM

__all__ = [
    "AutoGPTQForCausalLM",
    "BaseQuantizeConfig",
    "exllama_set_max_input_length",
    "get_gptq_peft_model",
]


def exllama_set_max_input_length(model: Any, max_input_length: int) -> Any:
    """Return the model unchanged: no kernel here has a buffer for the longest input."""
    warn_not_needed(exllama_set_max_input_length=True)
    return model


def get_gptq_peft_model(
    model: BaseGPTQForCausalLM,
    peft_config: Any = None,
    model_id: str | None = None,
    adapter_name: str = "default",
    auto_find_all_linears: bool = True,
    train_mode: bool = False,
) -> Any:
    """Return the model with a new adapter, or with a saved one.

    Args:
        model: a quantized model.
        peft_config: configuration of the new adapter.
        model_id: folder or Hub id of a saved adapter.
        adapter_name: name of the adapter.
        auto_find_all_linears: whether the new adapter covers every quantized layer.
        train_mode: whether to make a new adapter.

    Raises:
        ConfigError: the argument that the mode requires is missing.
        DependencyError: peft is not installed.
    """
    if train_mode and peft_config is None:
        raise ConfigError("train_mode makes a new adapter: pass its peft_config")
    if not train_mode and model_id is None:
        raise ConfigError("pass model_id, the adapter to load, or train_mode=True to make a new one")
    try:
        import peft
    except ImportError as error:
        raise DependencyError("adapters need the package peft: pip install peft") from error
    if not train_mode:
        return peft.PeftModel.from_pretrained(model.model, model_id, adapter_name)
    model.enable_trainable_mode()
    if auto_find_all_linears and hasattr(peft_config, "target_modules"):
        names = {name.rpartition(".")[2] for name, _ in quantized_layers(model.model)}
        peft_config.target_modules = sorted(names)
    return peft.get_peft_model(model.model, peft_config, adapter_name=adapter_name)
