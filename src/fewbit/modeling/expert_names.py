"""What the original files call the matrices of unfused experts.

Files hold one matrix for each expert and projection; transformers' conversion merges them into fused tensors
when it loads, and takes them apart when it saves. Where the experts are unfused there is nothing to merge:
the conversion becomes a renaming, which transformers then applies in both directions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)

# A fused parameter → the projections that lie in it one after the other.
PARTS = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}

_ANY_EXPERT = ".*."
_EXPERT_NUMBER = r"\.(\d+)\."


def conversions_of(model: PreTrainedModel) -> list[WeightTransform]:
    """The conversion that `model` was loaded with; for one that was not loaded, that of its class."""
    used: list[WeightTransform] | None = getattr(model, "_weight_conversions", None)
    if used is not None:
        return list(used)
    # As in transformers' own saving: without a file nothing is known of prefixes.
    default = get_model_conversion_mapping(model, add_legacy=False)
    return [entry for entry in default if not isinstance(entry, PrefixChange)]


def converter_of(parameter: str, conversions: Iterable[WeightTransform]) -> WeightConverter | None:
    """The conversion that makes the fused `parameter` (its full name) from tensors of the files, if any."""
    for entry in reversed(list(conversions)):
        if isinstance(entry, WeightConverter) and entry.reverse_transform().rename_source_key(parameter)[1]:
            return entry
    return None


def renamings(converter: WeightConverter, parts: Sequence[str]) -> list[WeightRenaming] | None:
    """The renamings that stand for `converter` where the experts are unfused.

    Args:
        parts: the projections in the fused parameter.

    Returns:
        None where the conversion is anything but "stack the experts, then put the projections side by side".
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
        renaming.scope_prefix, renaming.base_model_prefix = (
            converter.scope_prefix,
            converter.base_model_prefix,
        )
        result.append(renaming)
    return result


def without_fusing(
    conversions: Sequence[WeightTransform], unfused: Mapping[str, Iterable[str]]
) -> list[WeightTransform]:
    """The conversions for a model whose experts are unfused.

    Args:
        unfused: module → names of the fused parameters that it no longer has.
    """
    replaced: dict[int, list[WeightRenaming]] = {}
    for module, parameters in unfused.items():
        for parameter in parameters:
            converter = converter_of(f"{module}.{parameter}", conversions)
            if converter is not None and id(converter) not in replaced:
                replaced[id(converter)] = renamings(converter, PARTS[parameter]) or []
    # Converters act after all renamings, so what stands for them comes last.
    kept = [entry for entry in conversions if id(entry) not in replaced]
    return [*kept, *(entry for entries in replaced.values() for entry in entries)]
