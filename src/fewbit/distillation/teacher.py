"""The original model: logits of a batch, with the weights in memory if they fit, else read block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..modeling.layers import without_cache
from ..modeling.source import Source
from ..pipeline.streaming import StreamedWeights
from ..planning import block_of
from ..profiling import Profiler
from ..resources import takes_at_most

Logits = Callable[[Mapping[str, Tensor]], Tensor]

_SHARE = 0.5  # of the free memory that the teacher's weights may take


@contextmanager
def open_teacher(source: Source, dtype: str, device: torch.device) -> Iterator[tuple[nn.Module, Logits]]:
    """Open the original model.

    Yields:
        The model, and a function from a batch of token ids to logits (batch, tokens, vocabulary).
    """
    if not source.streams:
        model = source.load_model(dtype, device).requires_grad_(False)
        yield model, logits_of(model)
        return
    model, files = source.build_model(dtype)
    model.requires_grad_(False)
    weights = StreamedWeights(model, files, device, Profiler(device))
    with ExitStack() as stack:
        stack.enter_context(weights.on_demand(lambda shard: None))
        if takes_at_most(_SHARE, sum(weights.shard_sizes().values()), device):
            weights.load_all()
        else:
            for block in _blocks(model):
                handle = block.register_forward_hook(lambda *_: weights.release_except([]))
                stack.callback(handle.remove)
        yield model, logits_of(model)


def logits_of(model: nn.Module) -> Logits:
    """Return the function that runs `model` on a batch."""
    extra = without_cache(model)

    def logits(batch: Mapping[str, Tensor]) -> Tensor:
        found: Tensor = model(**batch, **extra).logits
        return found

    return logits


def _blocks(model: nn.Module) -> list[nn.Module]:
    return [
        module
        for name, module in model.named_modules()
        if name and block_of(name) == name and name[-1].isdigit()
    ]
