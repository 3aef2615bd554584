"""Mixtures of experts, unfused: one module with ordinary linear layers for each expert.

transformers holds the weights of all experts of a layer in a few fused parameters (`expert_layouts`). `unfuse` replaces
each such module by one that computes the same from ``0.gate_proj``, ``0.up_proj``, ``0.down_proj``, ``1.gate_proj``
...: ordinary layers for the pipeline, the files and the kernels. This file knows nothing about quantization.

Most checkpoints hold one matrix for each expert and projection, which transformers merges into the fused parameters
when it loads. Then the layers get the names of the files (`expert_names`). Others hold the fused parameters
themselves. Then `fused_for_loading` brings these back while the files are read, and single experts are saved under the
names of their modules, which no original file has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import transformers_internals
from ..transformers_internals import WeightTransform
from .expert_layouts import Activation, ExpertLayout, layout_of
from .expert_names import in_files, unfused_conversions_of

ROUTING = "routing"  # attribute name of the `RoutingPoint` in `RoutedExperts`


@dataclass(frozen=True)
class Route:
    """The rows that one expert computes.

    Attributes:
        tokens: row numbers of the hidden states, int64 (rows,).
        slots: for each token routed here, which of its k choices this expert is, int64 (n,).
        routed: which of the rows the router sent here, int64 (n,); None: all of them.
    """

    tokens: Tensor
    slots: Tensor
    routed: Tensor | None = None

    @property
    def chosen(self) -> Tensor:
        """The tokens that the router sent here, int64 (n,)."""
        return self.tokens if self.routed is None else self.tokens[self.routed]


def routes_of(top_k_index: Tensor, experts: int) -> list[Route]:
    """Return one route per expert, its tokens in ascending order.

    Args:
        top_k_index: experts chosen for each token, int64 (tokens, k); `experts` or more means none.
    """
    k = top_k_index.shape[-1]
    flat = top_k_index.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=experts)[:experts].tolist()
    order = order[: sum(counts)]
    tokens, slots = torch.split(order // k, counts), torch.split(order % k, counts)
    return [Route(*pair) for pair in zip(tokens, slots, strict=True)]


class RoutingPoint(nn.Module):
    """The step between the router and the experts: a sync point for the scheduler."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = experts
        self._routes: list[tuple[Tensor, list[Route]]] = []

    def forward(self, top_k_index: Tensor) -> list[Route]:
        """Return the routes set for this very tensor, or else the router's own choice."""
        for given, routes in self._routes:
            if given is top_k_index:
                return routes
        return routes_of(top_k_index, self.experts)

    def set_routes(self, top_k_index: Tensor, routes: list[Route]) -> None:
        """From now on, return `routes` for this tensor."""
        self._routes.append((top_k_index, routes))

    def reset(self) -> None:
        """Return the router's own choice for every tensor."""
        self._routes.clear()


class Expert(nn.Module):
    """One expert: a feed-forward network with or without a gate, or a single linear layer.

    Args:
        layers: the linear layers by name: ``gate_proj`` (where there is one), ``up_proj``, ``down_proj``.
        activation: function from the outputs of the layers before ``down_proj`` to its input.
        interleaved: whether `activation` takes them interleaved; otherwise they are concatenated.
    """

    def __init__(
        self, layers: Mapping[str, nn.Linear], activation: Activation, *, interleaved: bool = False
    ) -> None:
        super().__init__()
        self._activation = partial(activation)  # a module would become a child
        self._interleaved = interleaved
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, H) → (tokens, H)."""
        outputs = [layer(x) for name, layer in self.named_children() if name != "down_proj"]
        h = torch.stack(outputs, dim=-1).flatten(-2) if self._interleaved else torch.cat(outputs, dim=-1)
        y: Tensor = self.get_submodule("down_proj")(self._activation(h))
        return y


class UnfusedExperts(nn.Module):
    """The experts ``0`` … ``E−1`` of one module, each with ordinary linear layers.

    Args:
        fused: module to unfuse, whose layout is known. The new parameters are views of its parameters, which it loses.
        layout: its layout.

    Attributes:
        layout: the layout of the fused module.
        stored_fused: whether the original files hold the fused parameters.
        num_experts: E.
        hidden_size: H.
    """

    def __init__(self, fused: nn.Module, layout: ExpertLayout, *, stored_fused: bool = False) -> None:
        super().__init__()
        self.layout, self.stored_fused = layout, stored_fused
        self.num_experts, self.hidden_size = layout.experts, layout.hidden_size
        for number in range(self.num_experts):
            layers = {
                name: _empty_layer(matrix, bias) for name, matrix, bias in _matrices(fused, layout, number)
            }
            self.add_module(str(number), self._expert(layers))
        self._empty = {
            name: torch.empty_like(p, device="meta") for name, p in _fused_parameters(fused, layout)
        }
        self._set_views(fused)
        if layout.norm is not None:
            self.add_module(layout.norm, fused.get_submodule(layout.norm))
        # Empty now. It is alive for the settings of its activation, and hidden, because it is no part of the model.
        self._fused = [fused]
        self._remove_fused()
        self.train(fused.training)

    @property
    def fused_parameters(self) -> tuple[str, ...]:
        """Parameter names of the fused module."""
        return tuple(self._empty)

    def expert(self, number: int) -> nn.Module:
        return self.get_submodule(str(number))

    def release_fused(self) -> None:
        """Copy weights that are still views of the fused ones, so that those are freed."""
        for layer in self.modules():
            for key, tensor in layer._parameters.items() if isinstance(layer, nn.Linear) else ():
                if tensor is not None and tensor.untyped_storage().nbytes() > tensor.nbytes:
                    layer._parameters[key] = nn.Parameter(tensor.detach().clone(), tensor.requires_grad)

    @contextmanager
    def fused_for_loading(self) -> Iterator[None]:
        """While entered, the module has the fused parameters, empty at first.

        The layers become views of those that have been set at the end.
        """
        (fused,) = self._fused
        for name, empty in self._empty.items():
            owner, _, key = name.rpartition(".")
            fused.get_submodule(owner)._parameters[key] = nn.Parameter(empty, requires_grad=False)
        self._parameters.update(fused._parameters)
        children = {name: child for name, child in fused.named_children() if name != self.layout.norm}
        self._modules.update(children)
        try:
            yield
            fused._parameters.update({name: self._parameters[name] for name in fused._parameters})
            self._set_views(fused, only_loaded=True)
        finally:
            for name in fused._parameters:
                self._parameters.pop(name, None)
            for name in children:
                self._modules.pop(name)
            self._remove_fused()

    def sources(self) -> dict[str, str]:
        """Return parameter of a layer → fused parameter that it is a view of."""
        found = {}
        for number in range(self.num_experts):
            for parameter in self.layout.parameters:
                for part in parameter.parts:
                    layer = self._layer_name(number, part)
                    found[f"{layer}.weight"] = parameter.name
                    if parameter.bias is not None:
                        found[f"{layer}.bias"] = parameter.bias
        return found

    def _expert(self, layers: Mapping[str, nn.Linear]) -> nn.Module:
        assert self.layout.activation is not None
        return Expert(layers, self.layout.activation, interleaved=self.layout.parameters[0].interleaved)

    def _layer_name(self, number: int, part: str) -> str:
        return f"{number}.{part}"

    def _set_views(self, fused: nn.Module, *, only_loaded: bool = False) -> None:
        """Let the layers be views of the parameters of `fused`."""
        trained = any(parameter.requires_grad for _, parameter in _fused_parameters(fused, self.layout))
        for number in range(self.num_experts):
            for part, matrix, bias in _matrices(fused, self.layout, number):
                layer = self.get_submodule(self._layer_name(number, part))
                if not (only_loaded and matrix.is_meta):
                    layer._parameters["weight"] = nn.Parameter(matrix, trained)
                if bias is not None and not (only_loaded and bias.is_meta):
                    layer._parameters["bias"] = nn.Parameter(bias, trained)

    def _remove_fused(self) -> None:
        for name in self._empty:
            owner, _, key = name.rpartition(".")
            self._fused[0].get_submodule(owner)._parameters.pop(key, None)


class RoutedExperts(UnfusedExperts):
    """Experts that get all tokens with the router's choice.

    Attributes:
        routing: sync point between the router and the experts.
    """

    def __init__(self, fused: nn.Module, layout: ExpertLayout, *, stored_fused: bool = False) -> None:
        super().__init__(fused, layout, stored_fused=stored_fused)
        self.routing = RoutingPoint(self.num_experts)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: (..., H), N tokens.
            top_k_index: experts chosen for each token, int64 (N, k); E or more means none.
            top_k_weights: (N, k).
        """
        x = hidden_states.reshape(-1, self.hidden_size)
        output = torch.zeros_like(x)
        routes: list[Route] = self.routing(top_k_index)
        for number, route in enumerate(routes):
            if len(route.tokens) == 0:
                continue
            y = self.expert(number)(x[route.tokens])
            if self.layout.norm is not None:
                y = self.get_submodule(self.layout.norm)(y)
            y = y if route.routed is None else y[route.routed]  # borrowed tokens only feed Hessians
            weighted = y * top_k_weights[route.chosen, route.slots, None]
            output.index_add_(0, route.chosen, weighted.to(output.dtype))
        if self.layout.identities:
            share = top_k_weights.masked_fill(top_k_index < self.num_experts, 0).sum(-1, keepdim=True)
            output += (x * share).to(output.dtype)
        return output.view(hidden_states.shape)


class BatchedExperts(UnfusedExperts):
    """Experts that get one row of all tokens each; tokens that were not sent to an expert are 0 in its row."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(E · tokens, H) → (E · tokens, H)."""
        rows = hidden_states.view(self.num_experts, -1, self.hidden_size)
        output = torch.zeros_like(rows)
        for number, row in enumerate(rows):
            sent = row.any(dim=-1).nonzero()[:, 0]  # an expert has no bias: 0 stays 0
            if len(sent):
                output[number, sent] = self.expert(number)(row[sent])
        return output.view(hidden_states.shape)


class SortedExperts(UnfusedExperts):
    """Single linear layers that get the tokens sorted by expert."""

    def forward(self, inputs: Tensor, expert_size: Sequence[int]) -> Tensor:
        """Return the outputs (rows, out).

        Args:
            inputs: (rows, in), sorted by expert.
            expert_size: number of rows of each expert.
        """
        outputs = [
            self.expert(number)(rows)
            for number, rows in enumerate(torch.split(inputs, list(expert_size)))
            if len(rows)
        ]
        return torch.cat(outputs) if outputs else inputs.new_zeros(0, self._empty["weight"].shape[1])

    def _expert(self, layers: Mapping[str, nn.Linear]) -> nn.Module:
        return layers["linear"]

    def _layer_name(self, number: int, part: str) -> str:
        return str(number)


_CLASSES = {"routed": RoutedExperts, "batched": BatchedExperts, "sorted": SortedExperts}


def unfuse(model: nn.Module) -> dict[str, UnfusedExperts]:
    """Unfuse every supported mixture of experts. The others stay fused; `why_fused` says why.

    With weights the new layers become views of them; without weights (on the meta device) it works too. From now on
    transformers saves and loads the model with the names of the original files, where these hold single experts.

    Returns:
        The new modules by name.
    """
    if not isinstance(model, PreTrainedModel):
        return {}
    conversions = transformers_internals.conversions_of(model)
    modules = {}
    shared = _shared_experts(model)
    for name, fused, layout in list(_fused_modules(model)):
        known = in_files(name, layout, conversions)
        if not isinstance(layout, ExpertLayout) or known.reason is not None or name in shared:
            continue
        parent, _, own = name.rpartition(".")
        modules[name] = _CLASSES[layout.forward](fused, layout, stored_fused=known.fused)
        setattr(model.get_submodule(parent), own, modules[name])
        # The initialization of some classes, which runs after loading, looks for the fused parameters.
        transformers_internals.mark_loaded(model.get_submodule(parent))
    if modules:
        transformers_internals.set_conversions(model, unfused_conversions(model, conversions))
    return modules


def unfused_modules(model: nn.Module) -> dict[str, UnfusedExperts]:
    """Return the modules that `unfuse` made, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, UnfusedExperts)}


def routed_modules(model: nn.Module) -> dict[str, RoutedExperts]:
    """Return the modules that `unfuse` made and that have a routing point, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RoutedExperts)}


def unfused_conversions(model: nn.Module, conversions: list[WeightTransform]) -> list[WeightTransform]:
    """Adapt `conversions`, made for the model's class, to this model with unfused experts."""
    modules = unfused_modules(model)
    layouts = {name: module.layout for name, module in modules.items()}
    fused = [name for name, module in modules.items() if module.stored_fused]
    return unfused_conversions_of(layouts, conversions, fused)


def fused_modules(model: nn.Module) -> set[str]:
    """Return the names of the modules that hold fused experts."""
    return {name for name, _, _ in _fused_modules(model)}


def why_fused(model: nn.Module) -> dict[str, str]:
    """Return every parameter that is still fused → why it cannot be unfused."""
    conversions = transformers_internals.conversions_of(model) if isinstance(model, PreTrainedModel) else []
    reasons, shared = {}, _shared_experts(model)
    for name, module, layout in _fused_modules(model):
        reason = layout if isinstance(layout, str) else in_files(name, layout, conversions).reason
        if name in shared:
            reason = f"these experts share their weights with {shared[name]}"
        for parameter, weight in module.named_parameters():
            if weight.ndim == 3 or (isinstance(layout, ExpertLayout) and weight.ndim == 2):
                reasons[f"{name}.{parameter}".lstrip(".")] = reason or "experts that were not taken apart"
    return reasons


def _fused_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, ExpertLayout | str]]:
    for name, module in model.named_modules():
        layout = None if isinstance(module, UnfusedExperts) else layout_of(module)
        if layout is not None:
            yield name, module, layout


def _shared_experts(model: nn.Module) -> dict[str, str]:
    """Return every module of fused experts that shares a parameter → another module with the same one."""
    owners: dict[int, list[str]] = {}
    for name, module, _ in _fused_modules(model):
        for parameter in module.parameters():
            owners.setdefault(id(parameter), []).append(name)
    return {
        name: next(other for other in names if other != name)
        for names in owners.values()
        if len(set(names)) > 1
        for name in names
    }


def _fused_parameters(fused: nn.Module, layout: ExpertLayout) -> Iterator[tuple[str, Tensor]]:
    for parameter in layout.parameters:
        for name in (parameter.name, parameter.bias):
            if name is not None:
                yield name, fused.get_parameter(name)


def _matrices(
    fused: nn.Module, layout: ExpertLayout, number: int
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Yield name, matrix (out, in) and bias (out,) of every layer of an expert: views of the fused parameters."""
    for parameter in layout.parameters:
        weight = fused.get_parameter(parameter.name)
        matrices = parameter.matrices(weight.detach(), layout.experts, number)
        biases: Sequence[Tensor | None] = [None] * len(matrices)
        if parameter.bias is not None:
            biases = parameter.divide(fused.get_parameter(parameter.bias).detach()[number])
        for (name, matrix), bias in zip(matrices.items(), biases, strict=True):
            yield name, matrix, bias


def _empty_layer(matrix: Tensor, bias: Tensor | None) -> nn.Linear:
    return nn.Linear(
        matrix.shape[1], matrix.shape[0], bias=bias is not None, device="meta", dtype=matrix.dtype
    )
