"""The factorization of a layer's Hessian, and the fallbacks for a bad one, each recorded by name.

`factor_hessian` never fails. It returns the first factorization that works, or none, and the names of the fallbacks
that were needed, in order. The caller decides whether a fallback is acceptable.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .gptq import Factor, factor, order
from .hessian import Hessian

TOKENS_DROPPED = "non-finite tokens dropped"
UNDER_ROUTED = "tokens of other experts added"  # by the pipeline, before the solver sees the Hessian
NO_TOKENS = "no calibration tokens"
FLOAT64 = "float64 factorization"
DAMP_RAISED = "damping raised"
EIGENVALUES_CLAMPED = "eigenvalues clamped"
ROUND_TO_NEAREST = "diagonal-weighted round-to-nearest"
SCALES_CLAMPED = "scales at the limits of float16"
NO_CORRECTION = "no correction: its matrix cannot be factored"

_LARGEST_DAMP = 1.0


@dataclass(frozen=True)
class FactoredHessian:
    """What layers with one input and the same settings share.

    Attributes:
        D: float32 (n,), the weights of the grid search.
        g_idx: int32 (n,), the group of every column.
        factor: the factorization; None where only round-to-nearest is left.
        damp: the damping in use, a fraction of mean(diag H).
        dead: number of columns whose input was always zero.
        fallbacks: names of the fallbacks that were needed.
    """

    D: Tensor
    g_idx: Tensor
    factor: Factor | None
    damp: float
    dead: int
    fallbacks: tuple[str, ...]


def factor_hessian(hessian: Hessian, group_size: int, act_order: str, damp: float) -> FactoredHessian:
    """Order the columns and factor H, with as many fallbacks as needed."""
    fallbacks = (TOKENS_DROPPED,) if hessian.dropped else ()
    diag = hessian.diagonal()
    perm, g_idx = order(diag, group_size, act_order)
    dead = int((diag == 0).sum())
    if hessian.tokens == 0 or dead == len(diag):
        names = (*fallbacks, NO_TOKENS, ROUND_TO_NEAREST)
        return FactoredHessian(torch.ones_like(diag), g_idx, None, damp, dead, names)
    found, used, needed = factor_with_fallbacks(hessian.matrix(), perm, damp)
    return FactoredHessian(grid_weights(diag, damp), g_idx, found, used, dead, (*fallbacks, *needed))


def grid_weights(diag: Tensor, damp: float) -> Tensor:
    """diag(H_λ), scaled so that its largest entry is near 1 and no sum of errors overflows.

    The small λ keeps columns that never were active inside the range of the grid.
    """
    diag = torch.where(torch.isfinite(diag), diag, diag.new_zeros(())).clamp(min=0)
    diag = diag / diag.amax().clamp(min=torch.finfo(diag.dtype).tiny)
    return diag + damp * diag.mean()


def factor_with_fallbacks(
    H: Tensor, perm: Tensor, damp: float
) -> tuple[Factor | None, float, tuple[str, ...]]:
    """Factor H; return the factorization, the damping it needed, and the names of the fallbacks.

    Args:
        H: float32 (n, n), symmetric.
        perm: int64 (n,), the processing order.
        damp: a fraction of mean(diag H).
    """
    if not bool(torch.isfinite(torch.stack(torch.aminmax(H))).all()):
        return None, damp, (ROUND_TO_NEAREST,)
    found = factor(H, perm, damp)
    if found is not None:
        return found, damp, ()
    found = factor(H, perm, damp, torch.float64)
    if found is not None:
        return found, damp, (FLOAT64,)
    raised = damp
    while raised < _LARGEST_DAMP:
        raised = min(10 * raised, _LARGEST_DAMP)
        found = factor(H, perm, raised, torch.float64)
        if found is not None:
            return found, raised, (FLOAT64, DAMP_RAISED)
    found = factor(clamped(H), perm, damp, torch.float64)
    if found is not None:
        return found, damp, (FLOAT64, DAMP_RAISED, EIGENVALUES_CLAMPED)
    return None, damp, (FLOAT64, DAMP_RAISED, EIGENVALUES_CLAMPED, ROUND_TO_NEAREST)


def clamped(H: Tensor) -> Tensor:
    """The nearest positive semidefinite matrix: negative eigenvalues set to zero, in float64."""
    values, vectors = torch.linalg.eigh(H.double())
    return torch.mm(vectors * values.clamp(min=0), vectors.T)
