"""What the solver is given besides weights and Hessians, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..quantized_matrix import QuantizedMatrix
from .correction import Holdout, RowReduce
from .factor_cache import FactorCache
from .hessian import Hessian


@dataclass(frozen=True)
class Accuracy:
    """What may be spent on a lower error, where full-precision inputs are at hand.

    Attributes:
        correction: α, 0 to 1, or "auto": the best on the probe; without a probe no correction.
    """

    correction: float | str = 0.0


@dataclass(frozen=True)
class Solution:
    """A solved layer.

    Attributes:
        codes: the quantized weight.
        loss: tr((T − Ŵ) H (T − Ŵ)ᵀ), the squared error of the layer's outputs summed over the calibration
            tokens; T = W without correction. Without a Hessian ‖W − Ŵ‖².
        fallbacks: what had to be done because the Hessian was bad, by name (see `gptq.cholesky`).
        damp: the damping in use, a fraction of mean(diag H); None without a factorization.
        tokens: calibration tokens in H. dropped: tokens left out because they were not finite.
        dead: columns whose input was always zero; they are rounded to nearest.
        alpha: of the correction; None without full-precision inputs.
        true_error: ‖WX̃ − ŴX‖ / ‖WX̃‖ on the probe; None without one, or where it carries no signal.
    """

    codes: QuantizedMatrix
    loss: float
    fallbacks: tuple[str, ...] = ()
    damp: float | None = None
    tokens: int = 0
    dropped: int = 0
    dead: int = 0
    alpha: float | None = None
    true_error: float | None = None


@dataclass(frozen=True)
class InputGroup:
    """The weights of layers with one input, and what `quantize_weight` is told of them.

    Attributes:
        weights: (out_i, in), on the device of the Hessian. totals: one for each.
    """

    weights: Sequence[Tensor]
    hessian: Hessian
    cache: FactorCache
    probe: Holdout | None
    totals: Sequence[RowReduce]
