"""`optimum.gptq` under the names that scripts use, done by fewbit.

Change ``from optimum.gptq`` to ``from fewbit.compat.optimum``; its modules ``data``, ``utils``, ``eval`` and
``constants`` are here too. docs/migrating.md says what each argument means now.
"""

from .loader import load_quantized_model
from .quantizer import GPTQQuantizer

__all__ = ["GPTQQuantizer", "load_quantized_model"]
