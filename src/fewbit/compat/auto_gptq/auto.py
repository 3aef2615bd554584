"""`AutoGPTQForCausalLM`, and the one function that AutoGPTQ has beside it."""

from __future__ import annotations

from typing import Any

from ..settings import say
from .modeling import BaseGPTQForCausalLM, StateError


class AutoGPTQForCausalLM:
    """Loads any causal language model, to quantize it or quantized."""

    def __init__(self) -> None:
        raise StateError(
            "AutoGPTQForCausalLM is not made directly: AutoGPTQForCausalLM.from_pretrained loads a model to be "
            "quantized, AutoGPTQForCausalLM.from_quantized a quantized one"
        )

    from_pretrained = BaseGPTQForCausalLM.from_pretrained
    from_quantized = BaseGPTQForCausalLM.from_quantized


def exllama_set_max_input_length(model: Any, max_input_length: int) -> Any:
    """The model as it is: no kernel here has a buffer for the longest input."""
    say(
        {
            "exllama_set_max_input_length": "not needed: no kernel here has a buffer that depends on the input's length"
        }
    )
    return model
