"""Before a quantization: settings that engines take, and a refusal of what cannot be exported afterwards.

Both look at the real layers, so widths count, and at the type of the model and its tokenizer where a format depends
on them. Nothing is read of the weights but their headers, where the source allows it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ..checkpoint.writer import refuse_non_empty
from ..config import BITS, FORMATS, QuantConfig
from ..engines import engine, of_plan, unsupported_reasons
from ..errors import ConfigError
from ..modeling.experts import unfuse
from ..modeling.source import Source, open_source
from ..planning import LayerPlan, Plan, plan_and_group_size
from ..quantized_matrix import group_count
from . import GGUF, check_file, gguf_blocks, gguf_models, gguf_vocabulary, target_of
from .target import LayerGrid


@dataclass(frozen=True)
class Prospect:
    """A model that will be quantized.

    Attributes:
        source: where it lies.
        model: it, without weights where the source allows it.
    """

    source: Source
    model: nn.Module

    def plan(self, config: QuantConfig) -> Plan:
        return plan_and_group_size(self.model, config)[0]


def open_prospect(
    model: str | Path, dtype: str = "auto", *, trust_remote_code: bool = False, allow_pickle: bool = False
) -> Prospect:
    """Open a model as `fewbit.quantize` does.

    Raises:
        ModelError: it cannot be opened.
    """
    source = open_source(model, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    opened = source.build_model(dtype)[0] if source.streams else source.load_model(dtype, torch.device("cpu"))
    unfuse(opened)
    return Prospect(source, opened)


def settings_for(
    names: Sequence[str], prospect: Prospect, config: QuantConfig, given: Collection[str]
) -> QuantConfig:
    """Return settings whose result all engines take: `config`, with another group size and format where needed.

    Args:
        names: engines (`fewbit.engines`).
        prospect: the model.
        config: settings of the run.
        given: names of the settings that the user has chosen; they are kept.

    Raises:
        ConfigError: no such settings are left; the message has the reasons for `config`.
    """
    engines = [engine(name) for name in names]
    # With a budget, bits and groups of each layer are chosen later.
    fixed = {*given, "group_size"} if config.target_bits is not None else set(given)
    sizes = (config.group_size,) if "group_size" in fixed else engines[0].best_groups
    formats = (config.format,) if "format" in fixed else FORMATS
    first: list[str] | None = None
    for group_size, fmt in itertools.product(sizes, formats):
        tried = replace(config, group_size=group_size, format=fmt)
        plan = prospect.plan(tried)
        said = [
            f"{one.title} could not load the result: {'; '.join(reasons)}"
            for one in engines
            if (reasons := unsupported_reasons(one, of_plan(plan, tried)))
        ]
        if not said:
            return tried
        first = first or said
    raise ConfigError(f"{'. '.join(first or ())}. Change these settings, or leave out --for")


def check_export(prospect: Prospect, config: QuantConfig, to: str, output: Path | None) -> None:
    """Refuse an export of the result of a quantization.

    Args:
        prospect: the model.
        config: settings of the run.
        to: the target.
        output: file or folder of the export; None if it is not decided yet.

    Raises:
        ConfigError: the target is unknown, or could not hold the result of these settings exactly.
        CheckpointError: the target does not know this type of model, or its tokenizer.
        OutputError: the output is there already.
        DependencyError: a package is missing.
    """
    target = None if to == GGUF else target_of(to, None, {})
    if target is None:
        _check_model(prospect)
    if output is not None:
        (check_file if target is None else refuse_non_empty)(output)
    layers = prospect.plan(config).layers
    if config.target_bits is not None:  # any bits may be chosen
        layers = tuple(_with_bits(layer, bits) for layer in layers for bits in BITS)
    grids = [_expected(layer) for layer in layers]
    verdicts = [gguf_blocks.judge(grid) if target is None else target.judge(grid) for grid in grids]
    reasons = [
        f"{grid.name}: {reason}"
        for grid, verdict in zip(grids, verdicts, strict=True)
        if (reason := verdict.refused or verdict.reason)
    ]
    reason_for_all = target.judge_all(grids) if target is not None else None
    reasons += [reason_for_all] if reason_for_all else []
    if reasons:
        raise ConfigError(
            f"the result of these settings cannot be exported to {to} exactly: {reasons[0]}. Other settings, or leave "
            "out export and call `fewbit export` with --allow-inexact"
        )


def _check_model(prospect: Prospect) -> None:
    """Refuse models and tokenizers that a GGUF file cannot hold."""
    gguf_models.kind_of(prospect.source.config_dict(prospect.model))
    if prospect.source.gguf is None:
        stated = gguf_vocabulary.read_tokenizer(prospect.source.folder)
    else:
        stated = json.loads(prospect.source.load_tokenizer().backend_tokenizer.to_str())
    gguf_vocabulary.check_tokenizer(stated)


def _with_bits(layer: LayerPlan, bits: int) -> LayerPlan:
    return replace(layer, settings=replace(layer.settings, bits=bits))


def _expected(layer: LayerPlan) -> LayerGrid:
    """What is known of a layer: all its scales are the same here, and its zero points at both ends of their range."""
    bits, size, n = layer.settings.bits, layer.settings.group_size, layer.in_features
    groups = group_count(n, size)
    ends = [2 ** (bits - 1)] * 2 if layer.settings.sym else [1, 2**bits - 1]
    zeros = torch.tensor(ends, dtype=torch.int16).repeat_interleave(groups).view(2, groups)
    scales = torch.full((2, groups), 0.1, dtype=torch.float16)
    order = layer.settings.act_order == "full" and size != -1
    return LayerGrid(layer.name, (layer.out_features, n), bits, size, scales, zeros, order)
