"""The GPTQ solver. `quantize_weight` is its door; gptq.py has the algorithm on one page."""

from .backends import fallback_reason
from .correction import Holdout
from .hessian import Hessian
from .round_rows import WIDER_GRIDS
from .solve import InputGroup, Solution, quantize_weight

__all__ = [
    "WIDER_GRIDS",
    "Hessian",
    "Holdout",
    "InputGroup",
    "Solution",
    "fallback_reason",
    "quantize_weight",
]
