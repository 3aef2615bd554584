"""The end of a block with --tune: its layers, solved one by one, are tuned jointly.

The scheduler delivers the calls of a block on the quantized and on the full-precision path of every batch. They become
the training and holdout calls of `tune_block.tune_block`.
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
    """Tunes blocks and collects what was gained.

    The holdout sequences are the same as for the solver: they do not enter the Hessians.

    Attributes:
        batches: Row masks of every batch; jobs N … 2N−1 are the full-precision passes of jobs 0 … N−1.
        steps: Optimizer steps per block.
        seed: Seed for the order in which batches are used.
        comm: Processes that share the work; each has its batches, and all tune the same blocks.
        skipped: Block → reason why it was not tuned.
        dropped: Batches with values that are not finite.
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
        calls: Sequence[BlockCall],
    ) -> TuneResult | None:
        """Tune one block. Return None if that is not possible; `skipped` then has the reason.

        Args:
            name: Name of the block.
            block: The block.
            codes: Name of a layer inside the block → its quantized matrix.
            weights: Name of a layer inside the block → its original weight matrix (out, in).
            calls: Calls of the block on both paths.
        """
        reason = next(filter(None, self.comm.all_gather_object(_unsupported_reason(block, calls))), None)
        train, held_out = ([], []) if reason else self._training_calls(name, calls)
        if not reason and not all(self.comm.all_reduce_sum(len(train), len(held_out))):
            reason = "too few sequences went through it in both streams, or their outputs are not finite"
        if reason:
            self.skipped[name] = reason
            return None
        layers = {layer: (matrix, weights[layer]) for layer, matrix in codes.items()}
        return tune_block(block, layers, train, held_out, steps=self.steps, seed=self.seed, comm=self.comm)

    def notes(self, records: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Summarize what was gained, in this run and in the run that it resumed, and what was left out.

        Args:
            records: Records of all layers by name.
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

    def _training_calls(
        self, name: str, block_calls: Sequence[BlockCall]
    ) -> tuple[list[TrainingCall], list[TrainingCall]]:
        """Divide calls into training and holdout calls; a batch with sequences of both kinds is in both lists."""
        N = len(self.batches)
        targets = {call.job - N: _states(call.output) for call in block_calls if call.job >= N}
        train: list[TrainingCall] = []
        held_out: list[TrainingCall] = []
        for call in block_calls:
            if call.job not in targets or targets[call.job].shape != _states(call.output).shape:
                continue
            target, batch = targets[call.job], self.batches[call.job]
            if not (_finite(target) and _finite(_states(call.output))):
                self.dropped.add(call.job)  # one such token makes every gradient non-finite
                continue
            counts = _counts(name, batch, target)
            held = batch.held_out_rows(counts.numel())
            holdout = torch.zeros_like(counts) if held is None else counts & held.to(counts.device)
            for calls, mask in ((train, counts & ~holdout), (held_out, holdout)):
                if bool(mask.any()):
                    calls.append(TrainingCall(call.args, call.kwargs, target, mask))
        return train, held_out


def _counts(name: str, batch: BatchMasks, target: Tensor) -> Tensor:
    """Return the mask of the tokens that are not padding, flattened: bool (tokens,)."""
    padding = batch.decoder if batch.has_decoder and "decoder" in name.split(".") else batch.tokens
    mask = None if padding is None else row_mask(target, padding)
    if mask is None:
        return torch.ones(target[..., 0].numel(), dtype=torch.bool, device=target.device)
    return mask.to(target.device)


def _finite(states: Tensor) -> bool:
    return bool(torch.isfinite(states).all())


def _unsupported_reason(block: nn.Module, calls: Sequence[BlockCall]) -> str | None:
    """Say why a block cannot be tuned; None if it can."""
    if any(isinstance(module, nn.Conv2d) for module in block.modules()):
        return "it has convolutions, whose outputs are not states of tokens"
    if not all(isinstance(call.output, (Tensor, tuple)) for call in calls):
        return "its output is neither a tensor nor a tuple that begins with one"
    if not all(isinstance(_states(call.output), Tensor) for call in calls):
        return "its output does not begin with a tensor"
    if not all(call.intact for call in calls):
        return "it changes its inputs in place, so that it cannot be run again"
    return None


def _states(output: Any) -> Tensor:
    """Return the hidden states in a block's output: the output itself, or the first of a tuple."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states
