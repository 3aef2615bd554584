"""Which modules of a model will be quantized, with what settings, and why the others will not.

A plan is made before any work. It needs no definition of the architecture: the layers inside
numbered blocks (``model.layers.3.…``) are quantized, everything else is left alone and listed
with its reason. In a model without numbered blocks every layer is quantized. Parts of a model that
read images or sound instead of text are left alone.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from .checkpoint.assemble import names_on_disk, separate_layers
from .checkpoint.layout import empty_layer
from .config import AUTO, GROUP_SIZES, LayerSettings, QuantConfig
from .errors import ConfigError, ModelError
from .modeling.experts import unfused_modules, why_fused
from .modeling.layers import has_plain_forward, is_layer, matrix_shape
from .modeling.multimodal import parts_of
from .torch_internals import NonDynamicallyQuantizableLinear
from .transformers_internals import WeightNames, conversions_of

_BLOCK = re.compile(r"^(?:.*?\.)?\d+(?=\.|$)")
_ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)(\.|$)")
_NOT_LINEAR = re.compile(r"embed|head|norm", re.I)  # matrices that are no linear layers, by name
_STREAM_MIXER = re.compile(r"(^|\.)altup(\.|$)")
_STREAM_MIXER_REASON = "mixes the parallel streams of the model (AltUp)"
_ROUTER_REASON = "router of a mixture of experts"
_HEAD_REASON = "output embedding (quantized with lm_head=True, --lm-head)"
_OUTSIDE_REASON = "outside the repeated blocks (name it in an override to quantize it)"


@dataclass(frozen=True)
class LayerPlan:
    """One layer that will be quantized: its weight is (out_features, in_features)."""

    name: str
    out_features: int
    in_features: int
    settings: LayerSettings
    block: str

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features

    def packed(self) -> dict[str, Tensor]:
        """Its packed tensors without values, in the order of the journal."""
        settings = self.settings
        tensors = empty_layer(settings.bits, settings.group_size, self.in_features, self.out_features)
        return dict(sorted(tensors.items()))


@dataclass(frozen=True)
class Skipped:
    """One weight matrix that stays as it is, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Plan:
    """What will happen to every weight matrix of a model.

    Attributes:
        layers: the layers that will be quantized.
        skipped: the other linear layers, and fused experts.
        notes: sentences for the user.
        others: tensors inside blocks that have several dimensions and belong to no linear layer, such as convolutions.
    """

    layers: tuple[LayerPlan, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]
    others: tuple[Skipped, ...] = ()

    @property
    def weights(self) -> int:
        """Number of weights that will be quantized."""
        return sum(layer.weights for layer in self.layers)

    def block_layers(self) -> dict[str, list[str]]:
        """Names of the layers of each block, in order."""
        blocks: dict[str, list[str]] = {}
        for layer in self.layers:
            blocks.setdefault(layer.block, []).append(layer.name)
        return blocks


def block_of(name: str) -> str:
    """The numbered block a module belongs to (``model.layers.3``), or its own name outside of blocks."""
    match = _BLOCK.match(name)
    return match.group(0) if match else name


def make_plan(model: nn.Module, config: QuantConfig) -> Plan:
    """Decide for every weight matrix of `model`.

    Raises:
        ConfigError: a pattern in `ignore` or `override` matches nothing.
        ModelError: no layer is left to quantize.
    """
    candidates = {name: module for name, module in model.named_modules() if is_layer(module)}
    _check_patterns(config, candidates)
    head = output_embedding_name(model)
    defaults = _default_reasons(model, candidates, head)
    # An override asks for special layers (head, routers …) if it matches no others; a broad one does not.
    ordinary = [name for name, reason in defaults.items() if reason is None]
    special = [p for p in config.override if not any(re.search(p, name) for name in ordinary)]
    split = _split_at_load(model, candidates)
    kept = {name: reason for name, reason in split.items() if reason} | _shared(candidates)
    layers: list[LayerPlan] = []
    skipped: list[Skipped] = []
    for name, module in candidates.items():
        settings = config.layer(name)
        asked = (config.lm_head and name == head) or any(re.search(pattern, name) for pattern in special)
        if settings is None:
            reason: str | None = "asked to stay as it is (ignore or override)"
        else:
            reason = (None if asked else defaults[name]) or _unsupported(module) or kept.get(name)
        if settings is None or reason is not None:
            skipped.append(Skipped(name, tuple(module.weight.shape), reason or ""))
            continue
        out_features, in_features = matrix_shape(module)
        layers.append(LayerPlan(name, out_features, in_features, settings, block_of(name)))
    skipped.extend(_routers(model, candidates))
    skipped.extend(
        Skipped(name, tuple(model.get_parameter(name).shape), reason)
        for name, reason in why_fused(model).items()
    )
    if not layers:
        reasons = Counter(item.reason for item in skipped)
        listed = (
            "; ".join(f"{count} × {reason}" for reason, count in reasons.items()) or "it has no linear layers"
        )
        raise ModelError(f"nothing to quantize in {type(model).__name__}: {listed}")
    others = [item for item in _others(model) if all(item.name != other.name for other in skipped)]
    notes = (*_notes(layers), *_split_notes(layers, split), *_expert_notes(model))
    return Plan(tuple(layers), tuple(skipped), notes, tuple(others))


def plan_and_group_size(model: nn.Module, config: QuantConfig) -> tuple[Plan, QuantConfig]:
    """Plan, with the group size "auto" replaced by the largest usual one that divides the inputs of every layer.

    Returns:
        The plan, and the config with the group size that it has.

    Raises:
        ConfigError, ModelError: as `make_plan`.
    """
    plan = make_plan(model, config)  # takes "auto" for the largest size
    if config.group_size != AUTO:
        return plan, config
    widths = {layer.in_features for layer in plan.layers if "group_size" not in config.overridden(layer.name)}
    fitting = (size for size in GROUP_SIZES if all(width % size == 0 for width in widths))
    config = dataclasses.replace(config, group_size=next(fitting, GROUP_SIZES[0]))
    if config.group_size == GROUP_SIZES[0]:
        return plan, config
    plan = make_plan(model, config)
    if config.target_bits is not None:  # chosen for each layer later
        return plan, config
    sizes = ", ".join(map(str, GROUP_SIZES))
    note = f"group size {config.group_size}: the largest of {sizes} that divides the inputs of every layer"
    return dataclasses.replace(plan, notes=(note, *plan.notes)), config


def plan_copied(tensors: Mapping[str, tuple[int, ...]], config: QuantConfig) -> list[LayerPlan]:
    """Plan the matrices among tensors that the model class does not run, such as layers for multi-token prediction.

    Nothing calibrates them, so they are rounded to nearest. Routers, embeddings and heads stay as they are.

    Args:
        tensors: name in the files → shape.
        config: settings of the run; without `mtp` nothing is quantized.
    """
    layers = []
    for key, shape in tensors.items() if config.mtp else ():
        name = key.removesuffix(".weight")
        settings = config.layer(name)
        if (
            name == key
            or len(shape) != 2
            or settings is None
            or _ROUTER.search(name)
            or _NOT_LINEAR.search(name)
        ):
            continue
        settings = dataclasses.replace(settings, method="rtn", act_order="none")
        layers.append(LayerPlan(name, shape[0], shape[1], settings, block_of(name)))
    return layers


def with_settings(plan: Plan, chosen: Mapping[str, tuple[int, int]]) -> Plan:
    """The plan with other bits and group sizes: layer name → (bits, group_size), for every layer."""
    layers = []
    for layer in plan.layers:
        bits, group_size = chosen[layer.name]
        settings = dataclasses.replace(layer.settings, bits=bits, group_size=group_size)
        layers.append(dataclasses.replace(layer, settings=settings))
    others = [note for note in plan.notes if note not in set(_notes(plan.layers))]
    return dataclasses.replace(plan, layers=tuple(layers), notes=(*_notes(layers), *others))


def output_embedding_name(model: nn.Module) -> str | None:
    """Name of the output embedding (``lm_head``), if the model has one."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if head is None:
        return None
    return next((name for name, module in model.named_modules() if module is head), None)


def _split_at_load(model: nn.Module, names: Collection[str]) -> dict[str, str | None]:
    """Layers without an own tensor in the files, such as parts of a fused q/k/v.

    The value is None if transformers loads the layer under the name of its module, else why it stays as it is.
    """
    split = separate_layers(model, names)
    if not split:
        return {}
    assert isinstance(model, PreTrainedModel)
    loader = WeightNames(model, conversions_of(model))
    separate = names_on_disk(model, split, split)
    fused = names_on_disk(model, split)
    reason = (
        "the files hold it in another form ({}), and transformers would not load it from a tensor of its own"
    )
    return {
        name: None
        if loader.rename(f"{stored[0]}.weight") == (f"{name}.weight", [])
        else reason.format(", ".join(fused[name]) or "unknown")
        for name, stored in separate.items()
    }


def _shared(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Layer → reason, for layers that share one weight."""
    names: dict[int, list[str]] = {}
    for name, module in layers.items():
        names.setdefault(id(module.get_parameter("weight")), []).append(name)
    return {
        name: f"it shares its weight with {next(other for other in same if other != name)}"
        for same in names.values()
        if len(same) > 1
        for name in same
    }


def _default_reasons(model: nn.Module, names: Collection[str], head: str | None) -> dict[str, str | None]:
    """Layer → why it stays as it is unless the configuration asks for it; None if it is quantized."""
    has_blocks, parts = any(_BLOCK.match(name) for name in names), parts_of(model)
    reasons: dict[str, str | None] = {}
    for name in names:
        if name == head:
            reasons[name] = _HEAD_REASON
        elif _ROUTER.search(name):
            reasons[name] = _ROUTER_REASON
        elif _STREAM_MIXER.search(name):
            reasons[name] = _STREAM_MIXER_REASON
        else:
            outside = has_blocks and not _BLOCK.match(name)
            reasons[name] = parts.why_not(name) or (_OUTSIDE_REASON if outside else None)
    return reasons


def _unsupported(module: nn.Module) -> str | None:
    """Why a layer cannot be quantized, whatever the configuration asks for."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "its weight is used directly, not through its forward"
    if not has_plain_forward(module):
        return f"a {type(module).__name__} uses its weight in its own way"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return "convolution with groups"
    return None


def _routers(model: nn.Module, layers: Collection[str]) -> Iterable[Skipped]:
    """Routers that are no linear layers but hold a matrix."""
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if name not in layers and _ROUTER.search(name) and weight is not None and weight.ndim == 2:
            yield Skipped(name, tuple(weight.shape), _ROUTER_REASON)


def _others(model: nn.Module) -> Iterable[Skipped]:
    """Tensors inside blocks that have several dimensions and belong to no linear layer."""
    parts = parts_of(model)
    for name, module in model.named_modules():
        if not _BLOCK.match(name) or is_layer(module):
            continue
        kind = type(module).__name__
        for key, tensor in module.named_parameters(recurse=False):
            if tensor.ndim < 2:
                continue
            full, what = f"{name}.{key}", f"a parameter that {kind} uses in its own way"
            if key == "weight":
                full, what = name, f"{kind} is not a linear layer"
            yield Skipped(full, tuple(tensor.shape), parts.why_not(name) or what)


def _check_patterns(config: QuantConfig, names: Collection[str]) -> None:
    for pattern in (*config.ignore, *config.override):
        if not any(re.search(pattern, name) for name in names):
            shown = ", ".join(list(names)[:4]) + (", …" if len(names) > 4 else "")
            raise ConfigError(
                f"the pattern {pattern!r} matches no layer of this model; its layers are called {shown or '(none)'}"
            )


def _split_notes(layers: Iterable[LayerPlan], split: Collection[str]) -> Iterable[str]:
    """Layers that the result holds one by one and the original files do not."""
    names = [layer.name for layer in layers if layer.name in split]
    if names:
        yield (
            f"the original files hold {len(names)} layers in tensors that transformers splits or merges when it loads "
            f"them; the result holds each by itself, under the name of its module ({names[0]}). fewbit reads that, and "
            "transformers after fewbit.register(); another engine may not."
        )


def _expert_notes(model: nn.Module) -> Iterable[str]:
    """Experts that the result holds in another form than the original files."""
    fused = {name: module for name, module in unfused_modules(model).items() if module.stored_fused}
    for name, module in list(fused.items())[:1]:
        yield (
            f"the original files hold the experts of {len(fused)} modules in fused tensors; the result holds each "
            f"expert by itself ({name}.0 … {module.num_experts - 1}). fewbit reads that, and transformers after "
            "fewbit.register(); another engine does if its own model class takes experts one by one."
        )


def _notes(layers: Iterable[LayerPlan]) -> Iterable[str]:
    """What other engines may not read."""
    uneven = Counter(
        (layer.in_features, layer.settings.group_size)
        for layer in layers
        if layer.settings.group_size != -1 and layer.in_features % layer.settings.group_size
    )
    for (width, size), count in uneven.items():
        fitting = [g for g in (128, 64, 32) if width % g == 0 and g < size]
        advice = f"group size {fitting[0]} divides it" if fitting else "group size -1 always fits"
        yield (
            f"{count} layers have {width} inputs, which group size {size} does not divide: their last group is "
            f"shorter. fewbit reads that; vLLM, SGLang and GPTQModel may not ({advice})."
        )
    ragged = sum(
        _is_padded(layer.in_features, layer) or _is_padded(layer.out_features, layer) for layer in layers
    )
    if ragged:
        yield (
            f"{ragged} layers have a width that does not fill whole 32-bit words: the last word is padded. "
            "fewbit reads that; other engines may not."
        )


def _is_padded(width: int, layer: LayerPlan) -> bool:
    bits = layer.settings.bits
    return width % 32 != 0 if bits == 3 else width * bits % 32 != 0
