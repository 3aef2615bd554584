"""What happens at the end of a block: its layers, solved one by one, are tuned together.

Turns what the walk brings to the end of a block (the passages of every batch in the quantized and in the
full-precision model) into the calls that `tune.tune_block` learns from and is judged by, and gives the
batches that go on the tuned block's outputs. The sequences that judge are those that entered no Hessian.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..timers import Timers
from ..tune import BlockCall, tune_block
from .hessians import Rows
from .layers import row_mask
from .lockstep import Passage
from .quantizer import LayerQuantizer


class BlockTuner:
    """Tunes each block of a walk as it is left.

    Args:
        blocks: name → module.
        quantizer: has the solved layers of each block, and takes the tuned ones.
        batches: what is known of the rows of every batch; jobs N … 2N−1 are their full-precision runs.
        steps: per block.
        seed: of the order in which batches are used.
    """

    def __init__(
        self,
        blocks: Mapping[str, nn.Module],
        quantizer: LayerQuantizer,
        batches: Sequence[Rows],
        *,
        steps: int,
        seed: int,
        timers: Timers,
    ) -> None:
        self._blocks = blocks
        self._quantizer = quantizer
        self._batches = batches
        self._steps = steps
        self._seed = seed
        self._timers = timers

    def leave(self, name: str, passages: list[Passage]) -> dict[int, Any]:
        """Tune the block `name`; new outputs for the jobs that run through the quantized model.

        Raises:
            CalibrationError: no sequence is left to judge by.
            ModelError: the block cannot be called again as it was.
        """
        block, solved = self._blocks[name], self._quantizer.solved(name)
        outputs: dict[int, Any] = {}
        if solved:
            inside = len(name) + 1
            with self._timers.time("tune"):
                result = tune_block(
                    block,
                    {layer[inside:]: one.codes for layer, one in solved.items()},
                    {layer[inside:]: one.W for layer, one in solved.items() if one.W is not None},
                    *self._calls(name, passages),
                    steps=self._steps,
                    seed=self._seed,
                )
                tuned = {f"{name}.{layer}": codes for layer, codes in result.codes.items()}
                self._quantizer.tuned(name, tuned, result)
                if result.kept:
                    outputs = {
                        passage.job: block(*passage.args, **passage.kwargs)
                        for passage in passages
                        if passage.job < len(self._batches)
                    }
        self._quantizer.close(name)
        return outputs

    def _calls(self, name: str, passages: Sequence[Passage]) -> tuple[list[BlockCall], list[BlockCall]]:
        """Calls to learn from and to judge by; a batch with sequences of both kinds is in both lists."""
        N = len(self._batches)
        targets = {passage.job - N: _hidden(passage.output) for passage in passages if passage.job >= N}
        train: list[BlockCall] = []
        held_out: list[BlockCall] = []
        for passage in passages:
            if passage.job not in targets:
                continue
            target, batch = targets[passage.job], self._batches[passage.job]
            counts = self._counts(name, batch, target)
            held = batch.held_out_rows(counts.numel())
            judges = torch.zeros_like(counts) if held is None else counts & held.to(counts.device)
            for calls, mask in ((train, counts & ~judges), (held_out, judges)):
                if bool(mask.any()):
                    calls.append(BlockCall(passage.args, passage.kwargs, target, mask))
        return train, held_out

    @staticmethod
    def _counts(name: str, batch: Rows, target: Tensor) -> Tensor:
        """Which tokens of a block's output count, flattened: all but padding."""
        padding = batch.decoder if batch.has_decoder and "decoder" in name.split(".") else batch.tokens
        mask = None if padding is None else row_mask(target, padding)
        return (
            torch.ones(target[..., 0].numel(), dtype=torch.bool, device=target.device)
            if mask is None
            else mask
        )


def _hidden(output: Any) -> Tensor:
    """The hidden states that a block gives: its output, or the first of several."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states
