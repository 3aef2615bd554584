"""`get_gptq_peft_model`: adapters on a quantized model, with plain peft."""

from __future__ import annotations

from typing import Any

from ...errors import ConfigError, DependencyError
from ...hf.layers import quantized_layers
from .modeling import BaseGPTQForCausalLM


def get_gptq_peft_model(
    model: BaseGPTQForCausalLM,
    peft_config: Any = None,
    model_id: str | None = None,
    adapter_name: str = "default",
    auto_find_all_linears: bool = True,
    train_mode: bool = False,
) -> Any:
    """The model with a new adapter to train, or with one that was saved.

    Args:
        model: quantized.
        peft_config: of the new adapter.
        model_id: folder or Hub id of a saved one.
        adapter_name: what it is called.
        auto_find_all_linears: the new adapter sits on every quantized layer.
        train_mode: whether to make a new one.

    Raises:
        ConfigError: what the mode needs was not given.
        DependencyError: peft is missing.
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
