"""Hessians shared by layers that receive the same tensors (q/k/v, gate/up), in one stream or two.

Jobs 0 … N−1 are the calibration batches in the quantized model, N … 2N−1 the same batches in the
full-precision one, if there are any. Some sequences are held out: they enter no Hessian, but a probe.

Two layers share when every job brought the very same tensor object to both. Tensors are remembered by
weak reference and compared with `is`: addresses are reused by the allocator and would match falsely,
and a strong reference would keep a whole layer's activations alive.

With several processes each has some of the batches. Sums over batches are exact and taken over all processes,
held-out rows are gathered in the order of batches, and what is decided of a layer (does it share, do its rows
belong together) is decided of all of its inputs: so every process gets the same Hessian, bit for bit the one that
a single process would get, and those to which no input came get it too.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..distributed import Communicator
from ..gptq import FactorCache, Hessian, Holdout
from ..gptq.hessian import usable_rows
from ..modeling.layers import input_rows, matrix_shape, row_mask, weight_matrix
from .scheduler import LayerInput

# Parallel attention and feed-forward alternate between two inputs; encoder-decoder cross-attention
# comes back to the encoder's output in every block.
KEPT = 2

_HELD_OUT_SHARE = 16
_MOST_HELD_OUT = 8
PROBE_TOKENS = 2048  # of one layer; evenly taken from the held-out sequences


@dataclass(frozen=True)
class Rows:
    """What is known of the rows of one calibration batch.

    Attributes:
        tokens: padding of the model's input, bool (batch, tokens), True counts; in an encoder-decoder, of the
            encoder's. None where nothing is padded.
        decoder: of the decoder's input. has_decoder: whether the batch has one.
        counts: how many tokens each of the inputs has, and how many rows a flat list of image patches.
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
        patches = [len(value) for value in batch.values() if value.ndim == 2 and value.is_floating_point()]
        return cls(
            padding("attention_mask"),
            padding("decoder_attention_mask"),
            "decoder_input_ids" in batch,
            frozenset([*(value.numel() for value in ids), *patches]) if ids else frozenset(),
            first.shape[0] if first.ndim else 1,
        )

    def padding(self, name: str) -> Tensor | None:
        """The mask of the tokens that the module `name` sees, unless it sees the encoder's output."""
        in_decoder = self.has_decoder and "decoder" in name.split(".")
        return self.decoder if in_decoder else self.tokens

    def held_out_rows(self, count: int) -> Tensor | None:
        """Which of a layer's rows are held out, bool (count,); None: none are, or it cannot be told."""
        if self.held_out == 0 or count % self.sequences:
            return None
        return (torch.arange(self.sequences) >= self.sequences - self.held_out).repeat_interleave(
            count // self.sequences
        )


@dataclass(frozen=True)
class ExpertRows:
    """What the rows of an expert's input are, in one batch.

    Attributes:
        tokens: int64 (rows,), their numbers among all `total` rows of the layer's input, on the CPU.
        sent: how many of them, the first ones, the router sent; the others were added for want of tokens.
        paired: whether the same rows come first in the full-precision stream.
    """

    tokens: Tensor
    total: int
    sent: int
    paired: bool


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
    """One Hessian with its factorizations and its probe, and this process's tensors that it was made from.

    Of its rows `added` were not sent to the expert by the router; `masked` ones are padding and not in it.
    """

    inputs: list[tuple[int, weakref.ref[Tensor], int]]
    hessian: Hessian
    masked: int = 0
    added: int = 0
    probe: Holdout | None = None
    cache: FactorCache = field(default_factory=FactorCache)

    def made_from(self, arrivals: Sequence[LayerInput]) -> bool:
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
        batches: what is known of the rows of every batch of this process.
        is_encoder_output: whether a tensor is the output of the model's encoder, which cross-attention in the
            decoder receives.
        comm: the processes; all of them make a pool, and get the same layers' Hessians.
        routed: what the rows are that came to a layer in a job; None where they are simply the tokens.

    Attributes:
        unmaskable: layers whose rows are not the tokens → rows among which padding could not be told apart.
    """

    def __init__(
        self,
        batches: Sequence[Rows],
        is_encoder_output: Callable[[Tensor], bool] = lambda x: False,
        comm: Communicator | None = None,
        routed: Callable[[str, int], ExpertRows | None] = lambda layer, job: None,
    ) -> None:
        self._batches = batches
        self._routed = routed
        self._is_encoder_output = is_encoder_output
        self._comm = comm or Communicator()
        [self._probed] = self._comm.all_reduce_sum(sum(batch.held_out > 0 for batch in batches))
        self._pool: list[SharedHessian] = []
        self.unmaskable: Counter[str] = Counter()

    def get(self, name: str, module: nn.Module, arrivals: Sequence[LayerInput]) -> SharedHessian:
        """The Hessian of everything that arrived at `module`; padding never enters it."""
        if isinstance(module, nn.Conv2d):
            return self._accumulate(name, module, arrivals)
        same = self._prune(arrivals)
        if same is not None:
            return same
        entry = self._accumulate(name, module, arrivals)
        self._pool = [*self._pool[1 - KEPT :], entry]
        return entry

    def prune(self) -> None:
        """Let go of Hessians that no other layer can share."""
        self._prune(())

    def _prune(self, arrivals: Sequence[LayerInput]) -> SharedHessian | None:
        """The same; returns the Hessian that was made from these very inputs, if there is one."""
        pool, count = self._pool, len(self._pool)
        flags = self._comm.all_reduce_and(
            *(one.alive for one in pool), *(one.made_from(arrivals) for one in pool)
        )
        self._pool = [one for one, alive in zip(pool, flags[:count], strict=True) if alive]
        return next((one for one, same in zip(pool, flags[count:], strict=True) if same), None)

    def _accumulate(self, name: str, module: nn.Module, arrivals: Sequence[LayerInput]) -> SharedHessian:
        N = len(self._batches)
        quantized = [arrival for arrival in arrivals if arrival.job < N]
        full = self._partners(name, module, quantized, {a.job - N: a.x for a in arrivals if a.job >= N})
        [paired] = self._comm.all_reduce_and(bool(full) or not quantized)
        full = full if paired else {}
        entry = self._sums(name, module, arrivals, full, holding_out=paired)
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
        arrivals: Sequence[LayerInput],
        full: Mapping[int, Tensor],
        *,
        holding_out: bool,
    ) -> SharedHessian:
        device = arrivals[0].x.device if arrivals else weight_matrix(module).device
        entry = SharedHessian(
            [(a.job, weakref.ref(a.x), a.x._version) for a in arrivals],
            Hessian(matrix_shape(module)[1], device=device),
        )
        H, probe = entry.hessian, _ProbeRows(PROBE_TOKENS // max(1, self._probed))
        quantized = [arrival for arrival in arrivals if arrival.job < len(self._batches)]

        def streams(arrival: LayerInput) -> tuple[Tensor, Tensor | None]:
            X = input_rows(module, arrival.x)
            return X, input_rows(module, full[arrival.job])[: X.shape[0]] if full else None

        counted: dict[int, tuple[Tensor | None, Tensor | None]] = {}

        def foresee(*, check_finite: bool) -> None:
            for arrival in quantized:
                X, X_full = streams(arrival)
                if arrival.job not in counted:
                    counted[arrival.job] = self._counted(name, entry, arrival, X, holding_out)
                H.observe_range(X, counted[arrival.job][0], X_full, check_finite=check_finite)

        foresee(check_finite=False)
        if not H.in_range:
            H.reset()
            foresee(check_finite=True)
        H.freeze_units(self._comm.all_gather_rows(H.range_stats))
        for arrival in quantized:
            X, X_full = streams(arrival)
            mask, held = counted[arrival.job]
            H.add(X, mask, X_full)
            if held is not None and X_full is not None:
                probe.add(X, X_full, held)
        H.dropped += probe.dropped
        self._sum_up(entry)
        entry.probe = self._gathered(probe, H.n, device) if holding_out else None
        return entry

    def _counted(
        self, name: str, entry: SharedHessian, arrival: LayerInput, X: Tensor, holding_out: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Which rows of an input enter the Hessian, None: all of them; and which are held out, None: none.

        Both are on the CPU, so that no GPU has to be waited for. Padding, and tokens that the router did not send, are
        counted.
        """
        mask = self._mask(name, arrival, X)
        entry.masked += 0 if mask is None else int(mask.numel() - torch.count_nonzero(mask))
        routed = self._routed(name, arrival.job)
        entry.added += 0 if routed is None else X.shape[0] - routed.sent
        held = self._held_out(name, arrival, X) if holding_out else None
        if held is None:
            return mask, None
        return (~held, held) if mask is None else (mask & ~held, held & mask)

    def _sum_up(self, entry: SharedHessian) -> None:
        """Replace every sum by that over all processes."""
        H = entry.hessian
        H.tokens, H.dropped, entry.masked, entry.added, paired = self._comm.all_reduce_sum(
            H.tokens, H.dropped, entry.masked, entry.added, int(H.has_full)
        )
        if H.tokens:
            self._comm.all_reduce_(*H.sums(full=paired > 0))

    def _gathered(self, probe: _ProbeRows, n: int, device: torch.device) -> Holdout | None:
        """The rows of all processes; None where no row was collected."""
        both = self._comm.all_gather_rows(torch.cat(probe.rows(n, device), dim=1))
        return Holdout(both[:, :n].contiguous(), both[:, n:].contiguous()) if len(both) else None

    def _partners(
        self, name: str, module: nn.Module, quantized: Sequence[LayerInput], full: Mapping[int, Tensor]
    ) -> Mapping[int, Tensor]:
        """Batch → its input in the full-precision stream; empty where the rows of the two may differ."""
        for arrival in quantized if full else ():
            x, counts = arrival.x, self._batches[arrival.job].counts
            routed = self._routed(name, arrival.job)
            if routed is not None and routed.paired and arrival.job in full:
                continue
            # Tokens that were sent to an expert, in each stream others, come as a list without sequences.
            strange = x.ndim == 2 and counts and len(x) not in counts
            if strange or arrival.job not in full or full[arrival.job].shape != x.shape:
                return {}
        return full

    def _mask(self, name: str, arrival: LayerInput, rows: Tensor) -> Tensor | None:
        """Which rows count; None: all of them."""
        padding, routed = self._padding(name, arrival), self._routed(name, arrival.job)
        if padding is None:
            return None
        if routed is not None and padding.numel() == routed.total:
            return padding.reshape(-1)[routed.tokens]
        mask = row_mask(arrival.x, padding)
        if mask is None:
            self.unmaskable[name] += rows.shape[0]
        return mask

    def _held_out(self, name: str, arrival: LayerInput, rows: Tensor) -> Tensor | None:
        """Which rows are held out; None: none are, or it cannot be told."""
        batch, routed = self._batches[arrival.job], self._routed(name, arrival.job)
        if routed is None:
            return batch.held_out_rows(rows.shape[0])
        held = batch.held_out_rows(routed.total)
        return None if held is None else held[routed.tokens]

    def _padding(self, name: str, arrival: LayerInput) -> Tensor | None:
        """The mask of the tokens that this layer sees."""
        batch = self._batches[arrival.job]
        return batch.tokens if self._is_encoder_output(arrival.x) else batch.padding(name)


def _unrelated(probe: Holdout) -> bool:
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
        chosen = chosen[:: -(-len(chosen) // self._limit) or 1].to(X.device)
        X, X_full = X[chosen].float(), X_full[chosen].float()
        good = usable_rows(X) & usable_rows(X_full)
        self.dropped += int((~good).sum())
        self._parts.append((X[good], X_full[good]))

    def rows(self, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """What was collected of both streams, float32 (rows, n)."""
        none = torch.empty(0, n, device=device)
        parts = [(none, none), *self._parts]
        return torch.cat([X for X, _ in parts]), torch.cat([X_full for _, X_full in parts])
