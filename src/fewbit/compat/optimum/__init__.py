"""`optimum.gptq` under the names that scripts import, done by fewbit.

Change ``from optimum.gptq`` to ``from fewbit.compat.optimum``; the modules ``data``, ``utils``, ``eval`` and
``constants`` exist here too. docs/migrating.md explains each argument.
"""

from .quantizer import GPTQQuantizer, load_quantized_model

__all__ = ["GPTQQuantizer", "load_quantized_model"]
