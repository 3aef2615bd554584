"""Hessians shared by layers that receive the same tensors (q/k/v, gate/up), in one stream or two.

Jobs 0 … N−1 are the calibration batches in the quantized model, N … 2N−1 the same batches in the
full-precision one, if there are any. Some batches are held out: they enter no Hessian, but a probe.

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

from ..solver import FactorCache, Hessian, Probe
from .layers import input_rows, matrix_shape, row_mask
from .lockstep import Arrival

# Parallel attention and feed-forward alternate between two inputs; encoder-decoder cross-attention
# comes back to the encoder's output in every block.
_KEPT = 2

_HELD_OUT_SHARE = 16
_MOST_HELD_OUT = 8
_PROBE_TOKENS = 2048  # of one layer; evenly taken from the held-out batches


@dataclass(frozen=True)
class Masks:
    """Padding of one job: bool (batch, tokens), True counts; None where nothing is padded.

    Attributes:
        tokens: of the model's input; in an encoder-decoder, of the encoder's.
        decoder: of the decoder's input. has_decoder: whether the job has one.
        counts: how many tokens each of the inputs has.
    """

    tokens: Tensor | None = None
    decoder: Tensor | None = None
    has_decoder: bool = False
    counts: frozenset[int] = frozenset()

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> Masks:
        """The masks in a batch of the model's keyword arguments."""

        def padding(key: str) -> Tensor | None:
            mask = batch.get(key)
            return mask.bool() if mask is not None and mask.ndim == 2 and not bool(mask.all()) else None

        ids = (value for key, value in batch.items() if key.endswith("input_ids"))
        return cls(
            padding("attention_mask"),
            padding("decoder_attention_mask"),
            "decoder_input_ids" in batch,
            frozenset(value.numel() for value in ids),
        )


@dataclass(frozen=True)
class Streams:
    """Which jobs are what.

    Attributes:
        batches: N. paired: whether the full-precision stream runs. held_out: batches that enter no Hessian.
    """

    batches: int
    paired: bool = False
    held_out: frozenset[int] = frozenset()

    @classmethod
    def of(cls, batches: int, *, paired: bool) -> Streams:
        """About a sixteenth of the batches is held out, at least one of two, at most eight."""
        count = min(max(batches // _HELD_OUT_SHARE, 1), _MOST_HELD_OUT) if paired and batches > 1 else 0
        return cls(batches, paired, frozenset(range(batches - count, batches)))

    @property
    def references(self) -> range:
        """The jobs of the full-precision stream."""
        return range(self.batches, 2 * self.batches if self.paired else self.batches)


@dataclass
class SharedHessian:
    """One Hessian with its factorizations and its probe, and the tensors it was made from."""

    inputs: list[tuple[int, weakref.ref[Tensor], int]]
    hessian: Hessian
    masked: int
    probe: Probe | None = None
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
        masks: for every batch, its padding.
        streams: which jobs are what; by default one stream, nothing held out.
        is_encoder_output: whether a tensor is the output of the model's encoder, which cross-attention in the
            decoder receives.

    Attributes:
        unmaskable: layers whose rows are not the tokens → rows among which padding could not be told apart.
        unpaired: layers at which the rows of the two streams do not belong together, so that nothing could be
            corrected there → how often.
    """

    def __init__(
        self,
        masks: Sequence[Masks],
        streams: Streams | None = None,
        is_encoder_output: Callable[[Tensor], bool] = lambda x: False,
    ) -> None:
        self._masks = masks
        self._streams = streams or Streams(len(masks))
        self._is_encoder_output = is_encoder_output
        self._pool: list[SharedHessian] = []
        self.unmaskable: Counter[str] = Counter()
        self.unpaired: Counter[str] = Counter()

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
        streams = self._streams
        quantized = [arrival for arrival in arrivals if arrival.job < streams.batches]
        partners = self._partners(name, module, quantized, arrivals)
        # Held-out batches judge; where nothing else came, or nothing to compare with, they count like others.
        held_out = streams.held_out if partners else frozenset()
        if all(arrival.job in held_out for arrival in quantized):
            held_out = frozenset()
        hessian = Hessian(matrix_shape(module)[1], device=arrivals[0].x.device)
        masked, probe = 0, _ProbeRows(_PROBE_TOKENS // max(1, len(held_out)))
        for arrival in quantized:
            rows = input_rows(module, arrival.x)
            full = input_rows(module, partners[arrival.job]) if partners else None
            mask = self._mask(name, arrival, rows)
            if arrival.job in held_out and full is not None:
                probe.add(rows, full, mask)
                continue
            if mask is not None:
                masked += int(mask.numel() - torch.count_nonzero(mask))
            hessian.add(rows, mask, full)
        inputs = [(a.job, weakref.ref(a.x), a.x._version) for a in arrivals]
        return SharedHessian(inputs, hessian, masked, probe.probe())

    def _partners(
        self, name: str, module: nn.Module, quantized: Sequence[Arrival], arrivals: Sequence[Arrival]
    ) -> dict[int, Tensor]:
        """Batch → its input in the full-precision stream; empty where the rows of the two may differ."""
        N = self._streams.batches
        full = {arrival.job - N: arrival.x for arrival in arrivals if arrival.job >= N}
        if not full:
            return {}
        for arrival in quantized:
            x, counts = arrival.x, self._masks[arrival.job].counts
            # An expert gets the tokens that were routed to it: in each stream others.
            routed = not isinstance(module, nn.Conv2d) and x.ndim == 2 and counts and x.shape[0] not in counts
            if routed or arrival.job not in full or full[arrival.job].shape != x.shape:
                self.unpaired[name] += 1
                return {}
        return full

    def _mask(self, name: str, arrival: Arrival, rows: Tensor) -> Tensor | None:
        """Which rows count; None: all of them."""
        padding = self._padding(name, arrival)
        mask = None if padding is None else row_mask(arrival.x, padding)
        if mask is None and padding is not None:
            self.unmaskable[name] += rows.shape[0]
        return mask

    def _padding(self, name: str, arrival: Arrival) -> Tensor | None:
        """The mask of the tokens that this layer sees."""
        masks = self._masks[arrival.job]
        in_decoder = masks.has_decoder and "decoder" in name.split(".")
        return masks.decoder if in_decoder and not self._is_encoder_output(arrival.x) else masks.tokens


class _ProbeRows:
    """Collects evenly spaced rows of held-out batches, at most `limit` of each."""

    def __init__(self, limit: int) -> None:
        self._limit = max(1, limit)
        self._parts: list[tuple[Tensor, Tensor]] = []

    def add(self, rows: Tensor, full: Tensor, mask: Tensor | None) -> None:
        good = torch.isfinite(rows).all(1) & torch.isfinite(full).all(1)
        chosen = (good if mask is None else good & mask).nonzero()[:, 0]
        chosen = chosen[:: -(-len(chosen) // self._limit) or 1]
        self._parts.append((rows[chosen].float(), full[chosen].float()))

    def probe(self) -> Probe | None:
        """None where no row was collected."""
        if not any(len(rows) for rows, _ in self._parts):
            return None
        X, X_full = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        return Probe(X, X_full)
