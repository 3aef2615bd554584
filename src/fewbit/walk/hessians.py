"""Hessians shared by layers that receive the same tensors (q/k/v, gate/up), in one stream or two.

Jobs 0 … N−1 are the calibration batches in the quantized model, N … 2N−1 the same batches in the
full-precision one, if there are any. Some sequences are held out: they enter no Hessian, but a probe.

Two layers share when every job brought the very same tensor object to both. Tensors are remembered by
weak reference and compared with `is`: addresses are reused by the allocator and would match falsely,
and a strong reference would keep a whole layer's activations alive.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..solver import FactorCache, Hessian, Probe
from ..solver.hessian import usable_rows
from .layers import input_rows, matrix_shape, row_mask
from .lockstep import Arrival

# Parallel attention and feed-forward alternate between two inputs; encoder-decoder cross-attention
# comes back to the encoder's output in every block.
_KEPT = 2

_HELD_OUT_SHARE = 16
_MOST_HELD_OUT = 8
_PROBE_TOKENS = 2048  # of one layer; evenly taken from the held-out sequences


@dataclass(frozen=True)
class Rows:
    """What is known of the rows of one calibration batch.

    Attributes:
        tokens: padding of the model's input, bool (batch, tokens), True counts; in an encoder-decoder, of the
            encoder's. None where nothing is padded.
        decoder: of the decoder's input. has_decoder: whether the batch has one.
        counts: how many tokens each of the inputs has.
        sequences: in the batch. held_out: how many of them, the last ones, enter no Hessian.
    """

    tokens: Tensor | None = None
    decoder: Tensor | None = None
    has_decoder: bool = False
    counts: frozenset[int] = frozenset()
    sequences: int = 1
    held_out: int = 0

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> Rows:
        """Of a batch of the model's keyword arguments."""

        def padding(key: str) -> Tensor | None:
            mask = batch.get(key)
            return mask.bool() if mask is not None and mask.ndim == 2 and not bool(mask.all()) else None

        ids = [value for key, value in batch.items() if key.endswith("input_ids")]
        first = ids[0] if ids else next(iter(batch.values()))
        return cls(
            padding("attention_mask"),
            padding("decoder_attention_mask"),
            "decoder_input_ids" in batch,
            frozenset(value.numel() for value in ids),
            first.shape[0] if first.ndim else 1,
        )

    def held_out_rows(self, count: int) -> Tensor | None:
        """Which of a layer's rows are held out, bool (count,); None: none are, or it cannot be told."""
        if self.held_out == 0 or count % self.sequences:
            return None
        return (torch.arange(self.sequences) >= self.sequences - self.held_out).repeat_interleave(
            count // self.sequences
        )


def hold_out(batches: Sequence[Rows]) -> list[Rows]:
    """The batches with about a sixteenth of all sequences held out: the last ones, at least one of two."""
    sequences = sum(rows.sequences for rows in batches)
    wanted = min(max(sequences // _HELD_OUT_SHARE, 1), _MOST_HELD_OUT) if sequences > 1 else 0
    result: list[Rows] = []
    for rows in reversed(batches):
        taken = min(wanted, rows.sequences)
        wanted -= taken
        result.append(replace(rows, held_out=taken))
    return result[::-1]


@dataclass
class SharedHessian:
    """One Hessian with its factorizations and its probe, and the tensors it was made from."""

    inputs: list[tuple[int, weakref.ref[Tensor], int]]
    hessian: Hessian
    masked: int = 0
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
        batches: what is known of the rows of every batch.
        is_encoder_output: whether a tensor is the output of the model's encoder, which cross-attention in the
            decoder receives.

    Attributes:
        unmaskable: layers whose rows are not the tokens → rows among which padding could not be told apart.
    """

    def __init__(
        self,
        batches: Sequence[Rows],
        is_encoder_output: Callable[[Tensor], bool] = lambda x: False,
    ) -> None:
        self._batches = batches
        self._is_encoder_output = is_encoder_output
        self._pool: list[SharedHessian] = []
        self.unmaskable: Counter[str] = Counter()

    def get(self, name: str, module: nn.Module, arrivals: Sequence[Arrival]) -> SharedHessian:
        """The Hessian of everything that arrived at `module`; padding never enters it."""
        plain = not isinstance(module, nn.Conv2d)
        self.prune()
        if plain:
            for entry in self._pool:
                if entry.made_from(arrivals):
                    return entry
        entry = self._accumulate(name, module, arrivals)
        if plain:
            self._pool = [*self._pool[1 - _KEPT :], entry]
        return entry

    def prune(self) -> None:
        """Let go of Hessians that no other layer can share."""
        self._pool = [entry for entry in self._pool if entry.alive]

    def _accumulate(self, name: str, module: nn.Module, arrivals: Sequence[Arrival]) -> SharedHessian:
        N = len(self._batches)
        quantized = [arrival for arrival in arrivals if arrival.job < N]
        full = self._partners(module, quantized, {a.job - N: a.x for a in arrivals if a.job >= N})
        entry = self._sums(name, module, arrivals, full, holding_out=bool(full))
        if entry.probe is not None and _unrelated(entry.probe):
            entry = self._sums(name, module, arrivals, {}, holding_out=False)
        elif entry.hessian.tokens == 0 and entry.probe is not None:
            # Only held-out sequences came here: better a Hessian than a judgement.
            entry = self._sums(name, module, arrivals, full, holding_out=False)
        return entry

    def _sums(
        self,
        name: str,
        module: nn.Module,
        arrivals: Sequence[Arrival],
        full: Mapping[int, Tensor],
        *,
        holding_out: bool,
    ) -> SharedHessian:
        entry = SharedHessian(
            [(a.job, weakref.ref(a.x), a.x._version) for a in arrivals],
            Hessian(matrix_shape(module)[1], device=arrivals[0].x.device),
        )
        quantized = [arrival for arrival in arrivals if arrival.job < len(self._batches)]
        probe = _ProbeRows(_PROBE_TOKENS // max(1, sum(batch.held_out > 0 for batch in self._batches)))
        for arrival in quantized:
            X = input_rows(module, arrival.x)
            X_full = input_rows(module, full[arrival.job]) if full else None
            mask = self._mask(name, arrival, X)
            entry.masked += 0 if mask is None else int(mask.numel() - torch.count_nonzero(mask))
            held = self._batches[arrival.job].held_out_rows(X.shape[0]) if holding_out else None
            if held is not None and X_full is not None:
                held = held.to(X.device)
                probe.add(X, X_full, held if mask is None else held & mask)
                mask = ~held if mask is None else mask & ~held
            entry.hessian.add(X, mask, X_full)
        entry.hessian.dropped += probe.dropped
        entry.probe = probe.probe()
        return entry

    def _partners(
        self, module: nn.Module, quantized: Sequence[Arrival], full: Mapping[int, Tensor]
    ) -> Mapping[int, Tensor]:
        """Batch → its input in the full-precision stream; empty where the rows of the two may differ."""
        for arrival in quantized if full else ():
            x, counts = arrival.x, self._batches[arrival.job].counts
            # An expert gets the tokens that were routed to it: in each stream others.
            routed = not isinstance(module, nn.Conv2d) and counts and x[..., 0].numel() not in counts
            if routed or arrival.job not in full or full[arrival.job].shape != x.shape:
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
        batch = self._batches[arrival.job]
        in_decoder = batch.has_decoder and "decoder" in name.split(".")
        return batch.decoder if in_decoder and not self._is_encoder_output(arrival.x) else batch.tokens


def _unrelated(probe: Probe) -> bool:
    """Whether the rows of the two streams differ like rows of different tokens, however alike their shapes."""
    return bool((probe.X_full - probe.X).square().sum() > probe.X_full.square().sum())


class _ProbeRows:
    """Collects evenly spaced held-out rows, at most `limit` of each batch; counts those it had to drop."""

    def __init__(self, limit: int) -> None:
        self.dropped = 0
        self._limit = max(1, limit)
        self._parts: list[tuple[Tensor, Tensor]] = []

    def add(self, X: Tensor, X_full: Tensor, held_out: Tensor) -> None:
        chosen = held_out.nonzero()[:, 0]
        chosen = chosen[:: -(-len(chosen) // self._limit) or 1]
        X, X_full = X[chosen].float(), X_full[chosen].float()
        good = usable_rows(X) & usable_rows(X_full)
        self.dropped += int((~good).sum())
        self._parts.append((X[good], X_full[good]))

    def probe(self) -> Probe | None:
        """None where no row was collected."""
        if not any(len(rows) for rows, _ in self._parts):
            return None
        X, X_full = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        return Probe(X, X_full)
