"""Mixtures of experts, unfused: one module with ordinary linear layers for each expert.

transformers holds the weights of all experts of a layer in two fused parameters, ``gate_up_proj`` (E, 2I, H) and
``down_proj`` (E, H, I). `unfuse` replaces each such module by one that computes the same from ``0.gate_proj``,
``0.up_proj``, ``0.down_proj``, ``1.gate_proj`` ...: ordinary layers for the pipeline, the files and the kernels. This
file knows nothing about quantization.

Checkpoint files hold one matrix for each expert and projection. transformers' conversion merges them into the fused
tensors when it loads, and splits them when it saves. For unfused experts the conversion becomes a renaming, which
transformers applies in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import internals
from ..internals import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    get_model_conversion_mapping,
)

ROUTING = "routing"  # attribute name of the `RoutingPoint` in `UnfusedExperts`

# Fused parameter → the projections that it concatenates.
PARTS = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}

_ANY_EXPERT = ".*."
_EXPERT_NUMBER = r"\.(\d+)\."

# Attributes that transformers defines on every class of fused experts.
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


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
    """One expert: a feed-forward network with or without a gate.

    Args:
        layers: ``gate_proj`` (where there is one), ``up_proj``, ``down_proj``.
        activation: function from the concatenated outputs of gate and up, or of up alone, to the input of down.
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
        fused: module to unfuse, for which `unsupported_reason` is None. The new parameters are views of its
            parameters, which it loses.

    Attributes:
        fused_parameters: parameter names of the fused module.
        num_experts: E.
        hidden_size: H.
        routing: sync point between the router and the experts.
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
        """Return the weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: (tokens, H).
            top_k_index: experts chosen for each token, int64 (tokens, k); E or more means none.
            top_k_weights: (tokens, k).
        """
        output = torch.zeros_like(hidden_states)
        routes: list[Route] = self.routing(top_k_index)
        for number, route in enumerate(routes):
            if len(route.tokens) == 0:
                continue
            y = self.expert(number)(hidden_states[route.tokens])
            y = y if route.routed is None else y[route.routed]  # borrowed tokens only feed Hessians
            weighted = y * top_k_weights[route.chosen, route.slots, None]
            output.index_add_(0, route.chosen, weighted.to(output.dtype))
        return output

    def expert(self, number: int) -> Expert:
        expert = self.get_submodule(str(number))
        assert isinstance(expert, Expert)
        return expert

    def release_fused(self) -> None:
        """Copy weights that are still views of the fused ones, so that those are freed."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear) and layer.weight.untyped_storage().nbytes() > layer.weight.nbytes:
                layer.weight = nn.Parameter(layer.weight.detach().clone(), layer.weight.requires_grad)


def unfuse(model: nn.Module) -> dict[str, UnfusedExperts]:
    """Unfuse every supported mixture of experts. The others stay fused; `why_fused` says why.

    With weights the new layers become views of them; without weights (on the meta device) it works too. From now on
    transformers saves and loads the model with the names of the original files.

    Returns:
        The new modules by name.
    """
    if not isinstance(model, PreTrainedModel):
        return {}
    conversions = _conversions_of(model)
    modules = {}
    for name, fused in _fused_modules(model):
        if unsupported_reason(name, fused, conversions) is None:
            parent, _, own = name.rpartition(".")
            modules[name] = UnfusedExperts(fused)
            setattr(model.get_submodule(parent), own, modules[name])
    if modules:
        internals.set_conversions(model, unfused_conversions(model, conversions))
    return modules


def unfused_modules(model: nn.Module) -> dict[str, UnfusedExperts]:
    """Return the modules that `unfuse` made, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, UnfusedExperts)}


def unfused_conversions(model: nn.Module, conversions: list[WeightTransform]) -> list[WeightTransform]:
    """Adapt `conversions`, made for the model's class, to this model with unfused experts."""
    replaced: dict[int, list[WeightRenaming]] = {}
    for name, module in unfused_modules(model).items():
        for parameter in module.fused_parameters:
            converter = _converter_of(f"{name}.{parameter}", conversions)
            if converter is not None and id(converter) not in replaced:
                replaced[id(converter)] = _renamings(converter, PARTS[parameter]) or []
    # Converters act after all renamings, so their replacements come last.
    kept = [entry for entry in conversions if id(entry) not in replaced]
    return [*kept, *(entry for entries in replaced.values() for entry in entries)]


def why_fused(model: nn.Module) -> dict[str, str]:
    """Return every parameter that is still fused → why it cannot be unfused."""
    conversions = _conversions_of(model) if isinstance(model, PreTrainedModel) else []
    return {
        f"{name}.{parameter}": unsupported_reason(name, module, conversions)
        or "experts that were not taken apart"
        for name, module in _fused_modules(model)
        for parameter, weight in module._parameters.items()
        if weight is not None and weight.ndim == 3
    }


def unsupported_reason(name: str, fused: nn.Module, conversions: list[WeightTransform]) -> str | None:
    """Return why the fused experts at `name` cannot be unfused; None if they can."""
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
        converter = _converter_of(f"{name}.{parameter}", conversions)
        if converter is None or not any("*" in source for source in converter.source_patterns):
            return (
                "the original files hold these experts fused in one tensor, for which there is no GPTQ layout"
            )
        if _renamings(converter, PARTS[parameter]) is None:
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
    """Map the concatenated outputs of gate and up, or of up alone, to the input of down."""
    return internals.expert_activation(fused)(first)


def _layers(fused: nn.Module, number: int) -> dict[str, nn.Linear]:
    """Return the layers of one expert; their weights are views of the fused ones."""
    layers = {}
    for parameter, weight in fused.named_parameters(recurse=False):
        parts = PARTS[parameter]
        for part, matrix in zip(parts, weight.detach()[number].chunk(len(parts)), strict=True):
            layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(matrix, requires_grad=weight.requires_grad)
            layers[part] = layer
    return layers


def _conversions_of(model: PreTrainedModel) -> list[WeightTransform]:
    """Return the conversion `model` was loaded with, or the one of its class if it was not loaded."""
    used = internals.conversions(model)
    if used is not None:
        return list(used)
    # As in transformers' own saving: without a file, prefixes are unknown.
    default = get_model_conversion_mapping(model, add_legacy=False)
    return [entry for entry in default if not isinstance(entry, PrefixChange)]


def _converter_of(parameter: str, conversions: Sequence[WeightTransform]) -> WeightConverter | None:
    """Return the conversion that makes the fused `parameter` (full name) from tensors of the files, if any."""
    for entry in reversed(conversions):
        if isinstance(entry, WeightConverter) and entry.reverse_transform().rename_source_key(parameter)[1]:
            return entry
    return None


def _renamings(converter: WeightConverter, parts: Sequence[str]) -> list[WeightRenaming] | None:
    """Return the renamings that replace `converter`, which makes a parameter of the projections `parts`.

    None unless the conversion is "stack the experts, then concatenate the projections".
    """
    stacks = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    expected = [(MergeModulelist, 0), (Concatenate, 1)][: min(len(parts), 2)]
    sources, targets = converter.source_patterns, converter.target_patterns
    one_matrix_each = all(
        source.count("*") == 1 == source.count(_ANY_EXPERT)
        and source.endswith(".weight")
        and "(" not in source
        for source in sources
    )
    if stacks != expected or len(sources) != len(parts) or len(targets) != 1 or not one_matrix_each:
        return None
    experts = targets[0].rpartition(".")[0]
    result = []
    for source, part in zip(sources, parts, strict=True):
        on_disk = source.removesuffix(".weight").replace(_ANY_EXPERT, _EXPERT_NUMBER)
        renaming = WeightRenaming(on_disk, rf"{experts}.\1.{part}")
        renaming.scope_prefix = converter.scope_prefix
        renaming.base_model_prefix = converter.base_model_prefix
        result.append(renaming)
    return result
