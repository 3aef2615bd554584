"""Names of single experts in the files, from transformers' own conversion of names.

Where the files hold one matrix for each expert, the conversion "stack the experts, then concatenate the projections"
becomes a renaming for unfused experts, which transformers applies in both directions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from .. import transformers_internals
from ..transformers_internals import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    converters_of,
)
from .expert_layouts import ExpertLayout, FusedParameter

_ANY_EXPERT = ".*."
_EXPERT_NUMBER = r"\.(\d+)\."
_NO_NUMBER = r"(?<!\d)"  # before a pattern: the name does not belong to a single expert
_NO_NUMBER_AND_DOT = r"(?<!\d\.)"


class InFiles(NamedTuple):
    """How the files hold the experts of a module.

    Attributes:
        fused: True if they hold the fused parameters, False if they hold the matrices of single experts.
        reason: why fewbit cannot use them; None if it can.
    """

    fused: bool
    reason: str | None = None


def in_files(name: str, layout: ExpertLayout | str, conversions: Sequence[WeightTransform]) -> InFiles:
    """Find out how the files hold the experts of the module `name`."""
    if isinstance(layout, str):
        return InFiles(False, layout)
    stacked = []
    for parameter in layout.parameters:
        converter = next(iter(converters_of([f"{name}.{parameter.name}"], reversed(conversions))), None)
        stacked.append(converter is not None and any("*" in source for source in converter.source_patterns))
        if stacked[-1] and _renamings(converter, parameter) is None:
            reason = "transformers makes these experts from the files in a way that fewbit does not know"
            return InFiles(False, reason)
    if any(stacked) and not all(stacked):
        return InFiles(False, "the files hold some projections of these experts fused, and others not")
    return InFiles(not any(stacked))


def unfused_conversions_of(
    layouts: Mapping[str, ExpertLayout], conversions: list[WeightTransform], fused: Collection[str]
) -> list[WeightTransform]:
    """Replace the converters that make the fused parameters of the modules `layouts` by renamings.

    The modules `fused` have converters for their fused parameters in the files; these stay.
    """
    replaced: dict[int, list[WeightRenaming]] = {}
    for name, layout in layouts.items():
        for parameter in layout.parameters if name not in fused else ():
            for converter in converters_of([f"{name}.{parameter.name}"], reversed(conversions)):
                if id(converter) not in replaced:
                    replaced[id(converter)] = _renamings(converter, parameter) or []
    weights = [
        f"{name}.0.{part}.weight"
        for name, layout in layouts.items()
        for parameter in layout.parameters
        for part in parameter.parts
    ]
    kept = [_without(entry, weights) for entry in conversions if id(entry) not in replaced]
    # Converters act after all renamings, so their replacements come last.
    return [*kept, *(entry for entries in replaced.values() for entry in entries)]


def _without(entry: WeightTransform, weights: Iterable[str]) -> WeightTransform:
    """Keep an entry for other layers with the same names from the `weights` of single experts."""
    if type(entry) is WeightRenaming:
        back = entry.reverse_transform()
        kept = all(back.rename_source_key(name)[0].split(".")[-2] == name.split(".")[-2] for name in weights)
        return entry if kept else transformers_internals.guarded(entry, _NO_NUMBER_AND_DOT)
    if isinstance(entry, WeightConverter) and any(entry.rename_source_key(name)[1] for name in weights):
        return transformers_internals.with_prefix(entry, _NO_NUMBER)
    return entry


def _renamings(converter: WeightConverter | None, parameter: FusedParameter) -> list[WeightRenaming] | None:
    """Return the renamings that replace `converter`, which makes `parameter`.

    None unless the conversion is "stack the experts, then concatenate the projections".
    """
    if converter is None:
        return None
    parts = parameter.parts
    stacks = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    expected = [(MergeModulelist, 0), (Concatenate, 1)][: min(len(parts), 2)]
    sources, targets = converter.source_patterns, converter.target_patterns
    one_matrix_each = all(
        source.count("*") == 1 == source.count(_ANY_EXPERT)
        and source.endswith(".weight")
        and "(" not in source
        for source in sources
    )
    plain = not (parameter.transposed or parameter.interleaved or parameter.bias)
    if (
        not plain
        or stacks != expected
        or len(sources) != len(parts)
        or len(targets) != 1
        or not one_matrix_each
    ):
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
