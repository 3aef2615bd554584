"""Hessians shared by layers that receive the same tensors (q/k/v, gate/up).

Two layers share when every job brought the very same tensor object to both. Tensors are remembered by
weak reference and compared with `is`: addresses are reused by the allocator and would match falsely,
and a strong reference would keep a whole layer's activations alive.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..solver import FactorCache, Hessian
from .layers import input_rows, row_mask
from .lockstep import Arrival

# Parallel attention and feed-forward alternate between two inputs; encoder-decoder cross-attention
# comes back to the encoder's output in every block.
_KEPT = 2


@dataclass(frozen=True)
class Masks:
    """Padding of one job: bool (batch, tokens), True counts; None where nothing is padded.

    Attributes:
        tokens: of the model's input; in an encoder-decoder, of the encoder's.
        decoder: of the decoder's input. has_decoder: whether the job has one.
    """

    tokens: Tensor | None = None
    decoder: Tensor | None = None
    has_decoder: bool = False

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> Masks:
        """The masks in a batch of the model's keyword arguments."""

        def padding(key: str) -> Tensor | None:
            mask = batch.get(key)
            return mask.bool() if mask is not None and mask.ndim == 2 and not bool(mask.all()) else None

        return cls(padding("attention_mask"), padding("decoder_attention_mask"), "decoder_input_ids" in batch)


@dataclass
class SharedHessian:
    """One Hessian with its factorizations, and the tensors it was made from."""

    inputs: list[tuple[int, weakref.ref[Tensor], int]]
    hessian: Hessian
    masked: int
    cache: FactorCache = field(default_factory=FactorCache)

    def made_from(self, arrivals: Sequence[Arrival]) -> bool:
        """Whether `arrivals` are exactly the tensors of this Hessian, unchanged since."""
        return len(arrivals) == len(self.inputs) and all(
            arrival.job == job and reference() is arrival.x and arrival.x._version == version
            for arrival, (job, reference, version) in zip(arrivals, self.inputs, strict=True)
        )

    @property
    def alive(self) -> bool:
        """Whether another layer could still receive these tensors."""
        return all(reference() is not None for _, reference, _ in self.inputs)


class HessianPool:
    """Accumulates Hessians at meeting points and hands the same one to layers with the same inputs.

    Args:
        masks: for every job, its padding.
        is_encoder_output: whether a tensor is the output of the model's encoder, which cross-attention in the
            decoder receives.
    """

    def __init__(
        self, masks: Sequence[Masks], is_encoder_output: Callable[[Tensor], bool] = lambda x: False
    ) -> None:
        self._masks = masks
        self._is_encoder_output = is_encoder_output
        self._pool: list[SharedHessian] = []
        self.unmaskable: Counter[str] = Counter()

    def get(self, name: str, module: nn.Module, arrivals: Sequence[Arrival]) -> SharedHessian:
        """The Hessian of everything that arrived at `module`; padding never enters it."""
        plain = not isinstance(module, nn.Conv2d)
        self._pool = [entry for entry in self._pool if entry.alive]
        if plain:
            for entry in self._pool:
                if entry.made_from(arrivals):
                    return entry
        entry = self._accumulate(name, module, arrivals)
        if plain:
            self._pool = [*self._pool[1 - _KEPT :], entry]
        return entry

    def _accumulate(self, name: str, module: nn.Module, arrivals: Sequence[Arrival]) -> SharedHessian:
        hessian: Hessian | None = None
        masked = 0
        for arrival in arrivals:
            rows = input_rows(module, arrival.x)
            hessian = hessian or Hessian(rows.shape[1], device=rows.device)
            padding = self._padding(name, arrival)
            mask = None if padding is None else row_mask(arrival.x, padding)
            if mask is not None:
                masked += int(mask.numel() - torch.count_nonzero(mask))
            elif padding is not None:
                self.unmaskable[name] += rows.shape[0]
            hessian.add(rows, mask)
        assert hessian is not None
        return SharedHessian([(a.job, weakref.ref(a.x), a.x._version) for a in arrivals], hessian, masked)

    def _padding(self, name: str, arrival: Arrival) -> Tensor | None:
        """The mask of the tokens that this layer sees."""
        masks = self._masks[arrival.job]
        in_decoder = masks.has_decoder and "decoder" in name.split(".")
        return masks.decoder if in_decoder and not self._is_encoder_output(arrival.x) else masks.tokens
