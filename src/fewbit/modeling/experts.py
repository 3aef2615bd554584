"""Mixtures of experts, taken apart: one module with ordinary linear layers for each expert.

transformers holds the weights of all experts of a layer in two fused parameters, ``gate_up_proj`` (E, 2I, H)
and ``down_proj`` (E, H, I). `unfuse` puts in the place of each such module one that computes the same from
``0.gate_proj``, ``0.up_proj``, ``0.down_proj``, ``1.gate_proj`` …: layers like any other, for the walk, for
the files and for the kernels. Knows nothing of quantization.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightTransform

from .expert_names import PARTS, conversions_of, converter_of, renamings, without_fusing

ROUTING = "routing"  # the attribute of `UnfusedExperts`

# What transformers says of every class of fused experts.
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


@dataclass(frozen=True)
class Route:
    """The rows that one expert computes.

    Attributes:
        tokens: int64 (rows,), the tokens, as row numbers of the hidden states.
        slots: int64 (n,), as which of its choices each token's router took this expert.
        own: int64 (n,), which rows are those of the router's choice; None: all of them.
    """

    tokens: Tensor
    slots: Tensor
    own: Tensor | None = None

    @property
    def chosen(self) -> Tensor:
        """The tokens that the router sent here, int64 (n,)."""
        return self.tokens if self.own is None else self.tokens[self.own]


def routes_of(top_k_index: Tensor, experts: int) -> list[Route]:
    """One route for each expert, its tokens in ascending order.

    Args:
        top_k_index: (tokens, k), the experts chosen for each token; a number of `experts` or more means none.
    """
    k = top_k_index.shape[-1]
    flat = top_k_index.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=experts)[:experts].tolist()
    order = order[: sum(counts)]
    tokens, slots = torch.split(order // k, counts), torch.split(order % k, counts)
    return [Route(*pair) for pair in zip(tokens, slots, strict=True)]


class RoutingPoint(nn.Module):
    """Where tokens have been given to experts and no expert has run yet: a meeting point for the walk."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = experts
        self._decided: list[tuple[Tensor, list[Route]]] = []

    def forward(self, top_k_index: Tensor) -> list[Route]:
        """The routes decided for this very tensor; otherwise just what the router chose."""
        for given, routes in self._decided:
            if given is top_k_index:
                return routes
        return routes_of(top_k_index, self.experts)

    def decide(self, top_k_index: Tensor, routes: list[Route]) -> None:
        """From now on `top_k_index` is answered with `routes`."""
        self._decided.append((top_k_index, routes))

    def forget(self) -> None:
        """Answer every tensor with what the router chose."""
        self._decided.clear()


class Expert(nn.Module):
    """One expert: a feed-forward network with or without a gate.

    Args:
        layers: ``gate_proj`` (where there is one), ``up_proj``, ``down_proj``.
        activation: from the outputs of gate and up, side by side, or of up alone, to the input of down.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._activation = activation
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, H) → (tokens, H)."""
        inner = [layer(x) for name, layer in self.named_children() if name != "down_proj"]
        h = self._activation(inner[0] if len(inner) == 1 else torch.cat(inner, dim=-1))
        y: Tensor = self.get_submodule("down_proj")(h)
        return y


class UnfusedExperts(nn.Module):
    """The experts ``0`` … ``E−1`` of one layer, with the forward of the fused module.

    Args:
        fused: the module to be taken apart, for which `why_not` is None. Its parameters are views of it from
            now on, and it loses them.

    Attributes:
        fused_parameters: what the fused module called them. num_experts: E. hidden_size: H.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.fused_parameters = tuple(fused._parameters)
        self.num_experts, _, self.hidden_size = fused.get_parameter(self.fused_parameters[0]).shape
        self.routing = RoutingPoint(self.num_experts)
        # The old module, now empty, stays alive for the settings of its activation.
        activation = partial(_activation, fused)
        for number in range(self.num_experts):
            self.add_module(str(number), Expert(_layers(fused, number), activation))
        fused._parameters.clear()
        self.train(fused.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: (tokens, H).
            top_k_index: int64 (tokens, k), numbers of experts; E or more means none.
            top_k_weights: (tokens, k).
        """
        output = torch.zeros_like(hidden_states)
        routes: list[Route] = self.routing(top_k_index)
        for number, route in enumerate(routes):
            if len(route.tokens) == 0:
                continue
            y = self.expert(number)(hidden_states[route.tokens])
            y = y if route.own is None else y[route.own]
            weighted = y * top_k_weights[route.chosen, route.slots, None]
            output.index_add_(0, route.chosen, weighted.to(output.dtype))
        return output

    def expert(self, number: int) -> Expert:
        """One of the experts."""
        expert = self.get_submodule(str(number))
        assert isinstance(expert, Expert)
        return expert

    def let_go_of_fused(self) -> None:
        """Give weights that are still views of the fused ones tensors of their own, so that those are freed."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear) and layer.weight.untyped_storage().nbytes() > layer.weight.nbytes:
                layer.weight = nn.Parameter(layer.weight.detach().clone(), layer.weight.requires_grad)


def unfuse(model: nn.Module) -> dict[str, UnfusedExperts]:
    """Take every mixture of experts apart that can be. Others stay as they are: `why_fused` says why.

    Works with weights, of which the layers become views, and without (on the meta device). What transformers
    saves and loads from now on has the names of the original files.

    Returns:
        The new modules by name.
    """
    if not isinstance(model, PreTrainedModel):
        return {}
    conversions = conversions_of(model)
    modules = {}
    for name, fused in _fused_modules(model):
        if why_not(name, fused, conversions) is None:
            parent, _, own = name.rpartition(".")
            modules[name] = UnfusedExperts(fused)
            setattr(model.get_submodule(parent), own, modules[name])
    if modules:
        model._weight_conversions = unfused_conversions(model, conversions)
    return modules


def unfused_modules(model: nn.Module) -> dict[str, UnfusedExperts]:
    """The modules that `unfuse` made, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, UnfusedExperts)}


def unfused_conversions(model: nn.Module, conversions: list[WeightTransform]) -> list[WeightTransform]:
    """`conversions`, made for the model's class, for this model with its experts taken apart."""
    return without_fusing(
        conversions, {name: module.fused_parameters for name, module in unfused_modules(model).items()}
    )


def why_fused(model: nn.Module) -> dict[str, str]:
    """Every fused parameter that is still in the model → why it cannot be taken apart."""
    conversions = conversions_of(model) if isinstance(model, PreTrainedModel) else []
    return {
        f"{name}.{parameter}": why_not(name, module, conversions) or "experts that were not taken apart"
        for name, module in _fused_modules(model)
        for parameter, weight in module._parameters.items()
        if weight is not None and weight.ndim == 3
    }


def why_not(name: str, fused: nn.Module, conversions: list[WeightTransform]) -> str | None:
    """Why the fused experts at `name` cannot be taken apart; None if they can."""
    kind = type(fused).__name__
    if any(not hasattr(fused, flag) for flag in _FLAGS):
        return f"{kind} holds a weight of three dimensions that is not one of transformers' fused experts"
    features = {
        "a bias": fused.has_bias,
        "transposed weights": fused.is_transposed,
        "interleaved gate and up": not fused.is_concatenated,
        "a norm after each expert": getattr(fused, "has_post_expert_norm", False),
    }
    listed = ", ".join(feature for feature, present in features.items() if present)
    if listed:
        return f"fused experts with {listed}: no GPTQ layout is known for them"
    if not _has_known_shapes(fused, gated=bool(fused.has_gate)):
        return f"{kind} holds other weights than gate_up_proj (E, 2I, H) and down_proj (E, H, I)"
    for parameter in fused._parameters:
        converter = converter_of(f"{name}.{parameter}", conversions)
        if converter is None or not any("*" in source for source in converter.source_patterns):
            return (
                "the original files hold these experts fused in one tensor, for which there is no GPTQ layout"
            )
        if renamings(converter, PARTS[parameter]) is None:
            return "transformers makes these experts from the files in a way that fewbit does not know"
    return None


def _has_known_shapes(fused: nn.Module, *, gated: bool) -> bool:
    first = "gate_up_proj" if gated else "up_proj"
    parameters = dict(fused.named_parameters())
    if set(parameters) != {first, "down_proj"} or any(p.ndim != 3 for p in parameters.values()):
        return False
    E, inner, H = parameters[first].shape
    return (
        parameters["down_proj"].shape == (E, H, inner // len(PARTS[first])) and inner % len(PARTS[first]) == 0
    )


def _fused_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Conv1d) and any(
            p is not None and p.ndim == 3 for p in module._parameters.values()
        ):
            yield name, module


def _activation(fused: nn.Module, first: Tensor) -> Tensor:
    """From the outputs of gate and up, side by side, or of up alone, to the input of down."""
    apply: Any = fused._apply_gate if fused.has_gate else fused.act_fn
    h: Tensor = apply(first)
    return h


def _layers(fused: nn.Module, number: int) -> dict[str, nn.Linear]:
    """The layers of one expert; their weights are views of the fused ones."""
    layers = {}
    for parameter, weight in fused.named_parameters(recurse=False):
        parts = PARTS[parameter]
        for part, matrix in zip(parts, weight.detach()[number].chunk(len(parts)), strict=True):
            layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(matrix, requires_grad=weight.requires_grad)
            layers[part] = layer
    return layers
