"""Layers that must share their settings, the settings that they may get, and the bytes that these take.

Serving engines merge some layers into one, which has one setting. Such layers form a group here: with different bits
or group sizes they could not be served.
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
    """Bits and group size of a layer; group size −1 is one group per row."""

    bits: int
    group_size: int


@dataclass(frozen=True)
class SettingsGroup:
    """Layers that get the same settings.

    Attributes:
        layers: the layers.
        choices: settings that all of them may get.
    """

    layers: tuple[LayerPlan, ...]
    choices: tuple[Choice, ...]

    def bytes(self, choice: Choice) -> int:
        """Stored bytes of all layers."""
        return sum(stored_bytes(layer.out_features, layer.in_features, choice) for layer in self.layers)


def make_groups(plan: Plan, config: QuantConfig) -> list[SettingsGroup]:
    """Divide a plan into groups, in its order.

    Bits are 2, 3, 4 or 8. Group sizes are 32, 64 and 128 if they divide the inputs of all layers of the group, and −1
    if the config has it. An override is kept: its layers form a group apart from layers that are free.
    """
    members: dict[tuple[str, int | None, int | None], list[LayerPlan]] = {}
    for layer in plan.layers:
        explicit = config.overridden(layer.name)
        bits = layer.settings.bits if "bits" in explicit else None
        group_size = layer.settings.group_size if "group_size" in explicit else None
        members.setdefault((merge_key(layer.name), bits, group_size), []).append(layer)
    return [
        SettingsGroup(tuple(layers), _choices(layers, bits, group_size, config.defaults.group_size))
        for (_, bits, group_size), layers in members.items()
    ]


def stored_bytes(out_features: int, in_features: int, choice: Choice) -> int:
    """Bytes of a layer's four packed tensors (docs/formats.md)."""
    groups = group_count(in_features, choice.group_size)
    words = word_count(in_features, choice.bits) * out_features + groups * word_count(
        out_features, choice.bits
    )
    return 4 * words + 2 * groups * out_features + 4 * in_features


def merge_key(name: str) -> str:
    """A name that a layer shares with the layers that engines merge it with; its own name if there are none."""
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
    # Other engines do not read padded words: used only if no choice fills whole words.
    return tuple(choice for choice in every if _fills_words(layers, choice.bits)) or tuple(every)


def _fills_words(layers: Iterable[LayerPlan], bits: int) -> bool:
    values = 32 if bits == 3 else 32 // bits
    return all(layer.in_features % values == 0 == layer.out_features % values for layer in layers)
