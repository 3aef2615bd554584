"""AutoGPTQ's public names, done by fewbit: change ``from auto_gptq`` to ``from fewbit.compat.auto_gptq``.

docs/migrating.md explains each argument.
"""

from .config import BaseQuantizeConfig
from .modeling import AutoGPTQForCausalLM, exllama_set_max_input_length, get_gptq_peft_model

__all__ = [
    "AutoGPTQForCausalLM",
    "BaseQuantizeConfig",
    "exllama_set_max_input_length",
    "get_gptq_peft_model",
]
