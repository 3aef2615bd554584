"""The solver: a weight, its Hessian and its settings in; integer codes out.

Contract: pure. Tensors in, a dataclass out; no logging, no files, no knowledge of models. The steps are
correction (what to aim at), grid (scales and zero points), ldlq (codes);
fallback says what happens when the Hessian is bad.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from ..config import LayerSettings
from ..errors import SolverError
from ..native import Backend
from ..quantized_matrix import sequential_groups
from .backends import full_float32, why_no_triton
from .correction import Holdout, RowReduce, relative_error, relative_figures, whole
from .factor_cache import FactorCache
from .grid import fit_grid, nearest
from .hessian import Hessian
from .solve import SCALE_MULTIPLIERS, codes_of, solve_families
from .types import Accuracy, InputGroup, Solution

__all__ = [
    "SCALE_MULTIPLIERS",
    "Accuracy",
    "FactorCache",
    "Hessian",
    "Holdout",
    "InputGroup",
    "Solution",
    "native",
    "quantize_together",
    "quantize_weight",
    "why_no_triton",
]


@full_float32()
def quantize_weight(
    W: Tensor,
    H: Hessian | None,
    settings: LayerSettings,
    cache: FactorCache | None = None,
    *,
    accuracy: Accuracy | None = None,
    probe: Holdout | None = None,
    total: RowReduce = whole,
    backend: Backend = "auto",
) -> Solution:
    """Quantize one linear layer, or some of its rows: given H, all but a few sums goes row by row.

    Args:
        W: (out, in), any float dtype, on the device of H; computed in float32.
        H: its Hessian, or None for round-to-nearest. Ignored by the method "rtn".
        settings: bits, group size, and so on.
        cache: shared by the layers that share H.
        accuracy: correction; by default none.
        probe: held-out tokens, on which both are judged.
        total: sums figures of every row over all rows of the layer, where W is a part of it. What is decided or
            measured of all rows (α, loss, true error) then is the same in every part.
        backend: "auto" (see `gptq.backends`), "torch", "native" or "triton".

    Raises:
        SolverError: W is not a matrix, does not fit H, or is not finite.
    """
    if H is None or settings.method == "rtn":
        _check([(W, H)])
        return _round_to_nearest(W.detach().float(), settings, backend, probe, total)
    alone = InputGroup([W], H, cache if cache is not None else FactorCache(), probe, [total])
    return quantize_together([alone], settings, accuracy=accuracy, backend=backend)[0][0]


@full_float32()
def quantize_together(
    families: Sequence[InputGroup],
    settings: LayerSettings,
    *,
    accuracy: Accuracy | None = None,
    backend: Backend = "auto",
    batched: bool | None = None,
) -> list[list[Solution]]:
    """`quantize_weight` for many layers at once: a GPU has too little to do with one small layer.

    The rows of siblings go through the grid search and the sweep as one weight. Hessians of one size are factored as
    one batch, and families of one shape solved as one. The codes are those of every layer alone, but for ties that are
    broken by the order of a float32 sum.

    Args:
        families: all on one device.
        settings, accuracy, backend: those of `quantize_weight`.
        batched: whether families of one shape are a batch; by default where Triton's kernels run.

    Returns:
        For each family the solutions of its weights.

    Raises:
        SolverError: a weight is not a matrix, does not fit its Hessian, or is not finite.
    """
    _check([(W, family.hessian) for family in families for W in family.weights])
    return solve_families(families, settings, accuracy or Accuracy(), backend, batched)


def _round_to_nearest(
    W: Tensor, settings: LayerSettings, backend: Backend, probe: Holdout | None, total: RowReduce
) -> Solution:
    n = W.shape[1]
    g_idx = sequential_groups(n, settings.group_size, device=W.device)
    grid = fit_grid(
        W, torch.ones(n, device=W.device), g_idx, settings.bits, sym=settings.sym, backend=backend
    )
    codes = codes_of(nearest(W, grid, settings.bits), grid, settings)
    W_hat, error = codes.dequantize(), None
    loss = float(total((W - W_hat).square().sum(dim=1, dtype=torch.float64)))
    if probe is not None:
        [figures] = relative_figures(W[None], W_hat[None], probe.X[None], probe.X_full[None])
        error = relative_error(*total(figures).tolist())
    return Solution(codes, loss, true_error=error)


def _check(weights: Sequence[tuple[Tensor, Hessian | None]]) -> None:
    """Whether every weight fits its Hessian and is finite; a GPU is waited for once."""
    for W, H in weights:
        if W.ndim != 2 or W.numel() == 0 or not W.is_floating_point():
            raise SolverError(
                f"a weight must be a float matrix (out, in); got {W.dtype} of shape {tuple(W.shape)}"
            )
        if H is not None and H.n != W.shape[1]:
            raise SolverError(f"the weight has {W.shape[1]} input features, but its Hessian has {H.n}")
    # NaN and infinity survive these reductions.
    extremes = [torch.stack(torch.aminmax(W)).double() for W, _ in weights]
    if not extremes or bool(torch.isfinite(torch.stack(extremes)).all()):
        return
    for W, _ in weights:
        finite = torch.isfinite(W)
        rows, columns = (int((~finite).any(side).sum()) for side in (1, 0))
        if rows:
            raise SolverError(
                f"the weight has values that are not finite, in {rows} of {W.shape[0]} rows and "
                f"{columns} of {W.shape[1]} columns; the checkpoint is damaged, or its training diverged"
            )
