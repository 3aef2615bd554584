"""Hessians of layer inputs: padding left out, hold-out rows set aside, shared by layers with the same input.

Jobs 0 ... N−1 are the calibration batches on the quantized path, N ... 2N−1 the same batches on the full-precision
path, if there is one. Some sequences are held out: their rows enter no Hessian, but the `Holdout` that judges the
correction.

Two layers share a Hessian if every job passed the very same tensor object to both (q/k/v, gate/up). Tensors are kept as
weak references and compared with `is`: the allocator reuses addresses, so comparing those would give false matches, and
a strong reference would keep a whole layer's activations alive.

With several processes, each has some of the batches. Sums over batches are exact and taken over all ranks, hold-out
rows are gathered in batch order, and every decision about a layer (does it share a Hessian, do its rows belong to the
same tokens) depends on the inputs of all ranks. So every rank, including one that received no input, gets the same
Hessian, bit for bit the one of a single process.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..distributed import Communicator
from ..gptq import Hessian, Holdout, InputGroup
from ..gptq.hessian import usable_rows
from ..modeling.layers import input_rows, matrix_shape, row_mask, weight_matrix
from .later_passes import LaterInputs
from .scheduler import LayerInput

# Hessians that wait for other layers with the same input. Parallel attention and feed-forward alternate between two
# inputs; encoder-decoder cross-attention returns to the encoder's output in every block.
CACHED_HESSIANS = 2

_HELD_OUT_SHARE = 16
_MOST_HELD_OUT = 8
HOLDOUT_TOKENS = 2048  # of one layer; evenly spaced in the held-out sequences


@dataclass(frozen=True)
class BatchMasks:
    """Which rows of one calibration batch count.

    Attributes:
        tokens: padding mask of the model's input (of the encoder's in an encoder-decoder), bool (batch, tokens), True
            for real tokens; None where nothing is padded.
        decoder: padding mask of the decoder's input.
        has_decoder: whether the batch has a decoder input.
        counts: token count of each input, and row count of a flat list of image patches.
        sequences: number of sequences in the batch.
        held_out: number of sequences, the last ones, that enter no Hessian.
    """

    tokens: Tensor | None = None
    decoder: Tensor | None = None
    has_decoder: bool = False
    counts: frozenset[int] = frozenset()
    sequences: int = 1
    held_out: int = 0

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> BatchMasks:
        """Build the masks of a batch of model keyword arguments."""

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
        """Return the padding mask for the module `name`, unless it receives the encoder's output."""
        in_decoder = self.has_decoder and "decoder" in name.split(".")
        return self.decoder if in_decoder else self.tokens

    def held_out_rows(self, count: int) -> Tensor | None:
        """Return which of `count` rows are held out, bool (count,); None if none are, or it is unknown."""
        if self.held_out == 0 or count % self.sequences:
            return None
        return (torch.arange(self.sequences) >= self.sequences - self.held_out).repeat_interleave(
            count // self.sequences
        )


@dataclass(frozen=True)
class ExpertRows:
    """The rows of an expert's input in one batch."""

    tokens: Tensor  # row numbers in the whole layer's input, int64 (rows,), on the CPU
    total: int  # rows of the whole layer's input
    routed: int  # rows, the first ones, that the router sent; the others are borrowed
    paired: bool  # the same rows come first on the full-precision path


def split_holdout(batches: Sequence[BatchMasks]) -> list[BatchMasks]:
    """Hold out about a sixteenth of all sequences: the last ones, at least one of two."""
    sequences = sum(masks.sequences for masks in batches)
    wanted = min(max(sequences // _HELD_OUT_SHARE, 1), _MOST_HELD_OUT) if sequences > 1 else 0
    result: list[BatchMasks] = []
    for masks in reversed(batches):
        taken = min(wanted, masks.sequences)
        wanted -= taken
        result.append(replace(masks, held_out=taken))
    return result[::-1]


@dataclass
class SharedHessian:
    """One Hessian with its factorizations and hold-out rows, shared by layers with the same input."""

    inputs: list[tuple[int, weakref.ref[Tensor], int]]  # of this process: job, weak reference, version
    hessian: Hessian  # H, and C where there is a full-precision path
    masked: int = 0  # padding rows, which are not in H
    borrowed: int = 0  # rows in H that the router did not send to the expert
    holdout: Holdout | None = None  # rows of both paths

    @functools.cached_property
    def group(self) -> InputGroup:
        """The solver's view of this Hessian, with the factorizations that layers share."""
        return InputGroup(self.hessian, self.holdout)

    def made_from(self, inputs: Sequence[LayerInput]) -> bool:
        """Whether `inputs` are exactly the tensors of this Hessian, unchanged since."""
        return len(inputs) == len(self.inputs) and all(
            given.job == job and reference() is given.x and given.x._version == version
            for given, (job, reference, version) in zip(inputs, self.inputs, strict=True)
        )

    @property
    def alive(self) -> bool:
        """Whether another layer could still receive these tensors."""
        return all(reference() is not None for _, reference, _ in self.inputs)


class HessianPool:
    """Accumulates a Hessian at each sync point, and returns the same one for layers with the same inputs.

    Args:
        batches: masks of every batch of this process.
        is_encoder_output: whether a tensor is the output of the model's encoder, which the decoder's cross-attention
            receives.
        comm: ranks of the run; each makes a pool and asks it for the same layers.
        expert_rows: returns the rows of an expert layer's input in a job; None for layers whose rows are the tokens.
        later: inputs of the further uses of layers that run several times.

    Attributes:
        unmaskable: layer whose rows are not the tokens → number of rows among which padding is unknown.
    """

    def __init__(
        self,
        batches: Sequence[BatchMasks],
        is_encoder_output: Callable[[Tensor], bool] = lambda x: False,
        comm: Communicator | None = None,
        expert_rows: Callable[[str, int], ExpertRows | None] = lambda layer, job: None,
        later: LaterInputs | None = None,
    ) -> None:
        self._batches = batches
        self._expert_rows = expert_rows
        self._is_encoder_output = is_encoder_output
        self._comm = comm or Communicator()
        self._later = later or LaterInputs({})
        [with_holdout] = self._comm.all_reduce_sum(sum(batch.held_out > 0 for batch in batches))
        self._holdout_tokens = HOLDOUT_TOKENS // max(1, with_holdout)  # of each batch
        self._pool: list[SharedHessian] = []
        self.unmaskable: Counter[str] = Counter()

    def get(self, name: str, module: nn.Module, inputs: Sequence[LayerInput]) -> SharedHessian:
        """Return the Hessian of everything that reached `module`, without padding."""
        if isinstance(module, nn.Conv2d) or name in self._later.uses:
            own = self._accumulate(name, module, inputs)
            self._later.include(name, own.hessian)
            return own
        shared = self._find(inputs)
        if shared is None:
            shared = self._accumulate(name, module, inputs)
            self._pool = [*self._pool[1 - CACHED_HESSIANS :], shared]
        return shared

    def of_later_use(self, name: str, module: nn.Module, inputs: Sequence[LayerInput]) -> Hessian:
        """Return the Hessian of a further use, on the full-precision path only."""
        return self._sums(name, module, inputs, {}, holding_out=True).hessian

    def prune(self) -> None:
        """Drop the Hessians that no other layer can share."""
        self._find(())

    def _find(self, inputs: Sequence[LayerInput]) -> SharedHessian | None:
        """Prune the pool, and return the Hessian that was made from these inputs on every rank, if there is one."""
        pool, count = self._pool, len(self._pool)
        flags = self._comm.all_reduce_and(
            *(shared.alive for shared in pool), *(shared.made_from(inputs) for shared in pool)
        )
        self._pool = [shared for shared, alive in zip(pool, flags[:count], strict=True) if alive]
        return next((shared for shared, same in zip(pool, flags[count:], strict=True) if same), None)

    def _accumulate(self, name: str, module: nn.Module, inputs: Sequence[LayerInput]) -> SharedHessian:
        N = len(self._batches)
        quantized = [given for given in inputs if given.job < N]
        full = self._full_inputs(
            name, quantized, {given.job - N: given.x for given in inputs if given.job >= N}
        )
        [paired] = self._comm.all_reduce_and(bool(full) or not quantized)
        full = full if paired else {}
        shared = self._sums(name, module, inputs, full, holding_out=paired)
        if shared.holdout is not None and _unrelated(shared.holdout):
            shared = self._sums(name, module, inputs, {}, holding_out=False)
        elif shared.hessian.tokens == 0 and shared.holdout is not None:
            # Only held-out sequences reached this layer: a Hessian is worth more than a judgement.
            shared = self._sums(name, module, inputs, full, holding_out=False)
        return shared

    def _sums(
        self,
        name: str,
        module: nn.Module,
        inputs: Sequence[LayerInput],
        full: Mapping[int, Tensor],
        *,
        holding_out: bool,
    ) -> SharedHessian:
        """Sum H = Σ x xᵀ and P = Σ x̃ xᵀ over all ranks, and collect the hold-out rows.

        Args:
            full: batch → input on the full-precision path; empty without that path.
        """
        device = inputs[0].x.device if inputs else weight_matrix(module).device
        H = Hessian(matrix_shape(module)[1], device=device)
        shared = SharedHessian([(given.job, weakref.ref(given.x), given.x._version) for given in inputs], H)
        quantized = [given for given in inputs if given.job < len(self._batches)]
        masks: dict[int, tuple[Tensor | None, Tensor | None]] = {}

        def paths(given: LayerInput) -> tuple[Tensor, Tensor | None]:
            X = input_rows(module, given.x)
            return X, input_rows(module, full[given.job])[: X.shape[0]] if full else None

        def observe(*, check_finite: bool) -> None:
            for given in quantized:
                X, X_full = paths(given)
                if given.job not in masks:
                    masks[given.job] = self._masks(name, shared, given, X.shape[0], holding_out)
                H.observe_range(X, masks[given.job][0], X_full, check_finite=check_finite)

        # First pass over the rows: their range fixes the units in which H is accumulated exactly.
        observe(check_finite=False)
        if not H.in_range:  # some row is not finite: find out which
            H.reset()
            observe(check_finite=True)
        H.freeze_units(self._comm.all_gather_rows(H.range_stats))
        # Second pass: the products.
        holdout = _HoldoutRows(self._holdout_tokens)
        for given in quantized:
            X, X_full = paths(given)
            mask, held = masks[given.job]
            H.add(X, mask, X_full)
            if held is not None and X_full is not None:
                holdout.add(X, X_full, held)
        H.dropped += holdout.dropped
        # Sums of integers: the same on all ranks, however the batches are divided.
        H.tokens, H.dropped, shared.masked, shared.borrowed, paired = self._comm.all_reduce_sum(
            H.tokens, H.dropped, shared.masked, shared.borrowed, int(H.has_full)
        )
        if H.tokens:
            self._comm.all_reduce_(*H.sums(full=paired > 0))
        if holding_out:
            both = self._comm.all_gather_rows(torch.cat(holdout.rows(H.n, device), dim=1))
            if len(both):
                shared.holdout = Holdout(both[:, : H.n].contiguous(), both[:, H.n :].contiguous())
        return shared

    def _masks(
        self, name: str, shared: SharedHessian, given: LayerInput, rows: int, holding_out: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return which rows enter the Hessian (None: all), and which are held out (None: none); count the others.

        Both masks are on the CPU, to avoid GPU synchronization.
        """
        mask, expert = self._mask(name, given, rows), self._expert_rows(name, given.job)
        shared.masked += 0 if mask is None else int(mask.numel() - torch.count_nonzero(mask))
        shared.borrowed += 0 if expert is None else rows - expert.routed
        held = self._held_out(name, given, rows) if holding_out else None
        if held is None:
            return mask, None
        return (~held, held) if mask is None else (mask & ~held, held & mask)

    def _full_inputs(
        self, name: str, quantized: Sequence[LayerInput], full: Mapping[int, Tensor]
    ) -> Mapping[int, Tensor]:
        """Return `full` (batch → full-precision input) if its rows belong to the same tokens; otherwise nothing."""
        for given in quantized if full else ():
            x, counts = given.x, self._batches[given.job].counts
            expert = self._expert_rows(name, given.job)
            if expert is not None and expert.paired and given.job in full:
                continue
            # Tokens routed to an expert, different ones on each path, come as a list without sequences.
            unknown = x.ndim == 2 and counts and len(x) not in counts
            if unknown or given.job not in full or full[given.job].shape != x.shape:
                return {}
        return full

    def _mask(self, name: str, given: LayerInput, rows: int) -> Tensor | None:
        """Return which rows are not padding; None: all of them."""
        batch, expert = self._batches[given.job], self._expert_rows(name, given.job)
        padding = batch.tokens if self._is_encoder_output(given.x) else batch.padding(name)
        if padding is None:
            return None
        if expert is not None and padding.numel() == expert.total:
            return padding.reshape(-1)[expert.tokens]
        mask = row_mask(given.x, padding)
        if mask is None:
            self.unmaskable[name] += rows
        return mask

    def _held_out(self, name: str, given: LayerInput, rows: int) -> Tensor | None:
        """Return which rows are held out; None if none are, or it is unknown."""
        batch, expert = self._batches[given.job], self._expert_rows(name, given.job)
        if expert is None:
            return batch.held_out_rows(rows)
        held = batch.held_out_rows(expert.total)
        return None if held is None else held[expert.tokens]


def _unrelated(holdout: Holdout) -> bool:
    """Whether the rows of the two paths differ as much as rows of different tokens: ‖X̃ − X‖ > ‖X̃‖."""
    return bool((holdout.X_full - holdout.X).square().sum() > holdout.X_full.square().sum())


class _HoldoutRows:
    """Collects evenly spaced hold-out rows, at most `limit` of each batch; counts the rows that are not finite."""

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
        """Return the collected rows of both paths, float32 (rows, n)."""
        none = torch.empty(0, n, device=device)
        parts = [(none, none), *self._parts]
        return torch.cat([X for X, _ in parts]), torch.cat([X_full for _, X_full in parts])
