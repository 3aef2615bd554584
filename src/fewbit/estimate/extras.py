"""What the options beyond the plain run add: a budget of bits, tuning, an evaluation.

Contract: as in `memory` and `timing`, measured rates times counts, but coarser: a backward pass counts as
`BACKWARD` forward ones, and every product of weights takes as long for each weight and token as in the trial.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from ..calibration import Calibration
from ..config import QuantConfig
from ..evaluation import evaluate
from ..gptq import quantize_weight
from ..mixed_precision.sensitivity import ROWS, measured_batches
from ..mixed_precision.units import make_units
from ..pipeline.streaming import REST
from ..pipeline.tune_block import TOKENS_PER_STEP, TrainingCall, tune_block
from ..planning import Plan, output_embedding_name
from ..quantized_matrix import QuantizedMatrix
from .memory import Parts
from .timing import forward_seconds
from .trial import Trial, tokens_of
from .work import Work

# Gradients of the inputs alone, and of the weights too; of what is inside a block, which runs forward twice.
BACKWARD, BACKWARD_WITH_WEIGHTS, RECOMPUTED = 1.2, 2.2, 2

# For every weight of a tuned block: v, its gradient, two moments of Adam, the original, the best codes so far, and
# the matrices of one step.
TUNE_BYTES = 28

# A block's saved tensors for the backward pass, in terms of what it holds where it pauses.
_SAVED = 4
_CHECKED = 9  # so often is the error of a block measured while it is tuned
_SCORED = 64  # tokens whose outputs are compared for the measurement
_SCORE_BYTES = 24  # for every token of a window and word of the vocabulary, while two models are compared
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
    hidden = _hidden(plan)
    held = max((stop.held for stop in trial.stops.values()), default=0)
    parts = {
        "weights": weight_bytes,
        "activations": len(plan.block_layers()) * trial.tokens * hidden * dtype.itemsize + _SAVED * held,
        "logits": 3 * trial.tokens * head // max(hidden, 1) * dtype.itemsize,
        "kept rows": min(ROWS, tokens) * features * dtype.itemsize,
    }
    return Extra(passes + tokens * head * rate * (1 + BACKWARD) + errors, parts)


def of_tuning(plan: Plan, config: QuantConfig, trial: Trial, work: Work, units: Mapping[str, int]) -> Extra:
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
        "weights": units.get(REST, 0) + 2 * max(units.get(name, 0) for name in blocks),
        "activations": held + _SAVED * round(held / max(work.batches * work.streams, 1)),
        "tuning": TUNE_BYTES * largest,
    }
    return Extra(training + checks + forward * work.batches, parts)


def of_evaluation(model: nn.Module, plan: Plan, trial: Trial, tokens: int, window: int) -> Extra:
    """The original's outputs twice, once for its own perplexity, and the result's once."""
    head = _head_weights(model)
    vocabulary = head // max(_hidden(plan), 1)
    passes = 3 * tokens * (plan.weights + head) * _rate(plan, trial)
    scoring = _scoring_seconds(vocabulary) * tokens * 1.5 if vocabulary else 0.0  # one alone, then two
    both = 2 * sum(p.numel() * p.element_size() for p in model.parameters())
    return Extra(passes + scoring, {"weights": both, "logits": _SCORE_BYTES * window * vocabulary})


def _rate(plan: Plan, trial: Trial) -> float:
    """Seconds of the forward for each weight and token."""
    return forward_seconds(trial) / max(trial.tokens * plan.weights, 1)


def _hidden(plan: Plan) -> int:
    return plan.layers[0].in_features


def _head_weights(model: nn.Module) -> int:
    name = output_embedding_name(model)
    return math.prod(model.get_submodule(name).get_parameter("weight").shape) if name else 0


def _rounding_seconds(plan: Plan) -> float:
    """To fit a grid and round to it, for each weight."""
    _, seconds = _rounded(plan)
    return seconds / _WIDTH**2


def _step_seconds(plan: Plan) -> float:
    """A step of tuning, for each weight, without the passes: the difference of many and few steps, and of passes."""
    codes, _ = _rounded(plan)
    layer = nn.Linear(_WIDTH, _WIDTH, bias=False)
    block, W = nn.Sequential(layer), layer.weight
    x = torch.randn(TOKENS_PER_STEP, _WIDTH)
    call = TrainingCall((x,), {}, torch.randn_like(x))
    few, many = (
        _seconds(partial(tune_block, block, {"0": (codes, W.detach())}, [call], [call], steps=steps))
        for steps in (8, 16)
    )
    with torch.enable_grad():
        passes = _seconds(lambda: torch.autograd.grad(block(x).square().sum(), [W]))
    return max((many - few) / 8 - passes, 0.0) / W.numel()


def _scoring_seconds(vocabulary: int) -> float:
    """To compare the outputs of two models, for each token: an evaluation of something that only has outputs."""
    windows = torch.zeros(1, _SCORED, dtype=torch.int64)
    outputs = _Outputs(torch.randn(1, _SCORED, vocabulary))
    evaluate(outputs, windows[:, :2])  # the first one prepares
    return _seconds(partial(evaluate, outputs, windows, against=outputs)) / _SCORED


class _Outputs(nn.Module):
    """A model that always answers the same."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits, requires_grad=False)

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.logits[:, : input_ids.shape[1]])


def _seconds(piece: Callable[[], Any]) -> float:
    start = time.perf_counter()
    piece()
    return time.perf_counter() - start


def _rounded(plan: Plan) -> tuple[QuantizedMatrix, float]:
    settings = plan.layers[0].settings
    W = torch.randn(_WIDTH, _WIDTH)
    start = time.perf_counter()
    return quantize_weight(W, None, settings).codes, time.perf_counter() - start
