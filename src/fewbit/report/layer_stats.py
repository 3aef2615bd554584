"""Statistics over the layer records of a report, for the page, the model card and the command line.

The page groups layers by location: a stack of blocks, a block number and a kind of layer. The layer
``model.layers.3.mlp.experts.17.down_proj`` is in the stack ``model.layers``, in block 3, and its kind is
``mlp.experts.*.down_proj``. All experts of a block therefore share one location.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..config import WITHOUT_CALIBRATION
from ..planning import block_of

Record = Mapping[str, Any]  # a `pipeline.layer_quantizer.LayerRecord` in plain JSON types

_MOST_KINDS = 40
_EXPERT_NUMBER = re.compile(r"(?<=experts\.)\d+(?=\.|$)|(?<=expert\.)\d+(?=\.|$)")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")

# Error → its name, and its meaning.
ERRORS = {
    "true_error": (
        "true error",
        "‖WX̃ − ŴX‖ / ‖WX̃‖ on held-out calibration tokens: the error of the layer's output against the "
        "full-precision model, including the errors of all earlier layers.",
    ),
    "output_error": (
        "own error",
        "‖WX − ŴX‖ / ‖WX‖ on the layer's inputs in the quantized model: the error that this layer adds.",
    ),
}


class Location(NamedTuple):
    """Stack of blocks, block number, and kind of layer; stack "" and block None outside of numbered blocks."""

    stack: str
    block: int | None
    kind: str


@dataclass(frozen=True)
class KindRow:
    """All layers of one kind.

    Attributes:
        stack: name of the stack of blocks; "" outside of blocks.
        kind: name of the kind.
        layers: number of layers.
        shapes: the shapes, such as "1536 × 576".
        settings: bits and group size, such as "4 bits, group 64".
        weights: number of weights.
        stored_bytes: size of the quantized layers.
        error: mean of the error shown; None if unknown.
        worst: the record with the largest error; None if unknown.
        correction: mean α; None where none was chosen.
        fewest: smallest number of calibration tokens.
        most: largest number of calibration tokens.
        thin: number of layers with fewer tokens than inputs.
    """

    stack: str
    kind: str
    layers: int
    shapes: str
    settings: str
    weights: int
    stored_bytes: int
    error: float | None
    worst: Record | None
    correction: float | None
    fewest: int
    most: int
    thin: int


def error_measure(layers: Iterable[Record]) -> str:
    """The error to show: the true one where the run measured it, else the layers' own."""
    return "true_error" if any(is_known(layer, "true_error") for layer in layers) else "output_error"


def error_name(layers: Sequence[Record]) -> str:
    """Name of the error that is shown."""
    return ERRORS[error_measure(layers)][0]


def is_known(layer: Record, name: str) -> bool:
    """True if the record has a finite value."""
    return layer[name] is not None and math.isfinite(layer[name])


def worst_layer(layers: Iterable[Record], measure: str) -> Record | None:
    """The record with the largest error; None if no error is known."""
    known = [layer for layer in layers if is_known(layer, measure)]
    return max(known, key=lambda layer: layer[measure], default=None)


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the finite values; None if there are none."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def weights_of(layers: Iterable[Record]) -> int:
    return sum(layer["out_features"] * layer["in_features"] for layer in layers)


def setting(layer: Record) -> str:
    """Bits and group size, such as ``4 bits, group 64``; with the method where it is not GPTQ."""
    group = "one group" if layer["group_size"] == -1 else f"group {layer['group_size']}"
    method = "" if layer["method"] == "gptq" else f", {layer['method']}"
    return f"{layer['bits']} bits, {group}{method}"


def locations(layers: Iterable[Record]) -> list[Location]:
    """The location of every layer record."""
    split = [_split(layer["name"], layer["block"]) for layer in layers]
    found = [_location(*parts, _EXPERT_NUMBER) for parts in split]
    if len({(location.stack, location.kind) for location in found if location.stack}) <= _MOST_KINDS:
        return found
    return [_location(*parts, _NUMBER) for parts in split]


def location_of_skipped(name: str, known: Iterable[Location]) -> Location | None:
    """The location of a weight that was not quantized, if layers of its kind were quantized in other blocks."""
    stack, block, rest = _split(name, block_of(name))
    kinds = {(location.stack, location.kind) for location in known}
    for pattern in (_EXPERT_NUMBER, _NUMBER):
        location = _location(stack, block, rest, pattern)
        if location.block is not None and (location.stack, location.kind) in kinds:
            return location
    return None


def kind_rows(layers: Sequence[Record], found: Sequence[Location]) -> list[KindRow]:
    """One row for every kind of layer, in the model's order; layers outside of blocks come last."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for layer, location in zip(layers, found, strict=True):
        groups.setdefault((location.stack, location.kind), []).append(layer)
    measure = error_measure(layers)
    ordered = sorted(groups.items(), key=lambda item: item[0][0] == "")
    return [_kind_row(stack, kind, group, measure) for (stack, kind), group in ordered]


def _kind_row(stack: str, kind: str, group: Sequence[Record], measure: str) -> KindRow:
    tokens = [layer["tokens"] for layer in group]
    return KindRow(
        stack=stack,
        kind=kind,
        layers=len(group),
        shapes=_distinct(f"{layer['out_features']} × {layer['in_features']}" for layer in group),
        settings=_settings(group),
        weights=weights_of(group),
        stored_bytes=sum(layer["stored_bytes"] for layer in group),
        error=mean(layer[measure] for layer in group),
        worst=worst_layer(group, measure),
        correction=mean(layer["correction"] for layer in group),
        fewest=min(tokens),
        most=max(tokens),
        thin=sum(
            layer["tokens"] < layer["in_features"] and layer["method"] not in WITHOUT_CALIBRATION
            for layer in group
        ),
    )


def _settings(group: Sequence[Record]) -> str:
    """The setting of all layers, or the bits and group sizes that occur."""
    if len({setting(layer) for layer in group}) == 1:
        return setting(group[0])
    bits, sizes = (sorted({layer[key] for layer in group}) for key in ("bits", "group_size"))
    return f"{', '.join(map(str, bits))} bits; groups {', '.join(map(str, sizes))}"


def _distinct(texts: Iterable[str], most: int = 2) -> str:
    found = list(dict.fromkeys(texts))
    return "; ".join(found[:most]) + (f"; {len(found) - most} more" if len(found) > most else "")


def _split(name: str, block: str) -> tuple[str, int | None, str]:
    """(stack, block number, rest of the name)."""
    stack, _, number = block.rpartition(".")
    if not number.isdecimal():
        return "", None, name
    return stack, int(number), name[len(block) :].removeprefix(".")


def _location(stack: str, block: int | None, rest: str, pattern: re.Pattern[str]) -> Location:
    return Location(stack, block, rest if block is None else pattern.sub("*", rest))
