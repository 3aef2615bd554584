"""How much of a GPU's memory the activations of paused batches may have, and about how much they want.

Contract: arithmetic on what the device says is free before the pass. The budget is what remains when the weights, the
matrices of the solver and the forward of one batch have theirs; some of it is lost to holes. What the batches want is
an estimate on the safe side: it only decides whether they have to be watched, which takes time. Those that are watched
are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mode

import torch
from torch import nn

from ..modeling.layers import is_layer, matrix_shape
from ..planning import Plan, block_of
from .statistics import Rows
from .streaming import Weights

# Storages that stay when something outside of the jobs, such as a Hessian, goes through them all.
RESIDENT_STORAGES = 8

# n × n matrices in float32 that a layer needs: H, its factor, what makes it, and those kept of the Hessian before; in
# two streams also C and the factor for the correction.
_MATRICES = {1: 5, 2: 9}

# Bytes in float32 and in codes for every weight of the layer that is solved.
_SOLVER_BYTES = {1: 15, 2: 26}

# Values for every token that a paused batch holds at most: of the widest layer's input or output, a gate beside it, and
# of states between layers (the residual, the layer's input, queries, keys).
_WIDEST, _STATES = 1.5, 4

# Share of a GPU's free memory that is not counted on.
FRAGMENTATION = 0.1


@dataclass(frozen=True)
class ActivationBudget:
    """For activations of paused batches on a device.

    Attributes:
        bytes: that they may have. needed: that they are thought to want at most.
        pinned: whether memory of the host has to be pinned for copies that nobody waits for.
    """

    bytes: int
    needed: int
    pinned: bool


def activation_budget(
    model: nn.Module, plan: Plan, weights: Weights, batches: Sequence[Rows], streams: int
) -> ActivationBudget | None:
    """The room that a GPU has for the activations of these batches; None on devices that do not say what is free.

    Args:
        model: whose weights may still be on the meta device. batches: of this process.
        streams: forward passes of every batch, 1 or 2.
    """
    free = free_device_bytes(weights.device)
    if free is None:
        return None
    shapes = [matrix_shape(m) for name, m in model.named_modules() if is_layer(m) and block_of(name) != name]
    shapes = shapes or [(layer.out_features, layer.in_features) for layer in plan.layers]
    itemsize = next(model.parameters()).dtype.itemsize
    tokens = [max(batch.counts, default=1) for batch in batches]
    widest, states = max(map(max, shapes)), mode(n for _, n in shapes)
    of_token = round(_WIDEST * widest + _STATES * states) * itemsize
    needed = streams * sum(tokens) * of_token
    most = max(tokens, default=0)
    # Norms and activations compute in float32.
    forward = 2 * most * of_token * max(1, 4 // itemsize) + RESIDENT_STORAGES * most * widest * itemsize
    taken = weights.pending_bytes() + solver_bytes(plan, streams) + forward
    return ActivationBudget(
        max(0, round((1 - FRAGMENTATION) * free) - taken), needed, weights.device.type == "cuda"
    )


def free_device_bytes(device: torch.device) -> int | None:
    """Memory of a CUDA device that this process could still fill; None on others, which do not say."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def solver_bytes(plan: Plan, streams: int) -> int:
    """What the layer that takes most needs while it is solved."""
    sizes = (
        _MATRICES[streams] * 4 * layer.in_features**2
        + _SOLVER_BYTES[streams] * layer.in_features * layer.out_features
        for layer in plan.layers
    )
    return max(sizes, default=0)
