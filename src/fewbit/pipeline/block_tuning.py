"""What happens at the end of a block: its layers, solved one by one, are tuned together.

Turns what the walk brings to the end of a block (the quantized and the full-precision passages of every
batch) into the calls that `tune.tune_block` learns from and is judged by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import Communicator
from ..modeling.layers import row_mask
from ..quantized_matrix import QuantizedMatrix
from .scheduler import BlockCall
from .statistics import BatchMasks
from .tune_block import TrainingCall, TuneResult, tune_block


@dataclass
class BlockTuner:
    """Tunes blocks, and remembers what it gained.

    The sequences that judge are those that were held out from the Hessians.

    Attributes:
        batches: what is known of the rows of every batch; jobs N … 2N−1 are their full-precision runs.
        steps: per block.
        seed: of the order in which batches are used.
        comm: the processes; each has its batches, and all tune the same blocks.
        skipped: block → why it was not tuned. dropped: batches that had values that are not finite.
    """

    batches: Sequence[BatchMasks]
    steps: int
    seed: int
    comm: Communicator = field(default_factory=Communicator)
    skipped: dict[str, str] = field(default_factory=dict)
    dropped: set[int] = field(default_factory=set)

    def tune(
        self,
        name: str,
        block: nn.Module,
        codes: Mapping[str, QuantizedMatrix],
        weights: Mapping[str, Tensor],
        passages: Sequence[BlockCall],
    ) -> TuneResult | None:
        """Tune one block; None where that is not possible: `skipped` has the reason.

        Args:
            codes, weights: name of a layer inside the block → its codes, its original weight matrix.
        """
        reason = next(filter(None, self.comm.all_gather_object(_why_not(block, passages))), None)
        train, held_out = ([], []) if reason else self._calls(name, passages)
        if not reason and not all(self.comm.all_reduce_sum(len(train), len(held_out))):
            reason = "too few sequences went through it in both streams, or their outputs are not finite"
        if reason:
            self.skipped[name] = reason
            return None
        return tune_block(
            block, codes, weights, train, held_out, steps=self.steps, seed=self.seed, comm=self.comm
        )

    def notes(self, records: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Sentences about what was gained, in this run and in one that it resumed, and what was left out.

        Args:
            records: of all layers, by name.
        """
        blocks = {r["block"]: r for r in records.values() if r["block_error"] is not None}
        kept = [record["block_error"] for record in blocks.values() if record["tuned"]]
        notes = []
        if blocks:
            left = (
                f", to {sum(after / before for before, after in kept) / len(kept):.2f} of what it was"
                if kept
                else ""
            )
            notes.append(f"tuning lowered the held-out error of {len(kept)} of {len(blocks)} blocks{left}")
        [dropped] = self.comm.all_reduce_sum(len(self.dropped))
        if dropped:
            notes.append(f"{dropped} batches with values that are not finite had no part in the tuning")
        for reason in dict.fromkeys(self.skipped.values()):
            names = [name for name, why in self.skipped.items() if why == reason]
            notes.append(f"{len(names)} blocks were not tuned, for example {names[0]}: {reason}")
        return notes

    def _calls(
        self, name: str, passages: Sequence[BlockCall]
    ) -> tuple[list[TrainingCall], list[TrainingCall]]:
        """Calls to learn from and to judge by; a batch with sequences of both kinds is in both lists."""
        N = len(self.batches)
        targets = {passage.job - N: _states(passage.output) for passage in passages if passage.job >= N}
        train: list[TrainingCall] = []
        held_out: list[TrainingCall] = []
        for passage in passages:
            if passage.job not in targets or targets[passage.job].shape != _states(passage.output).shape:
                continue
            target, batch = targets[passage.job], self.batches[passage.job]
            if not (_finite(target) and _finite(_states(passage.output))):
                self.dropped.add(passage.job)  # one such token makes every gradient useless
                continue
            counts = _counts(name, batch, target)
            held = batch.held_out_rows(counts.numel())
            judges = torch.zeros_like(counts) if held is None else counts & held.to(counts.device)
            for calls, mask in ((train, counts & ~judges), (held_out, judges)):
                if bool(mask.any()):
                    calls.append(TrainingCall(passage.args, passage.kwargs, target, mask))
        return train, held_out


def _counts(name: str, batch: BatchMasks, target: Tensor) -> Tensor:
    """Which tokens of a block's output count, flattened: all but padding."""
    padding = batch.decoder if batch.has_decoder and "decoder" in name.split(".") else batch.tokens
    mask = None if padding is None else row_mask(target, padding)
    if mask is None:
        return torch.ones(target[..., 0].numel(), dtype=torch.bool, device=target.device)
    return mask.to(target.device)


def _finite(states: Tensor) -> bool:
    return bool(torch.isfinite(states).all())


def _why_not(block: nn.Module, passages: Sequence[BlockCall]) -> str | None:
    """Why a block cannot be tuned; None if it can."""
    if any(isinstance(module, nn.Conv2d) for module in block.modules()):
        return "it has convolutions, whose outputs are not states of tokens"
    if not all(isinstance(passage.output, (Tensor, tuple)) for passage in passages):
        return "its output is neither a tensor nor a tuple that begins with one"
    if not all(isinstance(_states(passage.output), Tensor) for passage in passages):
        return "its output does not begin with a tensor"
    if not all(passage.intact for passage in passages):
        return "it changes its inputs in place, so that it cannot be run again"
    return None


def _states(output: Any) -> Tensor:
    """The hidden states in a block's output: the output itself, or the first of a tuple."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states
