"""Many layers at once: families of one shape are computed with as one batch.

Contract: each layer gets what it gets alone, but for the order of float32 sums; a batch of one family has the bytes of
the family alone. A GPU is waited for so many times for each batch, however many families it has; one whose Hessian is
bad goes down the ladder alone. What is summed over a layer's rows is summed in the order of the layers: it may be a
meeting of several processes, whose batches may differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from ..config import LayerSettings
from ..native import Backend
from ..quantized_matrix import QuantizedMatrix
from .backends import path_for
from .batching import in_batches, on_host, padded, stacked
from .cholesky import NO_CORRECTION, FactoredHessian, prepare_all
from .correction import (
    ALPHA_SHRINKAGE,
    Drift,
    alpha_figures,
    best_alpha,
    drifts_of,
    relative_error,
    relative_figures,
    steps_of,
)
from .gptq import Problem, Sweep, solve_all
from .grid import Grid, fit_grids, nearest, storable
from .hessian import Hessian
from .types import Accuracy, InputGroup, Solution

# Multiples of the fitted scales that are tried as well.
SCALE_MULTIPLIERS = (1.15, 1.3)

Layer = tuple[int, int]  # the place of its family among all, and its own in the family


@dataclass(frozen=True)
class _Batch:
    """Families of one shape, of which all are corrected or none, and all have a probe or none.

    Attributes:
        places: of the families among all.
        weights: those of all families in one place of the family, float32 (B, rows, n).
        drifts: of the families, for the correction; empty without one.
    """

    places: Sequence[int]
    families: Sequence[InputGroup]
    weights: Sequence[Tensor]
    drifts: Sequence[Drift]

    @property
    def has_probes(self) -> bool:
        """Whether all families have a probe; if not, none has."""
        return self.families[0].probe is not None

    def probes(self) -> tuple[Tensor, Tensor]:
        """X and X̃, (B, tokens, n), rows of zeros below the shorter ones."""
        probes = [family.probe for family in self.families if family.probe is not None]
        return padded([probe.X for probe in probes]), padded([probe.X_full for probe in probes])

    def apart(self, j: int, batch: Tensor) -> dict[Layer, Tensor]:
        """Of what was computed for the j-th weights of all families, each layer's own."""
        return {(i, j): part for i, part in zip(self.places, batch, strict=True)}


@dataclass(frozen=True)
class _Aim:
    """What the weights of a family are replaced by: targets T, one below the other, and a grid for them."""

    T: Tensor
    grid: Grid
    shared: FactoredHessian


def solve_families(
    families: Sequence[InputGroup],
    settings: LayerSettings,
    accuracy: Accuracy,
    backend: Backend,
    batched: bool | None,
) -> list[list[Solution]]:
    """The body of `quantize_together`, for weights that were checked."""
    shared = _prepared(families, settings)
    wanted = [_wants_correction(*pair, accuracy) for pair in zip(families, shared, strict=True)]
    drifts = _drifts(families, wanted)
    batches = list(_batches(families, drifts, backend, batched))
    targets, alphas = _targets(families, batches, accuracy)
    aims: dict[int, _Aim] = {}
    for batch, T in zip(batches, targets, strict=True):
        aims |= _aims(batch, T, shared, settings, backend)
    swept = _swept([aims[i] for i in range(len(families))], settings, backend)
    found = _finished(families, batches, aims, swept, accuracy)
    return [
        [
            replace(
                found[i, j],
                alpha=alphas.get((i, j), 0.0) if family.hessian.has_full else None,
                fallbacks=(*shared[i].fallbacks, *((NO_CORRECTION,) if wanted[i] and not drifts[i] else ())),
            )
            for j in range(len(family.weights))
        ]
        for i, family in enumerate(families)
    ]


def _prepared(families: Sequence[InputGroup], settings: LayerSettings) -> list[FactoredHessian]:
    """From the caches: all that are empty are filled at once, if there are several."""
    empty = [family for family in families if not family.cache.has(settings)]
    if len(empty) > 1:
        hessians = [family.hessian for family in empty]
        found = prepare_all(hessians, settings.group_size, settings.act_order, settings.damp)
        for family, prepared in zip(empty, found, strict=True):
            family.cache.put(family.hessian, settings, prepared)
    return [family.cache.get(family.hessian, settings) for family in families]


def _wants_correction(family: InputGroup, shared: FactoredHessian, accuracy: Accuracy) -> bool:
    if not family.hessian.has_full or accuracy.correction == 0 or shared.factor is None:
        return False
    return accuracy.correction != "auto" or family.probe is not None


def _drifts(families: Sequence[InputGroup], wanted: Sequence[bool]) -> list[Drift | None]:
    """The drift of each family that wants one; None also where its matrix cannot be factored."""
    sizes: dict[int, list[InputGroup]] = {}
    for family, wants in zip(families, wanted, strict=True):
        if wants and not family.cache.has_drift:
            sizes.setdefault(family.hessian.n, []).append(family)
    for n, members in sizes.items():
        for some in in_batches(members, n):
            found = drifts_of([family.hessian for family in some])
            for family, drift in zip(some, found, strict=True):
                family.cache.put_drift(family.hessian, drift)
    drifts = (
        family.cache.drift(family.hessian) if wants else None
        for family, wants in zip(families, wanted, strict=True)
    )
    return [drift if drift and drift.L is not None else None for drift in drifts]


def _batches(
    families: Sequence[InputGroup], drifts: Sequence[Drift | None], backend: Backend, batched: bool | None
) -> Iterator[_Batch]:
    """All families, each in one batch; alone where the device gains nothing."""
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, family in enumerate(families):
        together = path_for(backend, family.weights[0]) == "triton" if batched is None else batched
        shapes = tuple((W.shape, W.dtype) for W in family.weights)
        key = (shapes, drifts[i] is None, family.probe is None) if together else (i,)
        alike.setdefault(key, []).append(i)
    for members in alike.values():
        for places in in_batches(members, families[members[0]].hessian.n):
            some = [families[i] for i in places]
            yield _Batch(
                places,
                some,
                [
                    stacked(weights).detach().float()
                    for weights in zip(*(one.weights for one in some), strict=True)
                ],
                [drift for i in places if (drift := drifts[i])],
            )


def _targets(
    families: Sequence[InputGroup], batches: Sequence[_Batch], accuracy: Accuracy
) -> tuple[list[Tensor], dict[Layer, float]]:
    """For each batch T = W + α step, (B, rows of a family, n), and α of every layer that is corrected."""
    steps = [steps_of(batch.weights, batch.drifts) if batch.drifts else [] for batch in batches]
    alphas = _alphas(families, batches, steps, accuracy)
    targets = []
    for batch, of_batch in zip(batches, steps, strict=True):
        for j, of_all in enumerate(of_batch):
            for i, W, step in zip(batch.places, batch.weights[j], of_all, strict=True):
                torch.add(W, step, alpha=alphas[i, j], out=step)
        parts = of_batch or batch.weights
        targets.append(parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1))
    return targets, alphas


def _alphas(
    families: Sequence[InputGroup],
    batches: Sequence[_Batch],
    steps: Sequence[Sequence[Tensor]],
    accuracy: Accuracy,
) -> dict[Layer, float]:
    corrected = [(batch, of_batch) for batch, of_batch in zip(batches, steps, strict=True) if of_batch]
    if accuracy.correction != "auto":
        given = float(accuracy.correction)
        return {
            (i, j): given for batch, _ in corrected for i in batch.places for j in range(len(batch.weights))
        }
    figures: dict[Layer, Sequence[Tensor]] = {}
    for batch, of_batch in corrected:
        X, X_full = batch.probes()
        for j, (W, step) in enumerate(zip(batch.weights, of_batch, strict=True)):
            found = batch.apart(j, alpha_figures(W, step, X, X_full))
            figures |= {layer: [of_layer] for layer, of_layer in found.items()}
    return {layer: ALPHA_SHRINKAGE * best_alpha(*sums) for layer, sums in _summed(families, figures).items()}


def _aims(
    batch: _Batch, T: Tensor, shared: Sequence[FactoredHessian], settings: LayerSettings, backend: Backend
) -> dict[int, _Aim]:
    """Of every family of a batch."""
    D = stacked([shared[i].D for i in batch.places]).to(T.device)
    g_idx = stacked([shared[i].g_idx for i in batch.places]).to(T.device)
    grids = fit_grids(T, D, g_idx, settings.bits, sym=settings.sym, backend=backend)
    return {i: _Aim(t, grid, shared[i]) for i, t, grid in zip(batch.places, T, grids, strict=True)}


def _swept(
    aims: Sequence[_Aim], settings: LayerSettings, backend: Backend
) -> list[tuple[QuantizedMatrix, Tensor | None]]:
    """For each aim the codes of the best of some stretched grids, row by row, and the loss of every row.

    The grid that fits the weights best clips the largest of them. In the sweep a column takes errors of
    others on top of its own weight, and a clipped one cannot: where inputs are strongly correlated a wider
    and coarser grid ends with the lower error. Without a factorization: rounded to nearest, None.
    """
    stretches = SCALE_MULTIPLIERS if settings.bits < 8 else ()
    problems = [
        Problem(aim.T, aim.shared.factor, [aim.grid, *(_stretched(aim.grid, by) for by in stretches)])
        for aim in aims
        if aim.shared.factor is not None
    ]
    solved = iter(zip(problems, solve_all(problems, settings.bits, backend=backend), strict=True))
    results: list[tuple[QuantizedMatrix, Tensor | None]] = []
    for aim in aims:
        if aim.shared.factor is None:
            q = nearest(aim.T, aim.grid, settings.bits)
            results.append((codes_of(q, aim.grid, settings), None))
        else:
            problem, sweeps = next(solved)
            results.append(_best(problem.grids, sweeps, settings))
    return results


def _stretched(grid: Grid, by: float) -> Grid:
    return Grid(storable(grid.scales.float() * by).to(grid.scales.dtype), grid.zeros, grid.g_idx)


def _best(
    grids: Sequence[Grid], sweeps: Sequence[Sweep], settings: LayerSettings
) -> tuple[QuantizedMatrix, Tensor]:
    """Every row as in the sweep where its loss is lowest, and these losses."""
    codes, scales, losses = sweeps[0].codes, grids[0].scales, sweeps[0].losses
    for sweep, grid in zip(sweeps[1:], grids[1:], strict=True):
        better = sweep.losses < losses
        codes = torch.where(better[:, None], sweep.codes, codes)
        scales = torch.where(better[:, None], grid.scales, scales)
        losses = torch.where(better, sweep.losses, losses)
    return codes_of(codes, Grid(scales, grids[0].zeros, grids[0].g_idx), settings), losses


def codes_of(q: Tensor, grid: Grid, settings: LayerSettings) -> QuantizedMatrix:
    """Codes (m, n) with their grid."""
    return QuantizedMatrix(q, grid.scales, grid.zeros, grid.g_idx, settings.bits, settings.group_size)


def _finished(
    families: Sequence[InputGroup],
    batches: Sequence[_Batch],
    aims: Mapping[int, _Aim],
    swept: Sequence[tuple[QuantizedMatrix, Tensor | None]],
    accuracy: Accuracy,
) -> dict[Layer, Solution]:
    """Every layer on its own, with its loss and true error."""
    rows = {(i, j): some for i, family in enumerate(families) for j, some in enumerate(_rows(family))}
    targets = {(i, j): aims[i].T[some] for (i, j), some in rows.items()}
    codes = {(i, j): _part(swept[i][0], some) for (i, j), some in rows.items()}
    losses = {(i, j): found[some] for (i, j), some in rows.items() if (found := swept[i][1]) is not None}
    for layer, T in targets.items():
        if layer not in losses:
            losses[layer] = _losses(T, codes[layer], families[layer[0]].hessian)
    errors: dict[Layer, Tensor] = {}
    for batch in (batch for batch in batches if batch.has_probes):
        X, X_full = batch.probes()
        for j, W in enumerate(batch.weights):
            W_hat = stacked([codes[i, j].dequantize() for i in batch.places])
            errors |= batch.apart(j, relative_figures(W, W_hat, X, X_full))
    figures = {layer: [losses[layer], *([errors[layer]] if layer in errors else ())] for layer in codes}
    solutions = {}
    for (i, j), (loss, *error) in _summed(families, figures).items():
        H, shared = families[i].hessian, aims[i].shared
        solutions[i, j] = Solution(
            codes[i, j],
            loss,
            damp=None if shared.factor is None else shared.damp,
            tokens=H.tokens,
            dropped=H.dropped,
            dead=shared.dead,
            true_error=relative_error(*error) if error else None,
        )
    return solutions


def _rows(family: InputGroup) -> list[slice]:
    """Where each weight is, all being one below the other."""
    ends = [*accumulate(len(W) for W in family.weights)]
    return [slice(end - len(W), end) for W, end in zip(family.weights, ends, strict=True)]


def _part(codes: QuantizedMatrix, rows: slice) -> QuantizedMatrix:
    return replace(codes, codes=codes.codes[rows], scales=codes.scales[rows], zeros=codes.zeros[rows])


def _losses(T: Tensor, codes: QuantizedMatrix, H: Hessian) -> Tensor:
    """(t − ŵ) H (t − ŵ)ᵀ of every row, float64."""
    E = T - codes.dequantize()
    return (E @ H.matrix()).mul_(E).sum(dim=1, dtype=torch.float64)


def _summed(
    families: Sequence[InputGroup], figures: Mapping[Layer, Sequence[Tensor]]
) -> dict[Layer, list[float]]:
    """Each layer's figures, (rows, …), summed over all of its rows, on the host."""
    layers = sorted(figures)
    sums = [families[i].totals[j](of_rows) for i, j in layers for of_rows in figures[i, j]]
    values = iter(on_host(sums))
    return {layer: [value for _ in figures[layer] for value in next(values)] for layer in layers}
