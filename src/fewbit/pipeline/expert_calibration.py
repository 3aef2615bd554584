"""Which tokens each expert is calibrated with.

An expert's Hessian is made from the tokens that the router sends to it. An *under-routed* expert gets too few of them
to know its inputs. It also computes as many other tokens of the layer as it lacks, evenly spaced in the calibration
set. Its outputs for these borrowed tokens are discarded, but its layers see inputs as if the router had sent them. With
N tokens routed to the expert and M wanted: H = Σ_routed x xᵀ + (M − N) · mean x xᵀ.

On the full-precision path every expert also computes the tokens that it gets on the quantized path, so that the rows of
both paths belong to the same tokens.

Routes are decided at a sync point between the router and the experts, on the CPU: each step depends on the size of the
previous result, and a GPU would synchronize at every one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..distributed import Communicator
from ..modeling.experts import ROUTING, Route, RoutingPoint, routed_modules, routes_of
from .scheduler import LayerInput
from .statistics import BatchMasks, ExpertRows

# An expert with fewer tokens than this for each of its input features is under-routed. Chosen by measurement:
# docs/algorithm.md.
TOKENS_PER_FEATURE = 1


class ExpertCalibration:
    """Decides at every routing point which rows each expert computes, and remembers it until the next one.

    Args:
        model: model with unfused experts.
        batches: masks of every batch of this process.
        comm: ranks of the run.

    Attributes:
        points: name → routing point, a sync point for the scheduler.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[BatchMasks], comm: Communicator | None = None
    ) -> None:
        self._experts = routed_modules(model)
        self._batches = batches
        self._comm = comm or Communicator()
        # Module of the latest point → job → rows of each expert.
        self._rows: dict[str, dict[int, list[ExpertRows]]] = {}
        self.points: dict[str, RoutingPoint] = {
            f"{name}.{ROUTING}": module.routing for name, module in self._experts.items()
        }

    def with_points(self, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """Return `layers` with the routing point of each mixture of experts in front of its experts."""
        result: dict[str, nn.Module] = {}
        for name, layer in layers.items():
            point = f"{_module_of(name)}.{ROUTING}"
            if point in self.points:
                result.setdefault(point, self.points[point])
            result[name] = layer
        return result

    def on_routing(self, name: str, inputs: Sequence[LayerInput]) -> None:
        """Decide the routes of every job. ``inputs[i].x`` is the router's choice, int64 (tokens, k)."""
        for point in self.points.values():
            point.reset()
        point, module, N = self.points[name], name.removesuffix(f".{ROUTING}"), len(self._batches)
        choices = {given.job: given.x.cpu() for given in inputs}
        routed = {job: routes_of(choice, point.experts) for job, choice in choices.items()}
        quantized = {job: choice for job, choice in choices.items() if job < N}
        borrowed = self._borrowed(module, quantized, TOKENS_PER_FEATURE * self._experts[module].hidden_size)
        routes = {job: _each(_with_borrowed, routed[job], borrowed[job]) for job in quantized}
        known: dict[int, list[ExpertRows]] = {}
        self._rows = {module: known}
        for given in inputs:
            job, choice = given.job, choices[given.job]
            partner = job - N if job >= N else job + N  # the same batch on the other path
            paired = partner in choices and choices[partner].shape == choice.shape
            if job < N:
                known[job] = [
                    ExpertRows(route.tokens, len(choice), len(by_router.tokens), paired)
                    for route, by_router in zip(routes[job], routed[job], strict=True)
                ]
            elif paired:
                routes[job] = _each(_after, routed[job], [route.tokens for route in routes[partner]])
            point.set_routes(given.x, _on_device(routes.get(job, routed[job]), given.x.device))

    def rows(self, layer: str, job: int) -> ExpertRows | None:
        """Return the rows of an expert layer's input in a quantized job; None for other layers."""
        known = self._rows.get(_module_of(layer), {}).get(job)
        return None if known is None else known[int(layer.split(".")[-2])]

    def _borrowed(self, module: str, choices: Mapping[int, Tensor], wanted: int) -> dict[int, list[Tensor]]:
        """Return, by job, the tokens that each expert computes in addition to those routed to it.

        They are evenly spaced among all tokens that count and are not routed to the expert, in rank and job order.
        """
        E = self.points[f"{module}.{ROUTING}"].experts
        counted = {job: self._counted(module, job, choice) for job, choice in choices.items()}
        have = {job: _tokens_per_expert(choice[counted[job]], E) for job, choice in choices.items()}
        spare = {job: int(counted[job].sum()) - have[job] for job in choices}
        none = torch.zeros(E, dtype=torch.int64)
        sizes = sum(have.values(), none.clone())
        self._comm.all_reduce_(sizes)
        spare_by_rank = self._comm.all_gather_object(sum(spare.values(), none).tolist())
        total = torch.tensor(spare_by_rank).sum(0)
        before = torch.tensor(spare_by_rank[: self._comm.rank]).reshape(-1, E).sum(0)
        missing = torch.minimum((wanted - sizes).clamp(min=0), total)
        borrowed = {}
        for job, choice in choices.items():
            picks = [
                _evenly_spaced(*(int(numbers[e]) for numbers in (missing, total, before, spare[job])))
                for e in range(E)
            ]
            borrowed[job] = [_not_routed(choice, counted[job], e, picks[e]) for e in range(E)]
            before = before + spare[job]
        return borrowed

    def _counted(self, module: str, job: int, choice: Tensor) -> Tensor:
        """Return which rows of a layer's input may enter a Hessian, bool (tokens,): no padding, no hold-out."""
        counted = torch.ones(len(choice), dtype=torch.bool, device=choice.device)
        batch = self._batches[job]
        padding, held_out = batch.padding(module), batch.held_out_rows(len(choice))
        if padding is not None and padding.numel() == len(choice):
            counted &= padding.reshape(-1).to(choice.device)
        if held_out is not None:
            counted &= ~held_out.to(choice.device)
        return counted


def _module_of(layer: str) -> str:
    """Return the name of the module of experts, if `layer` is a layer of an expert."""
    return layer.rsplit(".", 2)[0]


def _each(
    make: Callable[[Route, Tensor], Route], routes: Sequence[Route], tokens: Sequence[Tensor]
) -> list[Route]:
    return [make(*pair) for pair in zip(routes, tokens, strict=True)]


def _with_borrowed(route: Route, borrowed: Tensor) -> Route:
    """Append borrowed tokens to a route."""
    if len(borrowed) == 0:
        return route
    routed = torch.arange(len(route.tokens), device=borrowed.device)
    return Route(torch.cat([route.tokens, borrowed]), route.slots, routed)


def _after(route: Route, first: Tensor) -> Route:
    """Put the tokens `first` in front of the route's tokens that are not among them."""
    tokens = route.tokens
    row_of = tokens.new_full((int(torch.cat([first, tokens, first.new_zeros(1)]).max()) + 1,), -1)
    row_of[first] = torch.arange(len(first), device=first.device)
    new = tokens[row_of[tokens] < 0]
    row_of[new] = len(first) + torch.arange(len(new), device=first.device)
    return Route(torch.cat([first, new]), route.slots, row_of[tokens])


def _on_device(routes: list[Route], device: torch.device) -> list[Route]:
    """Return the routes of one job on the device of its tokens."""
    if device.type == "cpu":
        return routes
    return copied(routes, lambda tensor: tensor.to(device, non_blocking=True))


def copied(routes: Sequence[Route], copy: Callable[[Tensor], Tensor]) -> list[Route]:
    """Copy all routes with three calls of `copy`: a few large transfers instead of many small ones."""
    routed = [torch.arange(len(route.slots)) if route.routed is None else route.routed for route in routes]
    parts = [[route.tokens for route in routes], [route.slots for route in routes], routed]
    copies = [torch.split(copy(torch.cat(part)), [len(one) for one in part]) for part in parts]
    return [
        Route(tokens, slots, None if route.routed is None else rows)
        for route, tokens, slots, rows in zip(routes, *copies, strict=True)
    ]


def _not_routed(choice: Tensor, counted: Tensor, expert: int, picks: Tensor) -> Tensor:
    """Return the tokens number `picks`, int64, among those that count and are not routed to the expert."""
    picks = picks.to(choice.device)
    if len(picks) == 0:
        return picks
    return (counted & ~(choice == expert).any(1)).nonzero()[picks, 0]


def _tokens_per_expert(choice: Tensor, experts: int) -> Tensor:
    """Return the number of tokens routed to each expert, int64 (E,), on the CPU.

    A router may choose an expert twice for one token, which is one token.
    """
    chosen = torch.zeros(len(choice), experts + 1, dtype=torch.bool, device=choice.device)
    return chosen.scatter_(1, choice.clamp(max=experts), True)[:, :experts].sum(0).cpu()


def _evenly_spaced(wanted: int, total: int, before: int, here: int) -> Tensor:
    """Return which of the numbers before ... before + here − 1 are picked, int64, relative to `before`.

    Picked are `wanted` evenly spaced numbers of 0 ... total − 1: floor(i · total / wanted).
    """
    if wanted == 0:
        return torch.empty(0, dtype=torch.int64)
    first, end = (-(-number * wanted // total) for number in (before, before + here))
    return torch.arange(first, end) * total // wanted - before
