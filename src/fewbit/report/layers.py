"""The layers of a report, put in order for the page: stacks of blocks, and kinds of layer within a block.

``model.layers.3.mlp.experts.17.down_proj`` is in the stack ``model.layers``, in block 3, of the kind
``mlp.experts.*.down_proj``, number 17 of its kind there. So the experts of a block share one place however many
they are, and the page stays small. `columns` keeps every layer's own figures.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..planning import block_of

OUTSIDE = ""  # the stack of layers that are in no numbered block
_MOST_KINDS = 40
_EXPERT_NUMBER = re.compile(r"(?<=experts\.)\d+(?=\.|$)|(?<=expert\.)\d+(?=\.|$)")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")

# Measure → its name, how it is written, and what it is.
MEASURES = {
    "true_error": (
        "true error",
        "percent",
        "‖WX̃ − ŴX‖ / ‖WX̃‖ on held-out calibration tokens: what the layer's output has lost against the "
        "full-precision model, with all that earlier layers lost.",
    ),
    "output_error": (
        "own error",
        "percent",
        "‖WX − ŴX‖ / ‖WX‖ on the inputs that the layer has in the quantized model: what rounding this layer adds.",
    ),
    "bits_per_weight": ("bits per weight", "number", "Stored bits, scales and zero points counted."),
    "correction": (
        "correction α",
        "alpha",
        "How far the layer's target was moved towards the full-precision output, 0 to 1.",
    ),
    "tokens": ("tokens", "count", "Calibration tokens in the layer's Hessian."),
    "seconds": ("seconds", "seconds", "Time for the layer alone, without the forward pass."),
}

# What each layer's record has for the page, beside its place. `bits_per_weight` is computed here.
COLUMNS = (
    "out_features", "in_features", "bits", "group_size", "sym", "act_order", "method", "bits_per_weight",
    "stored_bytes", "tokens", "masked", "dropped", "held_out", "loss", "output_error", "true_error",
    "correction", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a layer is: `block` is a number, or None outside of blocks; `numbers` stand for the stars in `kind`."""

    stack: str
    block: int | None
    kind: str
    numbers: str

    @property
    def name(self) -> str:
        """The layer's full name."""
        kind = self.kind
        for number in self.numbers.split("."):
            kind = kind.replace("*", number, 1)
        return ".".join(
            part for part in (self.stack, "" if self.block is None else str(self.block), kind) if part
        )


@dataclass(frozen=True)
class Stack:
    """Blocks that follow each other, and the kinds of layer they have, in the model's order."""

    name: str
    blocks: tuple[int | None, ...]
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class KindRow:
    """The layers of one kind taken together.

    Attributes:
        shapes: such as "1536 × 576"; several where they differ. settings: such as "4 bits, group 64".
        error: mean of the measure shown. worst: the largest, with `worst_name`.
        correction: mean α; None where none was chosen.
        fewest, most: tokens seen. thin: layers with fewer tokens than inputs.
    """

    stack: str
    kind: str
    layers: int
    shapes: str
    settings: str
    weights: int
    bits_per_weight: float
    stored_bytes: int
    error: float | None
    worst: float | None
    worst_name: str
    correction: float | None
    fewest: int
    most: int
    thin: int


def places(layers: Iterable[Mapping[str, Any]]) -> list[Place]:
    """The place of every layer record."""
    split = [_split(layer["name"], layer["block"]) for layer in layers]
    found = [_place(*parts, _EXPERT_NUMBER) for parts in split]
    if len({(place.stack, place.kind) for place in found if place.stack}) <= _MOST_KINDS:
        return found
    return [_place(*parts, _NUMBER) for parts in split]


def place_of_skipped(name: str, known: Iterable[Place]) -> Place | None:
    """The place of a weight that stayed as it is, if layers of its kind were quantized elsewhere in its stack."""
    stack, block, rest = _split(name, block_of(name))
    kinds = {(place.stack, place.kind) for place in known}
    for pattern in (_EXPERT_NUMBER, _NUMBER):
        place = _place(stack, block, rest, pattern)
        if place.block is not None and (place.stack, place.kind) in kinds:
            return place
    return None


def stacks(found: Sequence[Place], skipped: Sequence[Place] = ()) -> list[Stack]:
    """The stacks in the model's order, layers outside of blocks last."""
    names = sorted(dict.fromkeys(place.stack for place in found), key=lambda name: name == OUTSIDE)
    result = []
    for name in names:
        inside = [place for place in found if place.stack == name]
        blocks = {place.block for place in (*inside, *skipped) if place.stack == name}
        order = sorted(blocks, key=lambda block: -1 if block is None else block)
        result.append(Stack(name, tuple(order), tuple(dict.fromkeys(place.kind for place in inside))))
    return result


def columns(layers: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Every layer's figures, by column. A column of equal values is stored once. Figures have four digits."""
    table = {name: [_figure(_value(layer, name)) for layer in layers] for name in COLUMNS}
    return {name: values[:1] if _constant(values) else values for name, values in table.items()}


def error_measure(layers: Sequence[Mapping[str, Any]]) -> str:
    """The error to show first: the true one where the run measured it, else the layer's own."""
    return "true_error" if any(is_known(layer, "true_error") for layer in layers) else "output_error"


def kind_rows(layers: Sequence[Mapping[str, Any]], found: Sequence[Place]) -> list[KindRow]:
    """One row for every kind of layer, in the model's order."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for layer, place in zip(layers, found, strict=True):
        groups.setdefault((place.stack, place.kind), []).append(layer)
    measure = error_measure(layers)
    ordered = sorted(groups.items(), key=lambda item: item[0][0] == OUTSIDE)
    return [_kind_row(stack, kind, group, measure) for (stack, kind), group in ordered]


def mean(values: Iterable[float | None]) -> float | None:
    """Of the finite ones; None if there are none."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def _kind_row(stack: str, kind: str, group: Sequence[Mapping[str, Any]], measure: str) -> KindRow:
    weights = sum(_weights(layer) for layer in group)
    stored = sum(layer["stored_bytes"] for layer in group)
    known = [layer for layer in group if is_known(layer, measure)]
    worst = max(known, key=lambda layer: layer[measure]) if known else None
    tokens = [layer["tokens"] for layer in group]
    return KindRow(
        stack=stack,
        kind=kind,
        layers=len(group),
        shapes=_distinct(f"{layer['out_features']} × {layer['in_features']}" for layer in group),
        settings=_settings(group),
        weights=weights,
        bits_per_weight=8 * stored / weights,
        stored_bytes=stored,
        error=mean(layer[measure] for layer in known),
        worst=worst[measure] if worst else None,
        worst_name=worst["name"] if worst else "",
        correction=mean(layer["correction"] for layer in group),
        fewest=min(tokens),
        most=max(tokens),
        thin=sum(layer["tokens"] < layer["in_features"] and layer["method"] == "gptq" for layer in group),
    )


def setting(layer: Mapping[str, Any]) -> str:
    """``4 bits, group 64``; ``rtn`` is said where it was asked for."""
    group = "one group" if layer["group_size"] == -1 else f"group {layer['group_size']}"
    method = "" if layer["method"] == "gptq" else f", {layer['method']}"
    return f"{layer['bits']} bits, {group}{method}"


def _settings(group: Sequence[Mapping[str, Any]]) -> str:
    """That of all, or the bits and group sizes that occur."""
    if len({setting(layer) for layer in group}) == 1:
        return setting(group[0])
    bits, sizes = (sorted({layer[key] for layer in group}) for key in ("bits", "group_size"))
    return f"{', '.join(map(str, bits))} bits; groups {', '.join(map(str, sizes))}"


def _split(name: str, block: str) -> tuple[str, int | None, str]:
    """(stack, block number, rest of the name)."""
    stack, _, number = block.rpartition(".")
    if not number.isdecimal():
        return OUTSIDE, None, name
    return stack, int(number), name[len(block) :].removeprefix(".")


def _place(stack: str, block: int | None, rest: str, pattern: re.Pattern[str]) -> Place:
    if block is None:
        return Place(OUTSIDE, None, rest, "")
    return Place(stack, block, pattern.sub("*", rest), ".".join(pattern.findall(rest)))


def _value(layer: Mapping[str, Any], name: str) -> Any:
    return 8 * layer["stored_bytes"] / _weights(layer) if name == "bits_per_weight" else layer[name]


def _figure(value: Any) -> Any:
    """Four significant digits; None for what is not finite, which JSON does not have."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _constant(values: Sequence[Any]) -> bool:
    return all(value == values[0] and type(value) is type(values[0]) for value in values)


def is_known(layer: Mapping[str, Any], name: str) -> bool:
    """Whether the record has this figure."""
    return layer[name] is not None and math.isfinite(layer[name])


def _weights(layer: Mapping[str, Any]) -> int:
    return int(layer["out_features"] * layer["in_features"])


def _distinct(texts: Iterable[str], most: int = 2) -> str:
    found = list(dict.fromkeys(texts))
    return "; ".join(found[:most]) + (f"; {len(found) - most} more" if len(found) > most else "")
