"""The GPTQ paper's recipe in plain torch: the baseline of benchmarks/accuracy.py.

Nothing of fewbit's solver is used here. The recipe (Frantar et al., arXiv:2210.17323, and its authors' code):

- H = X Xᵀ, with λ = 0.01 · mean(diag H) added to its diagonal; columns that were never active are set to 0;
- columns in their order, or by falling diag H (act-order); the error of each spreads over the columns after
  it with U, the upper Cholesky factor of H⁻¹;
- the min-max grid of a group is fitted when the sweep reaches the group, on the weights as they then are;
- true-sequential: each layer is calibrated through all quantized layers before it.

Scales are rounded to float16, as every GPTQ file stores them. Zero points are 0 … 2^bits − 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewbit.config import QuantConfig
from fewbit.modeling.layers import input_rows, set_weight_matrix, weight_matrix
from fewbit.pipeline.scheduler import Hooks, LayerInput, Scheduler
from fewbit.planning import make_plan

_BLOCK_COLUMNS = 128


@dataclass(frozen=True)
class Recipe:
    """Group size −1 means one group per row."""

    bits: int
    group_size: int
    sym: bool
    act_order: bool
    damp: float = 0.01


def min_max_grid(W: Tensor, bits: int, sym: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point, (m, 1) each, so that the range of each row of W (m, g) and 0 lie on the grid."""
    low, high = W.amin(1, keepdim=True).clamp(max=0), W.amax(1, keepdim=True).clamp(min=0)
    if sym:
        high = torch.maximum(-low, high)
        low = -high
    empty = high == low
    s = torch.where(empty, 1.0, (high - low) / (2**bits - 1)).half().float().clamp(min=2.0**-24)
    z = torch.full_like(s, 2.0 ** (bits - 1)) if sym else torch.round(-low / s)
    return s, z.clamp(0, 2**bits - 1)


def gptq(W: Tensor, H: Tensor, recipe: Recipe) -> Tensor:
    """The quantized weights Ŵ (m, n) for W (m, n) and H = X Xᵀ (n, n), all float32."""
    W, H = W.clone(), H.clone()
    n = W.shape[1]
    group_size = n if recipe.group_size == -1 else recipe.group_size
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    W[:, dead] = 0
    perm = torch.argsort(H.diagonal(), descending=True) if recipe.act_order else torch.arange(n)
    W, H = W[:, perm], H[perm][:, perm]
    H.diagonal().add_(recipe.damp * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    W_hat = torch.empty_like(W)
    s = z = W.new_ones(len(W), 1)
    for start in range(0, n, _BLOCK_COLUMNS):
        end = min(start + _BLOCK_COLUMNS, n)
        E = torch.empty_like(W[:, start:end])
        for i in range(start, end):
            if i % group_size == 0:
                # The rest of the group may lie beyond this block, whose errors it has not received yet.
                W_group = W[:, i : i + group_size].clone()
                W_group[:, end - i :] -= E[:, : i - start] @ U[start:i, end : i + group_size]
                s, z = min_max_grid(W_group, recipe.bits, recipe.sym)
            w = W[:, i : i + 1]
            w_hat = _rounded(w, s, z, recipe.bits)
            e = (w - w_hat) / U[i, i]
            W[:, i:end] -= e * U[i, i:end]
            W_hat[:, i], E[:, i - start] = w_hat[:, 0], e[:, 0]
        W[:, end:] -= E @ U[start:end, end:]
    return W_hat[:, torch.argsort(perm)]


def round_to_nearest(W: Tensor, recipe: Recipe) -> Tensor:
    """Ŵ (m, n): each weight at the nearest point of the min-max grid of its group."""
    groups = W.split(W.shape[1] if recipe.group_size == -1 else recipe.group_size, dim=1)
    return torch.cat([_rounded(w, *min_max_grid(w, recipe.bits, recipe.sym), recipe.bits) for w in groups], 1)


def _rounded(w: Tensor, s: Tensor, z: Tensor, bits: int) -> Tensor:
    return s * (torch.round(w / s).add_(z).clamp_(0, 2**bits - 1) - z)


def quantize(model: nn.Module, batches: Sequence[dict[str, Tensor]], recipe: Recipe) -> dict[str, Tensor]:
    """Put the quantized weights, dequantized, in place of those of every layer that fewbit would quantize.

    Args:
        model: in evaluation mode, on the CPU.
        batches: keyword arguments of its forward, without padding. With none: round-to-nearest.

    Returns:
        Layer name → Ŵ (out, in) in float32, which the model holds rounded to its own dtype.
    """
    layers = {layer.name: model.get_submodule(layer.name) for layer in make_plan(model, QuantConfig()).layers}
    hessians = _Hessians()
    found: dict[str, Tensor] = {}

    def on_layer(name: str, inputs: list[LayerInput]) -> None:
        W = weight_matrix(layers[name]).float()
        H = hessians.of(layers[name], inputs) if inputs else None
        found[name] = round_to_nearest(W, recipe) if H is None else gptq(W, H, recipe)
        set_weight_matrix(layers[name], found[name])

    with torch.no_grad():
        jobs = [lambda b=batch: model(**b, use_cache=False) for batch in batches]
        Scheduler(layers, jobs, Hooks(on_layer)).run()
        for name in layers.keys() - found.keys():  # no token reached it
            on_layer(name, [])
    return found


class _Hessians:
    """H = X Xᵀ of what arrived; the last one is kept, as q, k and v receive the same tensors."""

    def __init__(self) -> None:
        self._inputs: list[Tensor] = []
        self._H = torch.empty(0, 0)

    def of(self, module: nn.Module, given: list[LayerInput]) -> Tensor:
        inputs = [one.x for one in given]
        if len(inputs) != len(self._inputs) or any(
            a is not b for a, b in zip(inputs, self._inputs, strict=True)
        ):
            self._H = sum((X.T @ X for X in (input_rows(module, x).float() for x in inputs)), start=0)
            self._inputs = inputs
        return self._H
