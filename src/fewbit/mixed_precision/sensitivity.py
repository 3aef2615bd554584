"""Predict what each choice costs: KL divergence in nats per token.

    cost = 1/(2 N) Σ_t (g_tᵀ (W − Ŵ) x_t)²                      (x, g, N: see `pipeline.gradients`)

Ŵ is W rounded to nearest on the grid that the solver would fit. docs/mixed-precision.md compares the
prediction with the measured KL of single groups, and round-to-nearest with a GPTQ solve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..calibration import Calibration
from ..errors import ModelError
from ..gptq.backends import select
from ..gptq.cholesky import grid_weights
from ..gptq.grid import fit_grid, nearest
from ..gptq.hessian import usable_rows
from ..modeling.layers import weight_matrix
from ..pipeline.gradients import repeated_blocks, run_backward, some_batches
from ..planning import Plan
from ..quantized_matrix import QuantizedMatrix, sequential_groups
from .settings_groups import Choice, SettingsGroup

# Calibration tokens for the backward pass, at least, and batches; rows kept of each layer.
TOKENS = 4096
BATCHES = 8
ROWS = 2048


@dataclass(frozen=True)
class Costs:
    """Predicted costs.

    Attributes:
        by_group: nats per token of choice j for group i, as `by_group[i][j]`.
        unreached: layers without any usable token.
    """

    by_group: list[list[float]]
    unreached: list[str]


def measure(
    model: nn.Module,
    plan: Plan,
    groups: Sequence[SettingsGroup],
    calibration: Calibration,
    seed: int,
    progress: Callable[[int, int], None],
) -> Costs:
    """Predict the cost of every choice of every group.

    A layer that no usable token reached counts as if its weights mattered as much as the average weight.

    Raises:
        ModelError: no gradients can be computed through the model, or none is finite.
    """
    layers = {layer.name: model.get_submodule(layer.name) for layer in plan.layers}
    batches = some_batches(calibration, TOKENS, BATCHES, next(model.parameters()).device)
    half = len(layers)  # the two halves of the work take about the same time
    samples = {name: LayerSample(rows=-(-ROWS // len(batches))) for name in layers}
    positions = run_backward(
        model,
        {name: sample.take for name, sample in samples.items()},
        repeated_blocks(model, plan),
        batches,
        seed=seed,
        progress=lambda done, total: progress(half * done // total, 2 * half),
    )
    errors: dict[str, list[_Error]] = {}
    for group in groups:
        for layer in group.layers:
            W = weight_matrix(layers[layer.name])
            errors[layer.name] = _errors(
                W, samples.pop(layer.name), group.choices, layer.settings.sym, layer.settings.damp, positions
            )
            progress(half + len(errors), 2 * half)
    return _sum_up(groups, errors)


@dataclass
class LayerSample:
    """Some tokens of one layer, in the dtype of the activations; one tensor for each call of the layer.

    Attributes:
        rows: tokens kept of a call, evenly spaced.
        x: inputs (tokens, in).
        g: gradients (tokens, out) of the log-likelihood of the labels, scaled so that a sum of (gᵀ Δy)² over these
            tokens estimates the sum over all tokens.
    """

    rows: int
    x: list[Tensor] = field(default_factory=list)
    g: list[Tensor] = field(default_factory=list)

    def take(self, x: Tensor) -> Callable[[Tensor], None]:
        """Keep some rows of a call, and of its gradients."""
        kept = torch.linspace(0, len(x) - 1, min(self.rows, len(x)), device=x.device).round().long()
        x_kept, scale = x[kept], (len(x) / max(len(kept), 1)) ** 0.5

        def take_gradients(g: Tensor) -> None:
            self.x.append(x_kept)
            self.g.append(g[kept] * scale)

        return take_gradients

    def all_rows(self) -> tuple[Tensor, Tensor]:
        """x and g, each as one tensor."""
        return torch.cat(self.x), torch.cat(self.g)


@dataclass(frozen=True)
class _Error:
    """Error of one choice for one layer.

    Attributes:
        cost: predicted nats per token; None without any usable token.
        weight: ‖W − Ŵ‖².
    """

    cost: float | None
    weight: float


@torch.no_grad()
def _errors(
    W: Tensor, sample: LayerSample, choices: Sequence[Choice], sym: bool, damp: float, positions: int
) -> list[_Error]:
    W = W.float()
    x, g = sample.all_rows() if sample.x else (W.new_zeros(0, W.shape[1]), W.new_zeros(0, W.shape[0]))
    good = usable_rows(x) & usable_rows(g)
    x, g = x[good], g[good].float()
    # Products of bfloat16 are exact in float32; float16 cannot represent small errors.
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    x = x.to(dtype)
    D = grid_weights(x.float().square().sum(0), damp) if len(x) else W.new_ones(W.shape[1])
    found = []
    for choice in choices:
        E = W - _rounded(W, D, choice, sym)
        s = ((x @ E.to(dtype).T).float() * g).sum(dim=1)  # g_tᵀ (W − Ŵ) x_t
        cost = float(s.square().sum(dtype=torch.float64)) / (2 * positions) if len(x) else None
        found.append(_Error(cost, float(E.square().sum(dtype=torch.float64))))
    return found


def _rounded(W: Tensor, D: Tensor, choice: Choice, sym: bool) -> Tensor:
    """Ŵ: round-to-nearest on the grid fitted with the weights D, in groups of consecutive inputs."""
    groups = sequential_groups(W.shape[1], choice.group_size).to(W.device)
    grid = fit_grid(W, D, groups, choice.bits, sym=sym, search=select(W.device).search)
    q = nearest(W, grid, choice.bits)
    return QuantizedMatrix(
        q, grid.scales, grid.zeros, grid.g_idx, choice.bits, choice.group_size
    ).dequantize()


def _sum_up(groups: Sequence[SettingsGroup], errors: Mapping[str, list[_Error]]) -> Costs:
    known = [error for found in errors.values() for error in found if error.cost is not None]
    if not known:
        raise ModelError(
            "target_bits found no token with finite inputs and gradients at any layer: try dtype float32 or other "
            "text, or leave target_bits out and choose bits with override"
        )
    average = sum(error.cost or 0.0 for error in known) / max(sum(error.weight for error in known), 1e-30)
    by_group = [
        [
            sum(
                error.weight * average if error.cost is None else error.cost
                for error in (errors[layer.name][index] for layer in group.layers)
            )
            for index in range(len(group.choices))
        ]
        for group in groups
    ]
    return Costs(by_group, [name for name, found in errors.items() if found[0].cost is None])
