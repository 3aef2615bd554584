"""What is chosen: the layers that must be alike, the settings each may get, and the bytes these take.

Serving engines merge some layers into one and have one setting for the merged one. Such layers are a
unit here: they get the same bits and group size or none of them could be served.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ..checkpoint.layout import word_count
from ..config import BITS, QuantConfig
from ..input_groups import merged_layers
from ..planning import LayerPlan, Plan
from ..quantized_matrix import group_count

GROUP_SIZES = (32, 64, 128)

_EXPERTS = re.compile(r"^(.*\bexperts)\.\d+\.")


class Choice(NamedTuple):
    """Bits and group size of a unit; group size −1 is one group per row."""

    bits: int
    group_size: int


@dataclass(frozen=True)
class Unit:
    """Layers that get the same settings, and what they may get."""

    layers: tuple[LayerPlan, ...]
    choices: tuple[Choice, ...]

    def bytes(self, choice: Choice) -> int:
        """Stored bytes of all layers of the unit."""
        return sum(stored_bytes(layer.out_features, layer.in_features, choice) for layer in self.layers)


def make_units(plan: Plan, config: QuantConfig) -> list[Unit]:
    """The units of a plan, in its order.

    Bits are 2, 3, 4 or 8, group sizes those of 32, 64 and 128 (and −1 where the config has it) that divide the
    inputs of all layers of the unit. What an override gives a layer stays: such a layer is no part of a unit
    whose other layers are free.
    """
    members: dict[tuple[str, int | None, int | None], list[LayerPlan]] = {}
    for layer in plan.layers:
        explicit = config.overridden(layer.name)
        bits = layer.settings.bits if "bits" in explicit else None
        group_size = layer.settings.group_size if "group_size" in explicit else None
        members.setdefault((family(layer.name), bits, group_size), []).append(layer)
    return [
        Unit(tuple(layers), _choices(layers, bits, group_size, config.group_size))
        for (_, bits, group_size), layers in members.items()
    ]


def stored_bytes(out_features: int, in_features: int, choice: Choice) -> int:
    """Bytes of a layer's four packed tensors (docs/formats.md)."""
    groups = group_count(in_features, choice.group_size)
    words = word_count(in_features, choice.bits) * out_features + groups * word_count(
        out_features, choice.bits
    )
    return 4 * words + 2 * groups * out_features + 4 * in_features


def family(name: str) -> str:
    """A name that a layer shares with those that engines merge it with: its own where there are none."""
    experts = _EXPERTS.match(name)
    if experts:
        return experts[1]
    parent, _, own = name.rpartition(".")
    merged = merged_layers(own)
    return f"{parent}.{'+'.join(sorted(merged))}" if len(merged) > 1 else name


def _choices(
    layers: list[LayerPlan], bits: int | None, group_size: int | None, preferred: int
) -> tuple[Choice, ...]:
    widths = BITS if bits is None else (bits,)
    if group_size is not None:
        sizes: tuple[int, ...] = (group_size,)
    else:
        sizes = tuple(size for size in GROUP_SIZES if all(layer.in_features % size == 0 for layer in layers))
        sizes = (-1, *sizes) if preferred == -1 else sizes or (preferred,)
    every = [Choice(width, size) for width in widths for size in sizes]
    # Other engines do not read padded words: used only where nothing else is left.
    return tuple(choice for choice in every if _fills_words(layers, choice.bits)) or tuple(every)


def _fills_words(layers: Iterable[LayerPlan], bits: int) -> bool:
    values = 32 if bits == 3 else 32 // bits
    return all(layer.in_features % values == 0 == layer.out_features % values for layer in layers)
