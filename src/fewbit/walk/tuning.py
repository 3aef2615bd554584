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

from ..codes import Codes
from ..tune import BlockCall, TuneResult, tune_block
from .hessians import Rows
from .layers import row_mask
from .lockstep import Passage


@dataclass
class BlockTuner:
    """Tunes blocks, and remembers what it gained.

    The sequences that judge are those that entered no Hessian.

    Attributes:
        batches: what is known of the rows of every batch; jobs N … 2N−1 are their full-precision runs.
        steps: per block.
        seed: of the order in which batches are used.
        results: block → what tuning did to it.
    """

    batches: Sequence[Rows]
    steps: int
    seed: int
    results: dict[str, TuneResult] = field(default_factory=dict)

    def tune(
        self,
        name: str,
        block: nn.Module,
        codes: Mapping[str, Codes],
        weights: Mapping[str, Tensor],
        passages: Sequence[Passage],
    ) -> TuneResult:
        """Tune one block.

        Args:
            codes, weights: name of a layer inside the block → its codes, its original weight matrix.

        Raises:
            CalibrationError: no sequence is left to judge by.
            ModelError: the block cannot be called again as it was.
        """
        train, held_out = self._calls(name, passages)
        result = tune_block(block, codes, weights, train, held_out, steps=self.steps, seed=self.seed)
        self.results[name] = result
        return result

    def notes(self) -> list[str]:
        """A sentence about what was gained."""
        kept = [result for result in self.results.values() if result.kept]
        if not self.results:
            return []
        if not kept:
            return ["tuning lowered the held-out error of no block: all keep the solver's codes"]
        share = sum(result.after / result.before for result in kept) / len(kept)
        rest = len(self.results) - len(kept)
        return [
            f"tuning lowered the held-out error of {len(kept)} blocks, to {share:.2f} of what it was"
            + (f"; {rest} blocks keep the solver's codes" if rest else "")
        ]

    def _calls(self, name: str, passages: Sequence[Passage]) -> tuple[list[BlockCall], list[BlockCall]]:
        """Calls to learn from and to judge by; a batch with sequences of both kinds is in both lists."""
        N = len(self.batches)
        targets = {passage.job - N: _states(passage.output) for passage in passages if passage.job >= N}
        train: list[BlockCall] = []
        held_out: list[BlockCall] = []
        for passage in passages:
            if passage.job not in targets:
                continue
            target, batch = targets[passage.job], self.batches[passage.job]
            counts = _counts(name, batch, target)
            held = batch.held_out_rows(counts.numel())
            judges = torch.zeros_like(counts) if held is None else counts & held.to(counts.device)
            for calls, mask in ((train, counts & ~judges), (held_out, judges)):
                if bool(mask.any()):
                    calls.append(BlockCall(passage.args, passage.kwargs, target, mask))
        return train, held_out


def _counts(name: str, batch: Rows, target: Tensor) -> Tensor:
    """Which tokens of a block's output count, flattened: all but padding."""
    padding = batch.decoder if batch.has_decoder and "decoder" in name.split(".") else batch.tokens
    mask = None if padding is None else row_mask(target, padding)
    return (
        torch.ones(target[..., 0].numel(), dtype=torch.bool, device=target.device) if mask is None else mask
    )


def _states(output: Any) -> Tensor:
    """The hidden states in a block's output: the output itself, or the first of a tuple."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states
