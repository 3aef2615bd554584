"""Hessians shared by layers that receive the same tensors (q/k/v, gate/up).

Two layers share when every job brought the very same tensor object to both. Tensors are remembered by
weak reference and compared with `is`: addresses are reused by the allocator and would match falsely,
and a strong reference would keep a whole layer's activations alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..solver import FactorCache, Hessian
from .layers import input_rows, row_mask
from .lockstep import Arrival

# Parallel attention and feed-forward alternate between two inputs; encoder-decoder cross-attention
# comes back to the encoder's output in every block.
_KEPT = 2


@dataclass
class SharedHessian:
    """One Hessian with its factorizations, and the tensors it was made from."""

    inputs: list[tuple[int, weakref.ref[Tensor]]]
    hessian: Hessian
    masked: int
    cache: FactorCache = field(default_factory=FactorCache)

    def made_from(self, arrivals: Sequence[Arrival]) -> bool:
        """Whether `arrivals` are exactly the tensors of this Hessian."""
        return len(arrivals) == len(self.inputs) and all(
            arrival.job == job and reference() is arrival.x
            for arrival, (job, reference) in zip(arrivals, self.inputs, strict=True)
        )

    @property
    def alive(self) -> bool:
        """Whether another layer could still receive these tensors."""
        return all(reference() is not None for _, reference in self.inputs)


class HessianPool:
    """Accumulates Hessians at meeting points and hands the same one to layers with the same inputs.

    Args:
        masks: for every job, its (batch, tokens) masks; True counts, False is padding.
    """

    def __init__(self, masks: Sequence[list[Tensor]]) -> None:
        self._masks = masks
        self._pool: list[SharedHessian] = []
        self.accumulated = 0
        self.reused = 0

    def get(self, name: str, module: nn.Module, arrivals: Sequence[Arrival]) -> SharedHessian:
        """The Hessian of everything that arrived at `module`; padding never enters it."""
        plain = not isinstance(module, nn.Conv2d)
        self._pool = [entry for entry in self._pool if entry.alive]
        if plain:
            for entry in self._pool:
                if entry.made_from(arrivals):
                    self.reused += 1
                    return entry
        entry = self._accumulate(name, module, arrivals)
        self.accumulated += 1
        if plain:
            self._pool = [*self._pool[1 - _KEPT :], entry]
        return entry

    def _accumulate(self, name: str, module: nn.Module, arrivals: Sequence[Arrival]) -> SharedHessian:
        hessian: Hessian | None = None
        masked = 0
        for arrival in arrivals:
            rows = input_rows(module, arrival.x)
            hessian = hessian or Hessian(rows.shape[1], device=rows.device)
            mask = row_mask(arrival.x, self._candidates(name, arrival.job))
            if mask is not None:
                masked += int(mask.numel() - torch.count_nonzero(mask))
            hessian.add(rows, mask)
        assert hessian is not None
        return SharedHessian([(a.job, weakref.ref(a.x)) for a in arrivals], hessian, masked)

    def _candidates(self, name: str, job: int) -> list[Tensor]:
        """Masks to try: in a decoder the decoder's own mask first, where both have the same shape."""
        masks = self._masks[job]
        return masks[::-1] if "decoder" in name.split(".") else masks
