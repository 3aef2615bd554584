"""A Hessian of batches that are all at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fewbit.gptq import Hessian


def hessian_of(X: Sequence[Tensor], full: Sequence[Tensor] | None = None, **options: Any) -> Hessian:
    """Of the tokens of all batches, and of the same tokens in full precision."""
    H = Hessian(X[0].shape[-1], **options)
    partners = full if full is not None else [None] * len(X)
    for take in (H.observe_range, H.add):
        for batch, partner in zip(X, partners, strict=True):
            take(batch, full=partner)
    return H
