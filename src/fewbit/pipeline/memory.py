"""The memory model: bytes of Hessians, solver and activations, for the run itself and for its estimate.

Arithmetic only. Constants were measured by counting live tensors, or the resident memory where the C library or the
device's allocator is concerned; the tests compare the solver's with what it really holds. On a GPU the model decides
how many bytes of activations may stay on the device (`activation_budget`). That is on the safe side: it only decides
whether activations are watched, which takes time. Watched activations are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mode

import torch
from torch import nn

from ..gptq.correction import CORRECTED_ROWS
from ..gptq.gptq import BLOCK
from ..gptq.round_rows import CANDIDATE_ELEMENTS, WIDER_GRIDS
from ..modeling.layers import is_layer, matrix_shape
from ..planning import Plan, block_of
from .statistics import BatchMasks
from .streaming import Weights

# Float32 matrices n × n by the number of paths (1: quantized only, 2: with full precision). One path has H and its
# factor; two paths also have C and the factorization for the correction. Both are factored in place. Counted.
MATRICES = {1: 2, 2: 4}

# Bytes for every weight of the layer being solved, in float32 matrices and codes: after the rounding; while targets are
# corrected; and then also for every weight of the rows that are corrected together. Bytes for every product of an
# output and a holdout token. Bytes for every weight on a candidate grid, in E and codes, and for every weight of one
# block of columns on top. Counted.
ROUNDING_BYTES, CORRECTION_BYTES, CORRECTED_BYTES, HOLDOUT_BYTES = 11, 10, 12, 12
CANDIDATE_BYTES, BLOCK_BYTES = 5, 10

# Bytes for every weight of a block whose codes wait to be packed; later its packed tensors twice.
PACKING_BYTES = 2

# Values for every token that a paused batch holds at most: the widest layer's input or output with a gate beside it,
# and states between layers (the residual, the layer's input, queries, keys). Bounds from the shapes of Llama.
_WIDEST_VALUES, _STATE_VALUES = 1.5, 4

# Storages that stay in memory while the solver reads the inputs of all batches, one after the other.
RESIDENT_STORAGES = 8

# Share of a GPU's free memory that its caching allocator may lose to fragmentation. Set by hand.
DEVICE_FRAGMENTATION = 0.1

# Share that the C library holds beyond the tensors small enough for its arena. Measured while weights are streamed,
# with large tensors on their own pages (`streaming`); without that it is up to 0.8 after thirty blocks.
HOST_FRAGMENTATION = 0.15

# Bytes of code and buffers that torch's libraries take when they first multiply, factorize and convert. Measured.
FIRST_USE_BYTES = 30_000_000

# Bytes of pinned memory for every byte of a block: torch rounds each tensor up to a power of two.
PINNED_BYTES = 2


@dataclass(frozen=True)
class ActivationBudget:
    """Memory of a device for the activations of paused batches."""

    bytes: int  # that the activations may take
    needed: int  # upper bound on the bytes of all activations
    pinned: bool  # host memory must be pinned for asynchronous copies


def activation_budget(
    model: nn.Module, plan: Plan, weights: Weights, batches: Sequence[BatchMasks], paths: int
) -> ActivationBudget | None:
    """Compute the budget of a GPU; None for devices that do not report their free memory.

    The budget is what remains when the weights, the solver and the forward pass of one batch have their memory. The
    model's weights may still be on the meta device. `paths` is the number of forward passes of every batch, 1 or 2.
    """
    free = free_device_bytes(weights.device)
    if free is None:
        return None
    shapes = [matrix_shape(m) for name, m in model.named_modules() if is_layer(m) and block_of(name) != name]
    shapes = shapes or [(layer.out_features, layer.in_features) for layer in plan.layers]
    itemsize = next(model.parameters()).dtype.itemsize
    tokens = [max(batch.counts, default=1) for batch in batches]
    widest, hidden = max(map(max, shapes)), mode(n for _, n in shapes)
    per_token = round(_WIDEST_VALUES * widest + _STATE_VALUES * hidden) * itemsize
    needed = paths * sum(tokens) * per_token
    longest = max(tokens, default=0)
    # Norms and activation functions compute in float32.
    forward = (
        2 * longest * per_token * max(1, 4 // itemsize) + RESIDENT_STORAGES * longest * widest * itemsize
    )
    taken = weights.pending_bytes() + largest_layer_bytes(plan, paths) + forward
    usable = round((1 - DEVICE_FRAGMENTATION) * free)
    return ActivationBudget(max(0, usable - taken), needed, pinned=weights.device.type == "cuda")


def free_device_bytes(device: torch.device) -> int | None:
    """Return the memory of a CUDA device that this process can still allocate; None for other devices."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def solver_bytes(
    out_features: int, in_features: int, paths: int, *, converted: bool = True, holdout_tokens: int = 0
) -> int:
    """Return the bytes for solving one layer, without its Hessian.

    Args:
        out_features: Rows of the weight matrix.
        in_features: Columns of the weight matrix.
        paths: Forward passes of every batch, 1 or 2.
        converted: True if the weight is not stored in float32 and needs a float32 copy.
        holdout_tokens: Tokens on which the solution is judged.
    """
    weights = out_features * in_features
    # At worst every row is rounded on the wider grids, from a copy of its targets, beside its codes on the fitted one.
    candidates = min(len(WIDER_GRIDS) * weights, CANDIDATE_ELEMENTS)
    block = BLOCK_BYTES * candidates * min(BLOCK, in_features) // in_features
    on_candidates = CANDIDATE_BYTES * candidates + block + (10 if paths == 2 else 6) * weights
    rounded = ROUNDING_BYTES * weights + HOLDOUT_BYTES * out_features * holdout_tokens
    corrected = CORRECTED_BYTES * min(out_features, CORRECTED_ROWS) * in_features
    correction = CORRECTION_BYTES * weights + corrected if paths == 2 else 0
    return (4 * weights if converted else 0) + max(on_candidates, rounded, correction)


def largest_layer_bytes(plan: Plan, paths: int) -> int:
    """Return the bytes for the layer that needs most: solver, its matrices, and the kept ones of the layer before."""
    sizes = (
        8 * MATRICES[paths] * layer.in_features**2
        + solver_bytes(layer.out_features, layer.in_features, paths)
        for layer in plan.layers
    )
    return max(sizes, default=0)
