"""fewbit: quantize large language models to 2, 3, 4 or 8 bits with GPTQ, and run them.

The public names are here; importing them has no effects. See `fewbit.quantization` for the whole story.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import QuantConfig
from .errors import FewbitError

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .distillation import DistillConfig, distill
    from .evaluation import evaluate
    from .exports import export
    from .hf.load import load
    from .integration import register, unregister
    from .quantization import quantize

# Loaded when first used, so that `import fewbit` does not import transformers.
_LAZY = {
    "quantize": "quantization",
    "distill": "distillation",
    "DistillConfig": "distillation",
    "evaluate": "evaluation",
    "export": "exports",
    "load": "hf.load",
    "register": "integration",
    "unregister": "integration",
}

__all__ = [
    "DistillConfig",
    "FewbitError",
    "QuantConfig",
    "__version__",
    "distill",
    "evaluate",
    "export",
    "load",
    "quantize",
    "register",
    "unregister",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fewbit' has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
