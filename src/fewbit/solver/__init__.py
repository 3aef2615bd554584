"""The solver: a weight, its Hessian and its settings in; integer codes out.

Contract: pure. Tensors in, a dataclass out; no logging, no files, no knowledge of models. The steps are
grid (scales and zero points) and ldlq (codes); fallback says what happens when the Hessian is bad.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..codes import Codes, sequential_groups
from ..config import LayerSettings
from ..errors import SolverError
from . import native
from .fallback import Prepared, prepare
from .grid import Grid, fit_grid, nearest
from .hessian import Hessian
from .ldlq import solve
from .native import Backend

__all__ = ["FactorCache", "Hessian", "Solution", "native", "quantize_weight"]


@dataclass(frozen=True)
class Solution:
    """A solved layer.

    Attributes:
        codes: the quantized weight.
        loss: tr((W − Ŵ) H (W − Ŵ)ᵀ), the squared error of the layer's outputs summed over the calibration
            tokens; without a Hessian ‖W − Ŵ‖².
        fallbacks: what had to be done because the Hessian was bad, by name (see `solver.fallback`).
        damp: the damping in use, a fraction of mean(diag H); None without a factorization.
        tokens: calibration tokens in H. dropped: tokens left out because they were not finite.
        dead: columns whose input was always zero; they are rounded to nearest.
    """

    codes: Codes
    loss: float
    fallbacks: tuple[str, ...] = ()
    damp: float | None = None
    tokens: int = 0
    dropped: int = 0
    dead: int = 0


class FactorCache:
    """The factorizations of one Hessian, kept beside it for the layers that share it.

    Layers with the same act_order, group_size and damp get the same factorization. Drop the cache
    together with its Hessian, and never add tokens after the first use.
    """

    def __init__(self) -> None:
        self._hessian: Hessian | None = None
        self._prepared: dict[tuple[str, int, float], Prepared] = {}

    def get(self, hessian: Hessian, settings: LayerSettings) -> Prepared:
        """The factorization for these settings, computed at the first request.

        Raises:
            SolverError: the cache belongs to another Hessian.
        """
        if self._hessian is not None and self._hessian is not hessian:
            raise SolverError("this FactorCache belongs to another Hessian; make one cache per Hessian")
        self._hessian = hessian
        key = (settings.act_order, settings.group_size, settings.damp)
        if key not in self._prepared:
            self._prepared[key] = prepare(hessian, settings.group_size, settings.act_order, settings.damp)
        return self._prepared[key]


def quantize_weight(
    W: Tensor,
    H: Hessian | None,
    settings: LayerSettings,
    cache: FactorCache | None = None,
    *,
    backend: Backend = "auto",
) -> Solution:
    """Quantize one linear layer.

    Args:
        W: (out, in), any float dtype, on the device of H; computed in float32.
        H: its Hessian, or None for round-to-nearest. Ignored by the method "rtn".
        settings: bits, group size, and so on.
        cache: shared by the layers that share H.
        backend: "auto", "torch" or "native".

    Raises:
        SolverError: W is not a matrix, does not fit H, or is not finite.
    """
    _check(W, H)
    W = W.detach().float()
    if H is None or settings.method == "rtn":
        return _round_to_nearest(W, settings, backend)
    shared = (cache if cache is not None else FactorCache()).get(H, settings)
    grid = fit_grid(
        W, shared.D.to(W.device), shared.g_idx.to(W.device), settings.bits, sym=settings.sym, backend=backend
    )
    if shared.factor is None:
        q = nearest(W, grid, settings.bits)
        codes = _codes(q, grid, settings)
        E = W - codes.dequantize()
        loss, damp = float((E @ H.matrix()).mul_(E).sum(dtype=torch.float64)), None
    else:
        sweep = solve(W, shared.factor, grid, settings.bits, backend=backend)
        codes, loss, damp = _codes(sweep.codes, grid, settings), sweep.loss, shared.damp
    return Solution(codes, loss, shared.fallbacks, damp, H.tokens, H.dropped, shared.dead)


def _round_to_nearest(W: Tensor, settings: LayerSettings, backend: Backend) -> Solution:
    n = W.shape[1]
    g_idx = sequential_groups(n, settings.group_size).to(W.device)
    grid = fit_grid(
        W, torch.ones(n, device=W.device), g_idx, settings.bits, sym=settings.sym, backend=backend
    )
    codes = _codes(nearest(W, grid, settings.bits), grid, settings)
    return Solution(codes, float((W - codes.dequantize()).square().sum(dtype=torch.float64)))


def _codes(q: Tensor, grid: Grid, settings: LayerSettings) -> Codes:
    return Codes(q, grid.scales, grid.zeros, grid.g_idx, settings.bits, settings.group_size)


def _check(W: Tensor, H: Hessian | None) -> None:
    if W.ndim != 2 or W.numel() == 0 or not W.is_floating_point():
        raise SolverError(
            f"a weight must be a float matrix (out, in); got {W.dtype} of shape {tuple(W.shape)}"
        )
    if H is not None and H.n != W.shape[1]:
        raise SolverError(f"the weight has {W.shape[1]} input features, but its Hessian has {H.n}")
    # One reduction in the normal case: NaN and infinity survive it.
    if not bool(torch.isfinite(torch.stack(torch.aminmax(W))).all()):
        finite = torch.isfinite(W)
        rows, columns = (~finite).any(1).sum(), (~finite).any(0).sum()
        raise SolverError(
            f"the weight has values that are not finite, in {int(rows)} of {W.shape[0]} rows and "
            f"{int(columns)} of {W.shape[1]} columns; the checkpoint is damaged, or its training diverged"
        )
