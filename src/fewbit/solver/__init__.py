"""The solver: a weight, its Hessian and its settings in; integer codes out.

Contract: pure. Tensors in, a dataclass out; no logging, no files, no knowledge of models. The steps are
correction (what to aim at), grid (scales and zero points), ldlq (codes) and refit (better scales for them);
fallback says what happens when the Hessian is bad.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..codes import Codes, sequential_groups
from ..config import LayerSettings
from ..errors import SolverError
from . import native
from .cache import FactorCache
from .correction import CAUTION, Probe, Total, best_alpha, output_error, relative_error, whole
from .fallback import NO_CORRECTION, Prepared, prepare_all
from .grid import Grid, fit_grid, nearest, storable
from .hessian import Hessian
from .ldlq import Problem, Sweep, solve_all
from .native import Backend
from .paths import full_float32, why_no_triton
from .refit import refit_scales

# Multiples of the fitted scales that are tried as well.
STRETCHES = (1.15, 1.3)

__all__ = [
    "Accuracy",
    "FactorCache",
    "Hessian",
    "Probe",
    "Siblings",
    "Solution",
    "native",
    "quantize_together",
    "quantize_weight",
    "why_no_triton",
]


@dataclass(frozen=True)
class Accuracy:
    """What may be spent on a lower error, where full-precision inputs are at hand.

    Attributes:
        correction: α, 0 to 1, or "auto": the best on the probe; without a probe no correction.
        refit: fit the scales again after rounding; kept where the error on the probe falls.
    """

    correction: float | str = 0.0
    refit: bool = False


@dataclass(frozen=True)
class Solution:
    """A solved layer.

    Attributes:
        codes: the quantized weight.
        loss: tr((T − Ŵ) H (T − Ŵ)ᵀ), the squared error of the layer's outputs summed over the calibration
            tokens; T = W without correction. Without a Hessian ‖W − Ŵ‖².
        fallbacks: what had to be done because the Hessian was bad, by name (see `solver.fallback`).
        damp: the damping in use, a fraction of mean(diag H); None without a factorization.
        tokens: calibration tokens in H. dropped: tokens left out because they were not finite.
        dead: columns whose input was always zero; they are rounded to nearest.
        alpha: of the correction; None without full-precision inputs.
        refit: whether refitted scales were kept.
        true_error: ‖WX̃ − ŴX‖ / ‖WX̃‖ on the probe; None without one, or where it carries no signal.
    """

    codes: Codes
    loss: float
    fallbacks: tuple[str, ...] = ()
    damp: float | None = None
    tokens: int = 0
    dropped: int = 0
    dead: int = 0
    alpha: float | None = None
    refit: bool = False
    true_error: float | None = None


@full_float32()
def quantize_weight(
    W: Tensor,
    H: Hessian | None,
    settings: LayerSettings,
    cache: FactorCache | None = None,
    *,
    accuracy: Accuracy | None = None,
    probe: Probe | None = None,
    total: Total = whole,
    backend: Backend = "auto",
) -> Solution:
    """Quantize one linear layer, or some of its rows: given H, all but a few sums goes row by row.

    Args:
        W: (out, in), any float dtype, on the device of H; computed in float32.
        H: its Hessian, or None for round-to-nearest. Ignored by the method "rtn".
        settings: bits, group size, and so on.
        cache: shared by the layers that share H.
        accuracy: correction and refit; by default neither.
        probe: held-out tokens, on which both are judged.
        total: sums figures of every row over all rows of the layer, where W is a part of it. What is decided or
            measured of all rows (α, refit, loss, true error) then is the same in every part.
        backend: "auto" (see `solver.paths`), "torch", "native" or "triton".

    Raises:
        SolverError: W is not a matrix, does not fit H, or is not finite.
    """
    if H is None or settings.method == "rtn":
        _check(W, H)
        W = W.detach().float()
        return _judged(_round_to_nearest(W, settings, backend, total), W, probe, total)
    alone = Siblings([W], H, cache if cache is not None else FactorCache(), probe, [total])
    return quantize_together([alone], settings, accuracy=accuracy, backend=backend)[0][0]


@dataclass(frozen=True)
class Siblings:
    """The weights of layers with one input, and what `quantize_weight` is told of them.

    Attributes:
        weights: (out_i, in), on the device of the Hessian. totals: one for each.
    """

    weights: Sequence[Tensor]
    hessian: Hessian
    cache: FactorCache
    probe: Probe | None
    totals: Sequence[Total]


@full_float32()
def quantize_together(
    families: Sequence[Siblings],
    settings: LayerSettings,
    *,
    accuracy: Accuracy | None = None,
    backend: Backend = "auto",
) -> list[list[Solution]]:
    """`quantize_weight` for many layers at once: a GPU has too little to do with one small layer.

    The rows of siblings go through the grid search and the sweep as one weight. Hessians of one size are factored as
    one batch, and families of one shape swept as one. The codes are those of every layer alone, but for ties that are
    broken by the order of a float32 sum.

    Returns:
        For each family the solutions of its weights.

    Raises:
        SolverError: a weight is not a matrix, does not fit its Hessian, or is not finite.
    """
    accuracy = accuracy if accuracy is not None else Accuracy()
    for family in families:
        for W in family.weights:
            _check(W, family.hessian)
    _prepare(families, settings)
    aims = [_aim(family, settings, accuracy, backend) for family in families]
    swept = _swept(aims, settings, backend)
    return [
        _finished(family, aim, codes, losses, accuracy)
        for family, aim, (codes, losses) in zip(families, aims, swept, strict=True)
    ]


def _prepare(families: Sequence[Siblings], settings: LayerSettings) -> None:
    """Fill the caches: all that are empty at once, if there are several."""
    empty = [family for family in families if not family.cache.has(settings)]
    if len(empty) > 1:
        hessians = [family.hessian for family in empty]
        found = prepare_all(hessians, settings.group_size, settings.act_order, settings.damp)
        for family, prepared in zip(empty, found, strict=True):
            family.cache.put(family.hessian, settings, prepared)


@dataclass(frozen=True)
class _Aim:
    """What the weights of a family, float32, are replaced by: targets T, one below the other, and a grid for them."""

    weights: list[Tensor]
    T: Tensor
    grid: Grid
    shared: Prepared
    alphas: list[float | None]
    rungs: list[tuple[str, ...]]


def _aim(family: Siblings, settings: LayerSettings, accuracy: Accuracy, backend: Backend) -> _Aim:
    shared = family.cache.get(family.hessian, settings)
    weights = [W.detach().float() for W in family.weights]
    targets, alphas, rungs = zip(
        *(
            _target(W, family, shared, accuracy, total)
            for W, total in zip(weights, family.totals, strict=True)
        ),
        strict=True,
    )
    T = targets[0] if len(targets) == 1 else torch.cat(targets)
    D, g_idx = shared.D.to(T.device), shared.g_idx.to(T.device)
    grid = fit_grid(T, D, g_idx, settings.bits, sym=settings.sym, backend=backend)
    return _Aim(weights, T, grid, shared, list(alphas), list(rungs))


def _target(
    W: Tensor, family: Siblings, shared: Prepared, accuracy: Accuracy, total: Total
) -> tuple[Tensor, float | None, tuple[str, ...]]:
    """What to aim at instead of W, the α that gave it, and the rungs of the ladder that were needed."""
    if not family.hessian.has_full:
        return W, None, ()
    automatic, probe = accuracy.correction == "auto", family.probe
    if accuracy.correction == 0 or shared.factor is None or (automatic and probe is None):
        return W, 0.0, ()
    step = family.cache.drift(family.hessian).step(W)
    if step is None:
        return W, 0.0, (NO_CORRECTION,)
    alpha = CAUTION * best_alpha(W, step, probe, total) if automatic and probe else float(accuracy.correction)
    return torch.add(W, step, alpha=alpha), alpha, ()


def _swept(
    aims: Sequence[_Aim], settings: LayerSettings, backend: Backend
) -> list[tuple[Codes, Tensor | None]]:
    """For each aim the codes of the best of some stretched grids, row by row, and the loss of every row.

    The grid that fits the weights best clips the largest of them. In the sweep a column takes errors of
    others on top of its own weight, and a clipped one cannot: where inputs are strongly correlated a wider
    and coarser grid ends with the lower error. Without a factorization: rounded to nearest, None.
    """
    stretches = STRETCHES if settings.bits < 8 else ()
    problems = [
        Problem(aim.T, aim.shared.factor, [aim.grid, *(_stretched(aim.grid, by) for by in stretches)])
        for aim in aims
        if aim.shared.factor is not None
    ]
    solved = iter(zip(problems, solve_all(problems, settings.bits, backend=backend), strict=True))
    results: list[tuple[Codes, Tensor | None]] = []
    for aim in aims:
        if aim.shared.factor is None:
            results.append((_codes(nearest(aim.T, aim.grid, settings.bits), aim.grid, settings), None))
        else:
            problem, sweeps = next(solved)
            results.append(_best(problem.grids, sweeps, settings))
    return results


def _stretched(grid: Grid, by: float) -> Grid:
    return Grid(storable(grid.scales.float() * by).to(grid.scales.dtype), grid.zeros, grid.g_idx)


def _best(grids: Sequence[Grid], sweeps: Sequence[Sweep], settings: LayerSettings) -> tuple[Codes, Tensor]:
    """Every row as in the sweep where its loss is lowest, and these losses."""
    codes, scales, losses = sweeps[0].codes, grids[0].scales, sweeps[0].losses
    for sweep, grid in zip(sweeps[1:], grids[1:], strict=True):
        better = sweep.losses < losses
        codes = torch.where(better[:, None], sweep.codes, codes)
        scales = torch.where(better[:, None], grid.scales, scales)
        losses = torch.where(better, sweep.losses, losses)
    return _codes(codes, Grid(scales, grids[0].zeros, grids[0].g_idx), settings), losses


def _finished(
    family: Siblings, aim: _Aim, codes: Codes, losses: Tensor | None, accuracy: Accuracy
) -> list[Solution]:
    """The family's weights apart, each with its refit, loss and true error."""
    H, probe, shared, first = family.hessian, family.probe, aim.shared, 0
    damp = None if shared.factor is None else shared.damp
    solutions = []
    for W, alpha, rungs, total in zip(aim.weights, aim.alphas, aim.rungs, family.totals, strict=True):
        rows = slice(first, first + len(W))
        first, T = rows.stop, aim.T[rows]
        swept = replace(codes, codes=codes.codes[rows], scales=codes.scales[rows], zeros=codes.zeros[rows])
        fitted = _refit(W, T, swept, H, probe, total) if accuracy.refit and probe is not None else swept
        of_rows = losses[rows] if fitted is swept and losses is not None else _losses(T, fitted, H)
        solution = Solution(
            fitted,
            float(total(of_rows)),
            (*shared.fallbacks, *rungs),
            damp,
            H.tokens,
            H.dropped,
            shared.dead,
            alpha,
            refit=fitted is not swept,
        )
        solutions.append(_judged(solution, W, probe, total))
    return solutions


def _refit(W: Tensor, T: Tensor, swept: Codes, H: Hessian, probe: Probe, total: Total) -> Codes:
    """The codes with refitted scales where they have the lower error on the probe, otherwise as they were."""
    scales = refit_scales(T, swept, H.matrix())
    # Columns that never were active had no part in it: they are rounded anew.
    dead = (H.diagonal() == 0).nonzero()[:, 0]
    q = swept.codes.clone()
    q[:, dead] = nearest(T, Grid(scales, swept.zeros, swept.g_idx), swept.bits)[:, dead]
    fitted = replace(swept, codes=q, scales=scales)
    before, after = (output_error(W, codes.dequantize(), probe, total) for codes in (swept, fitted))
    return fitted if after < before else swept


def _losses(T: Tensor, codes: Codes, H: Hessian) -> Tensor:
    """(t − ŵ) H (t − ŵ)ᵀ of every row, float64."""
    E = T - codes.dequantize()
    return (E @ H.matrix()).mul_(E).sum(dim=1, dtype=torch.float64)


def _judged(solution: Solution, W: Tensor, probe: Probe | None, total: Total) -> Solution:
    """The solution with its error on the probe."""
    if probe is None or probe.tokens == 0:
        return solution
    return replace(solution, true_error=relative_error(W, solution.codes.dequantize(), probe, total))


def _round_to_nearest(W: Tensor, settings: LayerSettings, backend: Backend, total: Total) -> Solution:
    n = W.shape[1]
    g_idx = sequential_groups(n, settings.group_size).to(W.device)
    grid = fit_grid(
        W, torch.ones(n, device=W.device), g_idx, settings.bits, sym=settings.sym, backend=backend
    )
    codes = _codes(nearest(W, grid, settings.bits), grid, settings)
    return Solution(codes, float(total((W - codes.dequantize()).square().sum(dim=1, dtype=torch.float64))))


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
