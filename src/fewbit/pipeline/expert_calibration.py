"""Which tokens each expert is calibrated with.

An expert's Hessian is made of the tokens that the router sends to it. A *starved* expert gets too few of them
to know its inputs: it also computes as many other tokens of the layer as it lacks, evenly taken from the
calibration set. Its outputs for them are thrown away, but its layers see inputs as they would be if the router
had sent them. Formula: with N tokens sent to the expert and M wanted, H = Σ_sent x xᵀ + (M − N) · mean x xᵀ.

In the full-precision stream every expert computes the tokens that it gets in the quantized one, besides those
that are sent to it there, so that the rows of both streams belong together.

`Routing.meet` is called where a layer's tokens are given to its experts and none of them has run. It decides on the
CPU: every step needs to know how many tokens the one before left, and a GPU would be waited for each time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..distributed import Communicator
from ..modeling.experts import ROUTING, Route, RoutingPoint, routes_of, unfused_modules
from .scheduler import LayerInput
from .statistics import ExpertRows, Rows

# An expert with fewer tokens than this for each of its input features is starved. Chosen by measurement:
# docs/algorithm.md.
TOKENS_PER_FEATURE = 1


class Routing:
    """Decides at every routing point of a model which rows its experts compute, and remembers it until the next.

    Args:
        model: its experts are unfused.
        batches: what is known of the rows of every batch of this process.
        comm: the processes.

    Attributes:
        points: name → routing point, meeting points for the walk.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Rows], comm: Communicator | None = None) -> None:
        self._experts = unfused_modules(model)
        self._batches = batches
        self._comm = comm or Communicator()
        self._rows: dict[str, dict[int, list[ExpertRows]]] = {}  # of the module decided last
        self.points: dict[str, RoutingPoint] = {
            f"{name}.{ROUTING}": module.routing for name, module in self._experts.items()
        }

    def meeting_points(self, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """`layers` with the routing points of their experts, each before its experts."""
        result: dict[str, nn.Module] = {}
        for name, layer in layers.items():
            point = f"{_module_of(name)}.{ROUTING}"
            if point in self.points:
                result.setdefault(point, self.points[point])
            result[name] = layer
        return result

    def meet(self, name: str, arrivals: Sequence[LayerInput]) -> None:
        """Decide the routes of every job; ``arrivals[i].x`` is the router's choice, (tokens, k)."""
        for other in self.points.values():
            other.forget()
        point, module, N = self.points[name], name.removesuffix(f".{ROUTING}"), len(self._batches)
        choices = {arrival.job: arrival.x.cpu() for arrival in arrivals}
        sent = {job: routes_of(choice, point.experts) for job, choice in choices.items()}
        quantized = {job: choice for job, choice in choices.items() if job < N}
        added = self._added(module, quantized, TOKENS_PER_FEATURE * self._experts[module].hidden_size)
        routes = {job: _each(_with_tokens, sent[job], added[job]) for job in quantized}
        known: dict[int, list[ExpertRows]] = {}
        self._rows = {module: known}
        for arrival in arrivals:
            job, choice = arrival.job, choices[arrival.job]
            partner = job - N if job >= N else job + N
            paired = partner in choices and choices[partner].shape == choice.shape
            if job < N:
                rows = zip(routes[job], sent[job], strict=True)
                known[job] = [ExpertRows(r.tokens, len(choice), len(s.tokens), paired) for r, s in rows]
            elif paired:
                routes[job] = _each(_after, sent[job], [route.tokens for route in routes[partner]])
            point.decide(arrival.x, _on_device(routes.get(job, sent[job]), arrival.x.device))

    def rows(self, layer: str, job: int) -> ExpertRows | None:
        """What the rows of an expert's input are in a quantized job; None for layers that are no experts."""
        known = self._rows.get(_module_of(layer), {}).get(job)
        return None if known is None else known[int(layer.split(".")[-2])]

    def _added(self, module: str, choices: Mapping[int, Tensor], wanted: int) -> dict[int, list[Tensor]]:
        """Job → for each expert the tokens that it computes besides those that are sent to it.

        Of all tokens that count and are not sent to a starved expert, in the order of ranks and jobs, evenly
        spaced ones are taken.
        """
        E = self.points[f"{module}.{ROUTING}"].experts
        counted = {job: self._counted(module, job, choice) for job, choice in choices.items()}
        have = {job: _sent_counts(choice[counted[job]], E) for job, choice in choices.items()}
        spare = {job: int(counted[job].sum()) - have[job] for job in choices}
        none = torch.zeros(E, dtype=torch.int64)
        sizes = sum(have.values(), none.clone())
        self._comm.all_reduce_(sizes)
        everyones = self._comm.all_gather_object(sum(spare.values(), none).tolist())
        total = torch.tensor(everyones).sum(0)
        before = torch.tensor(everyones[: self._comm.rank]).reshape(-1, E).sum(0)
        missing = torch.minimum((wanted - sizes).clamp(min=0), total)
        added = {}
        for job, choice in choices.items():
            places = [
                _evenly(*(int(numbers[e]) for numbers in (missing, total, before, spare[job])))
                for e in range(E)
            ]
            added[job] = [_others(choice, counted[job], e, places[e]) for e in range(E)]
            before = before + spare[job]
        return added

    def _counted(self, module: str, job: int, choice: Tensor) -> Tensor:
        """Which rows of a layer's input may enter a Hessian, bool (tokens,): all but padding and held-out ones."""
        counted = torch.ones(len(choice), dtype=torch.bool, device=choice.device)
        batch = self._batches[job]
        padding, held_out = batch.padding(module), batch.held_out_rows(len(choice))
        if padding is not None and padding.numel() == len(choice):
            counted &= padding.reshape(-1).to(choice.device)
        if held_out is not None:
            counted &= ~held_out.to(choice.device)
        return counted


def _module_of(layer: str) -> str:
    """The module that holds the experts, if `layer` is a layer of an expert."""
    return layer.rsplit(".", 2)[0]


def _each(
    make: Callable[[Route, Tensor], Route], routes: Sequence[Route], tokens: Sequence[Tensor]
) -> list[Route]:
    return [make(*pair) for pair in zip(routes, tokens, strict=True)]


def _with_tokens(route: Route, added: Tensor) -> Route:
    """The route with more tokens at its end, which the router did not send."""
    if len(added) == 0:
        return route
    own = torch.arange(len(route.tokens), device=added.device)
    return Route(torch.cat([route.tokens, added]), route.slots, own)


def _after(route: Route, first: Tensor) -> Route:
    """The route with the tokens `first` before those of its own that are not among them."""
    tokens = route.tokens
    places = tokens.new_full((int(torch.cat([first, tokens, first.new_zeros(1)]).max()) + 1,), -1)
    places[first] = torch.arange(len(first), device=first.device)
    new = tokens[places[tokens] < 0]
    places[new] = len(first) + torch.arange(len(new), device=first.device)
    return Route(torch.cat([first, new]), route.slots, places[tokens])


def _on_device(routes: list[Route], device: torch.device) -> list[Route]:
    """The routes of one job on the device of its tokens."""
    if device.type == "cpu":
        return routes
    return copied(routes, lambda tensor: tensor.to(device, non_blocking=True))


def copied(routes: Sequence[Route], copy: Callable[[Tensor], Tensor]) -> list[Route]:
    """The routes with a copy of every tensor, made of all routes together: few large ones, for a GPU."""
    own = [torch.arange(len(route.slots)) if route.own is None else route.own for route in routes]
    parts = [[route.tokens for route in routes], [route.slots for route in routes], own]
    copies = [torch.split(copy(torch.cat(part)), [len(one) for one in part]) for part in parts]
    return [
        Route(tokens, slots, None if route.own is None else own)
        for route, tokens, slots, own in zip(routes, *copies, strict=True)
    ]


def _others(choice: Tensor, counted: Tensor, expert: int, places: Tensor) -> Tensor:
    """Of the tokens that count and are not sent to the expert those at `places`, int64."""
    places = places.to(choice.device)
    if len(places) == 0:
        return places
    return (counted & ~(choice == expert).any(1)).nonzero()[places, 0]


def _sent_counts(choice: Tensor, experts: int) -> Tensor:
    """How many tokens are sent to each expert, int64 (E,), on the CPU."""
    return torch.bincount(choice.reshape(-1), minlength=experts)[:experts].cpu()


def _evenly(wanted: int, total: int, before: int, here: int) -> Tensor:
    """Which of the `here` places after the first `before` ones are taken, int64, counted from there.

    `wanted` of all `total` places are, evenly spaced: those at i · total / wanted, rounded down.
    """
    if wanted == 0:
        return torch.empty(0, dtype=torch.int64)
    first, end = (-(-place * wanted // total) for place in (before, before + here))
    return torch.arange(first, end) * total // wanted - before
