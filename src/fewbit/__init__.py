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
    from .checkpoint.convert import convert
    from .distillation import DistillConfig, distill
    from .estimate import estimate as plan
    from .evaluation import evaluate
    from .exports import export
    from .hf.load import load
    from .hf.prompts import generate
    from .inspection import inspect
    from .integration import register, unregister
    from .quantization import quantize
    from .report.report import Report
    from .verification import verify

# Loaded when first used, so that `import fewbit` does not import transformers.
_LAZY = {
    "DistillConfig": "distillation.DistillConfig",
    "Report": "report.report.Report",
    "convert": "checkpoint.convert.convert",
    "distill": "distillation.distill",
    "evaluate": "evaluation.evaluate",
    "export": "exports.export",
    "generate": "hf.prompts.generate",
    "inspect": "inspection.inspect",
    "load": "hf.load.load",
    "plan": "estimate.estimate",
    "quantize": "quantization.quantize",
    "register": "integration.register",
    "unregister": "integration.unregister",
    "verify": "verification.verify",
}

__all__ = [
    "DistillConfig",
    "FewbitError",
    "QuantConfig",
    "Report",
    "__version__",
    "convert",
    "distill",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "load",
    "plan",
    "quantize",
    "register",
    "unregister",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fewbit' has no attribute {name!r}")
    module, _, attribute = _LAZY[name].rpartition(".")
    return getattr(import_module(f".{module}", __name__), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
