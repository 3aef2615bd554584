"""What happens when a Hessian is bad: a ladder of remedies, each one recorded by name.

Contract: `prepare` never fails. It returns the first factorization that works, or none, and the names of
the rungs that were needed, in order. Whether a rung is acceptable is the caller's decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .batching import in_batches
from .gptq import Factor, factor, factor_all, order
from .hessian import Hessian

TOKENS_DROPPED = "non-finite tokens dropped"
UNDER_ROUTED = "tokens of other experts added"  # by the walk, before the solver sees the Hessian
NO_TOKENS = "no calibration tokens"
FLOAT64 = "float64 factorization"
DAMP_RAISED = "damping raised"
EIGENVALUES_CLAMPED = "eigenvalues clamped"
ROUND_TO_NEAREST = "diagonal-weighted round-to-nearest"
NO_CORRECTION = "no correction: its matrix cannot be factored"

_LARGEST_DAMP = 1.0


@dataclass(frozen=True)
class FactoredHessian:
    """What the layers that share a Hessian share.

    Attributes:
        D: float32 (n,), the weights of the grid fit.
        g_idx: int32 (n,). factor: None means that only round-to-nearest is left.
        damp: the damping in use, as a fraction. dead: columns whose input was always zero.
        fallbacks: names of the rungs that were needed.
    """

    D: Tensor
    g_idx: Tensor
    factor: Factor | None
    damp: float
    dead: int
    fallbacks: tuple[str, ...]


def prepare(
    hessian: Hessian,
    group_size: int,
    act_order: str,
    damp: float,
    factored: Factor | None = None,
    dead: int | None = None,
) -> FactoredHessian:
    """Order the columns and factor H, going down the ladder as far as needed.

    Args:
        factored: the plain factorization, where it is there already. dead: columns that never were active, where they
            are counted already.
    """
    fallbacks = (TOKENS_DROPPED,) if hessian.dropped else ()
    H = hessian.matrix()
    diag = hessian.diagonal()
    perm, g_idx = order(diag, group_size, act_order)
    dead = int(_dead(diag)) if dead is None else dead
    if hessian.tokens == 0 or dead == len(diag):
        names = (*fallbacks, NO_TOKENS, ROUND_TO_NEAREST)
        return FactoredHessian(torch.ones_like(diag), g_idx, None, damp, dead, names)
    found, used, rungs = (
        (factored, damp, ()) if factored is not None else factor_with_fallbacks(H, perm, damp)
    )
    return FactoredHessian(grid_weights(diag, damp), g_idx, found, used, dead, (*fallbacks, *rungs))


def prepare_all(
    hessians: Sequence[Hessian], group_size: int, act_order: str, damp: float
) -> list[FactoredHessian]:
    """As `prepare` for each; those of one size are factored as one batch. One that fails goes down the ladder alone."""
    sizes: dict[int, list[int]] = {}
    for i, hessian in enumerate(hessians):
        sizes.setdefault(hessian.n, []).append(i)
    dead = torch.stack([_dead(hessian.matrix().diagonal()) for hessian in hessians]).tolist()
    prepared: dict[int, FactoredHessian] = {}
    for n, members in sizes.items():
        for some in in_batches(members, n):
            H = [hessians[i].matrix() for i in some]
            perms = [order(h.diagonal(), group_size, act_order)[0] for h in H]
            for i, factored in zip(some, factor_all(H, perms, damp), strict=True):
                prepared[i] = prepare(hessians[i], group_size, act_order, damp, factored, dead[i])
    return [prepared[i] for i in range(len(hessians))]


def _dead(diag: Tensor) -> Tensor:
    """How many columns never were active."""
    return (diag == 0).sum()


def grid_weights(diag: Tensor, damp: float) -> Tensor:
    """diag(H_λ) up to a factor, the largest entry being near 1, so that no sum of errors overflows.

    The small λ keeps columns that never were active inside the range of the grid.
    """
    diag = torch.where(torch.isfinite(diag), diag, diag.new_zeros(())).clamp(min=0)
    diag = diag / diag.amax().clamp(min=torch.finfo(diag.dtype).tiny)
    return diag + damp * diag.mean()


def factor_with_fallbacks(
    H: Tensor, perm: Tensor, damp: float
) -> tuple[Factor | None, float, tuple[str, ...]]:
    """The factorization, the damping it needed, and the rungs below the plain float32 one.

    Args:
        H: float32 (n, n), symmetric. perm: int64 (n,). damp: as a fraction.
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
