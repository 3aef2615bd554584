"""From a layer's Hessian to its solution: alone, or together with others.

Layers are solved before they are met where they are expected to share the Hessian of one that is met, and where
somebody has their Hessians already: `LayerSolver.solve_ahead`, for the experts of a company.

Contract: what a layer gets does not depend on the layers that are solved beside it, but for ties that are broken by the
order of a float32 sum. On the CPU every layer is solved alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain

from torch import nn

from ..distributed import Communicator, Part
from ..errors import ModelError, SolverError
from ..gptq import Accuracy, Hessian, InputGroup, Solution, quantize_together, quantize_weight
from ..gptq.cholesky import UNDER_ROUTED
from ..modeling.layers import weight_matrix
from ..planning import LayerPlan
from ..quantized_matrix import QuantizedMatrix
from .kin import Kin, gains_from_company
from .statistics import SharedHessian

MOST_ROWS = 1 << 15  # of layers that are solved together: so many fill any GPU


@dataclass(frozen=True)
class Family:
    """Layers with one input, and the Hessian that was made of it."""

    layers: Sequence[LayerPlan]
    shared: SharedHessian


@dataclass(frozen=True)
class _Ahead:
    """A layer that was solved before it was met, for the case that it gets the input that it was solved for.

    Attributes:
        guessed: it was beside one that was met, whose input it may have. If not, it is on its way.
    """

    shared: SharedHessian
    solution: Solution
    seconds: float
    guessed: bool


class LayerSolver:
    """Solves the layers of a plan.

    Args:
        layers, modules: by name.
        is_done: whether a layer was met already, or need not be solved.
        accuracy: correction and refit.
        strict: raise SolverError where a fallback would be used.
        ranks: the processes. Each solves some rows, and gets all codes.
    """

    def __init__(
        self,
        layers: Mapping[str, LayerPlan],
        modules: Mapping[str, nn.Module],
        is_done: Callable[[str], bool],
        accuracy: Accuracy,
        *,
        strict: bool,
        ranks: Communicator,
    ) -> None:
        self._layers, self._modules, self._is_done = layers, modules, is_done
        self._accuracy, self._strict, self._ranks = accuracy, strict, ranks
        self._kin = Kin()
        self._ahead: dict[str, _Ahead] = {}

    def solve(self, layer: LayerPlan, shared: SharedHessian | None) -> tuple[Solution, float]:
        """The layer's solution, and the seconds that it took.

        Args:
            shared: its Hessian; None where it needs none, or no token came.

        Raises:
            ModelError: the weight cannot be quantized.
            SolverError: in strict mode, it needed a fallback.
        """
        start = time.perf_counter()
        ahead = self._ahead.pop(layer.name, None)
        self._ahead = {
            name: one for name, one in self._ahead.items() if one.shared is shared or not one.guessed
        }
        if shared is None:
            return self._judged(layer, self._alone(layer), None), time.perf_counter() - start
        self._kin.met(layer.name, shared)
        if ahead is not None and ahead.shared is shared:
            return self._judged(layer, ahead.solution, shared), ahead.seconds
        layers = [layer, *self._company(layer)]
        solutions = self._together([Family(layers, shared)])
        share = (time.perf_counter() - start) / len(layers)
        for other, solution in zip(layers[1:], solutions[1:], strict=True):
            self._ahead[other.name] = _Ahead(shared, solution, share, guessed=True)
        return self._judged(layer, solutions[0], shared), share

    def solve_ahead(self, families: Sequence[Family], seconds: float) -> None:
        """Solve layers that are about to be met, those with the same settings together, in place of any before.

        Args:
            families: all layers are on one device. seconds: that their Hessians took; each layer gets a share.

        Raises:
            ModelError: a weight cannot be quantized.
        """
        start = time.perf_counter()
        solutions: dict[str, tuple[SharedHessian, Solution]] = {}
        for settings in dict.fromkeys(layer.settings for family in families for layer in family.layers):
            alike = [
                Family([layer for layer in family.layers if layer.settings == settings], family.shared)
                for family in families
            ]
            alike = [family for family in alike if family.layers]
            solved = iter(self._together(alike))
            solutions |= {
                layer.name: (family.shared, next(solved)) for family in alike for layer in family.layers
            }
        share = (seconds + time.perf_counter() - start) / max(1, len(solutions))
        self._ahead = {
            name: _Ahead(shared, solution, share, guessed=False)
            for name, (shared, solution) in solutions.items()
        }

    def _company(self, layer: LayerPlan) -> list[LayerPlan]:
        """Layers to be solved beside this one, where that gains anything: they are expected to get its input."""
        expected = [self._layers[name] for name in self._kin.expected(layer.name) if name in self._layers]
        fitting, rows = [], layer.out_features
        for other in expected:
            fits = other.settings == layer.settings and rows + other.out_features <= MOST_ROWS
            if fits and not self._is_done(other.name):
                fitting.append(other)
                rows += other.out_features
        # One whose weight is not in memory yet is not next. All processes have to solve the same layers.
        devices = [weight_matrix(self._modules[one.name]).device for one in (layer, *fitting)]
        flags = self._ranks.all(
            gains_from_company(devices[0]), *(device == devices[0] for device in devices[1:])
        )
        return [other for other, there in zip(fitting, flags[1:], strict=True) if there and flags[0]]

    def _together(self, families: Sequence[Family]) -> list[Solution]:
        """The solutions of all layers, one family after the other. All have the same settings."""
        layers = [layer for family in families for layer in family.layers]
        parts = {layer.name: self._ranks.part(layer.out_features) for layer in layers}
        with _named(layers):
            solved = quantize_together(
                [self._siblings(family, parts) for family in families],
                layers[0].settings,
                accuracy=self._accuracy,
            )
        return [
            replace(solution, codes=_gathered(solution.codes, parts[layer.name]))
            for layer, solution in zip(layers, chain(*solved), strict=True)
        ]

    def _siblings(self, family: Family, parts: Mapping[str, Part]) -> InputGroup:
        """This process's rows of a family."""
        shared = family.shared
        rows = [weight_matrix(self._modules[one.name])[parts[one.name].rows] for one in family.layers]
        totals = [parts[one.name].total for one in family.layers]
        return InputGroup(rows, shared.hessian, shared.cache, shared.probe, totals)

    def _alone(self, layer: LayerPlan) -> Solution:
        """The solution of a layer without a Hessian: where no token came, the solver records that as a fallback."""
        W, settings = weight_matrix(self._modules[layer.name]), layer.settings
        empty = Hessian(layer.in_features, device=W.device) if settings.method == "gptq" else None
        part = self._ranks.part(W.shape[0])
        with _named([layer]):
            solution = quantize_weight(
                W[part.rows], empty, settings, accuracy=self._accuracy, total=part.total
            )
        return replace(solution, codes=_gathered(solution.codes, part))

    def _judged(self, layer: LayerPlan, solution: Solution, shared: SharedHessian | None) -> Solution:
        """The solution with what the walk had to do for it, if that is accepted."""
        if shared and shared.added:
            solution = replace(solution, fallbacks=(UNDER_ROUTED, *solution.fallbacks))
        if solution.fallbacks and self._strict:
            raise SolverError(
                f"layer {layer.name} needed a fallback ({', '.join(solution.fallbacks)}) and strict mode refuses it: "
                "give more calibration text, raise damp, or leave out --strict"
            )
        return solution


@contextmanager
def _named(layers: Sequence[LayerPlan]) -> Iterator[None]:
    """Errors of the solver say which layer it was."""
    try:
        yield
    except SolverError as error:
        names = ", ".join(layer.name for layer in layers)
        raise ModelError(f"layer {names} cannot be quantized: {error}") from error


def _gathered(codes: QuantizedMatrix, part: Part) -> QuantizedMatrix:
    """The codes of all rows, of those of this process's."""
    return replace(
        codes,
        codes=part.gather(codes.codes),
        scales=part.gather(codes.scales),
        zeros=part.gather(codes.zeros),
    )
