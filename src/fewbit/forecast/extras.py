"""What the options beyond the plain run add: a budget of bits, tuning, an evaluation.

Contract: as in `memory` and `timing`, measured rates times counts, but coarser: a backward pass counts as
`BACKWARD` forward ones, and every product of weights takes as long for each weight and token as in the trial.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import nn

from ..budget.sensitivity import ROWS, measured_batches
from ..budget.units import make_units
from ..calibration import Calibration
from ..codes import Codes
from ..config import QuantConfig
from ..plan import Plan, output_embedding_name
from ..solver import quantize_weight
from ..tune import TOKENS_PER_STEP, BlockCall, tune_block
from .memory import Parts
from .timing import forward_seconds
from .trial import Trial, tokens_of
from .work import Work

# Gradients of the inputs alone, and of the weights too; of what is inside a block, which runs forward twice.
BACKWARD, BACKWARD_WITH_WEIGHTS, RECOMPUTED = 1.2, 2.2, 2

# For every weight of a tuned block: v, its gradient, two moments of Adam, the original, the best codes so far, and
# the matrices of one step.
TUNE_BYTES = 40

# A block's saved tensors for the backward pass, in terms of what it holds where it pauses.
_SAVED = 4
_CHECKED = 9  # so often is the error of a block measured while it is tuned
_WIDTH = 512  # of the layer that is tuned and rounded for the measurement


@dataclass(frozen=True)
class Extra:
    """Seconds, and what is in memory meanwhile."""

    seconds: float
    parts: Parts


def of_budget(
    model: nn.Module,
    plan: Plan,
    config: QuantConfig,
    calibration: Calibration,
    trial: Trial,
    weight_bytes: int,
) -> Extra:
    """Measuring what bits cost every layer: gradients of a few batches, and the errors of all choices."""
    batches = measured_batches(calibration, torch.device("cpu"))
    tokens = sum(tokens_of(batch) for batch in batches)
    rate, dtype = _rate(plan, trial), next(model.parameters()).dtype
    passes = forward_seconds(trial) * tokens / trial.tokens * (RECOMPUTED + BACKWARD)
    head = _head_weights(model)
    choices = sum(
        len(unit.choices) * layer.weights for unit in make_units(plan, config) for layer in unit.layers
    )
    errors = choices * (min(ROWS, tokens) * rate + _rounding_seconds(plan))
    features = sum(layer.in_features + layer.out_features for layer in plan.layers)
    hidden = plan.layers[0].in_features
    held = max((stop.held for stop in trial.stops.values()), default=0)
    parts = {
        "weights": weight_bytes,
        "activations": len(plan.block_layers()) * trial.tokens * hidden * dtype.itemsize + _SAVED * held,
        "logits": 3 * trial.tokens * head // max(hidden, 1) * dtype.itemsize,
        "kept rows": min(ROWS, tokens) * features * dtype.itemsize,
    }
    return Extra(passes + tokens * head * rate * (1 + BACKWARD) + errors, parts)


def of_tuning(plan: Plan, config: QuantConfig, trial: Trial, work: Work, largest_unit: int) -> Extra:
    """Every block trained for some steps, and its outputs computed anew."""
    per_step = max(TOKENS_PER_STEP, trial.tokens) / trial.tokens
    forward = forward_seconds(trial)
    training = config.tune_steps * (
        per_step * forward * (1 + BACKWARD_WITH_WEIGHTS) + plan.weights * _step_seconds(plan)
    )
    checks = _CHECKED * 2 * work.held_out * work.batches * forward
    blocks = plan.block_layers()
    sizes = {layer.name: layer.weights for layer in plan.layers}
    largest = max(sum(sizes[name] for name in names) for names in blocks.values())
    held = max((one.held for one in work.layers), default=0)
    parts = {
        "weights": 2 * largest_unit,
        "activations": held + _SAVED * round(held / max(work.batches * work.streams, 1)),
        "tuning": TUNE_BYTES * largest,
    }
    return Extra(training + checks + forward * work.batches, parts)


def of_evaluation(model: nn.Module, plan: Plan, trial: Trial, tokens: int) -> Extra:
    """The original's outputs twice, once for its own perplexity, and the result's once."""
    weights = plan.weights + _head_weights(model)
    return Extra(3 * tokens * weights * _rate(plan, trial), {})


def _rate(plan: Plan, trial: Trial) -> float:
    """Seconds of the forward for each weight and token."""
    return forward_seconds(trial) / max(trial.tokens * plan.weights, 1)


def _head_weights(model: nn.Module) -> int:
    name = output_embedding_name(model)
    return math.prod(model.get_submodule(name).get_parameter("weight").shape) if name else 0


def _rounding_seconds(plan: Plan) -> float:
    """To fit a grid and round to it, for each weight."""
    _, seconds = _rounded(plan)
    return seconds / _WIDTH**2


def _step_seconds(plan: Plan) -> float:
    """A step of tuning, for each weight, without the passes: the difference of many and of few steps."""
    codes, _ = _rounded(plan)
    layer = nn.Linear(_WIDTH, _WIDTH, bias=False)
    block, W = nn.Sequential(layer), layer.weight.detach()
    x = torch.randn(1, _WIDTH)
    call = BlockCall((x,), {}, torch.randn(1, _WIDTH))
    found = []
    for steps in (8, 24):
        start = time.perf_counter()
        tune_block(block, {"0": codes}, {"0": W}, [call], [call], steps=steps)
        found.append(time.perf_counter() - start)
    return max(found[1] - found[0], 0.0) / 16 / _WIDTH**2


def _rounded(plan: Plan) -> tuple[Codes, float]:
    settings = plan.layers[0].settings
    W = torch.randn(_WIDTH, _WIDTH)
    start = time.perf_counter()
    codes = quantize_weight(W, None, settings).codes
    return codes, time.perf_counter() - start
