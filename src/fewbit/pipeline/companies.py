"""Experts of one layer that are met together, because a GPU has too little to do with one.

Before the walk the experts of a layer form companies (`experts.Company`, of sizes that `room` finds). Every batch then
pauses twice for each company: where the inputs of its experts' first layers are at hand, and where those of their down
projections are. There the Hessians of all are made and their layers solved as one (`LayerQuantizer.solve_ahead`). A
moment later each layer is met as ever, recognises its input, and takes its solution.

Contract: a company changes when something is computed, not what: each layer gets the input, the Hessian and the codes
that it would get on its own, the latter but for ties that are broken by the order of a float32 sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

from torch import nn

from ..modeling.experts import DOWN, CompanyPoint, UnfusedExperts, unfused_modules
from .scheduler import LayerInput


@dataclass(frozen=True)
class Party:
    """Layers that are about to get one input, and the arrivals of it: none where no token came."""

    layers: Sequence[str]
    arrivals: Sequence[LayerInput]


class Companies:
    """The meeting points of the companies that a model's experts have formed.

    Args:
        modules: the experts, by name.

    Attributes:
        points: name → point, meeting points for the walk.
    """

    def __init__(self, modules: Mapping[str, UnfusedExperts]) -> None:
        self.points: dict[str, CompanyPoint] = {}
        self._layers: dict[str, list[list[str]]] = {}  # point → those behind it, for each expert
        self._halves: dict[str, list[str]] = {}  # layer → the points of its company
        for name, module in modules.items():
            for start, company in module.companies.items():
                firsts = [
                    [f"{name}.{n}.{layer}" for layer in module.expert(n).first] for n in company.numbers
                ]
                downs = [[f"{name}.{n}.{DOWN}"] for n in company.numbers]
                halves = {f"{name}.from_{start}.first": firsts, f"{name}.from_{start}.{DOWN}": downs}
                self.points |= dict(zip(halves, (company.first, company.down), strict=True))
                self._layers |= halves
                self._halves |= {layer: [*halves] for layer in chain(*firsts, *downs)}

    def meeting_points(self, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """`layers` in the order in which companies come to them, with a point before each half that has any."""
        result: dict[str, nn.Module] = {}
        for name, layer in layers.items():
            for point in self._halves.get(name, ()):
                behind = [other for other in chain(*self._layers[point]) if other in layers]
                if behind:
                    result.setdefault(point, self.points[point])
                result |= {other: layers[other] for other in behind}
            result[name] = layer
        return result

    def parties(self, name: str, arrivals: Sequence[LayerInput]) -> list[Party]:
        """One for each expert, of what arrived at the point `name`."""
        inputs = [(arrival.job, (arrival.x, *arrival.others)) for arrival in arrivals]
        return [
            Party(layers, [LayerInput(job, x[i]) for job, x in inputs if len(x[i])])
            for i, layers in enumerate(self._layers[name])
        ]


@contextmanager
def formed(model: nn.Module, sizes: Mapping[str, int]) -> Iterator[Companies]:
    """While entered, experts of `model` run in companies.

    Args:
        sizes: module of experts → how many of them are a company. Those that are not named run one after the other.
    """
    modules = {name: module for name, module in unfused_modules(model).items() if name in sizes}
    try:
        for name, module in modules.items():
            module.form_companies(sizes[name])
        yield Companies(modules)
    finally:
        for module in modules.values():
            module.form_companies(1)
