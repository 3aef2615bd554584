"""`export`: the same quantized weights in the layout of another engine.

    checkpoint ─ grids of all layers ─ the target judges them ─ its tensors, layer by layer ─ a complete folder

No weight is quantized again. Before anything is written, the target says for every layer whether it holds it exactly.
One layer is in memory at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import layout, manifest
from ..checkpoint.layout import G_IDX, PARTS, QWEIGHT, QZEROS, SCALES, Shaped
from ..checkpoint.pack_quantized import open_any
from ..checkpoint.reader import Checkpoint, LayerSpec, refuse_lost_zeros
from ..checkpoint.safe_io import files_beside_weights
from ..checkpoint.writer import (
    CONFIG,
    PAGE_NAME,
    QUANTIZE_CONFIG,
    REPORT_NAME,
    CheckpointWriter,
    refuse_non_empty,
    with_legacy_keys,
)
from ..config import ExportTarget, PlainDtype
from ..errors import CheckpointError, ConfigError, OutputError
from ..quantized_matrix import sequential_groups
from . import gguf_blocks, gguf_file, gguf_models
from .auto_round import AutoRound
from .awq import Awq
from .compressed_tensors import CompressedTensors
from .dense import Dense
from .mlx import Mlx
from .target import LayerGrid, Target, Verdict

__all__ = ["DTYPES", "GGUF", "TARGETS", "ExportResult", "check_file", "export", "target_of"]

TARGETS: Mapping[str, type[Target]] = {
    target.name: target for target in (CompressedTensors, Awq, Mlx, AutoRound, Dense)
}
GGUF = "gguf"  # a single file, so it is none of `TARGETS`
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_LEFT_OUT = (CONFIG, QUANTIZE_CONFIG, manifest.NAME, REPORT_NAME, PAGE_NAME, "README.md")


@dataclass(frozen=True)
class ExportResult:
    """What `export` did.

    Attributes:
        output: folder of the result.
        target: its format.
        layers: number of quantized layers.
        inexact: reason → number of layers that are not exact for it.
        error: largest change of a weight, as a share of the step of its grid; 0 if all are exact.
        notes: sentences for the user.
    """

    output: str
    target: str
    layers: int
    inexact: Mapping[str, int]
    error: float
    notes: tuple[str, ...]


def export(
    checkpoint: str | Path,
    output: str | Path,
    to: ExportTarget,
    *,
    dtype: PlainDtype | None = None,
    allow_inexact: bool = False,
    max_shard_size: int | str = "5GB",
) -> ExportResult:
    """Write a GPTQ checkpoint in the format of another engine.

    Args:
        checkpoint: folder of a checkpoint, from any tool.
        output: folder to write: missing, empty, or left by an interrupted export. For target "gguf", a new file.
        to: one of `TARGETS`, or "gguf".
        dtype: float16, bfloat16 or float32, for target "dense": of the weights, for "gguf": of embeddings and other
            matrices that are not quantized, also q8_0; None keeps the model's.
        allow_inexact: also write layers that the format can only hold nearly.
        max_shard_size: of each weight file.

    Raises:
        ConfigError: the target or the dtype is unknown.
        CheckpointError: the source is damaged, or the format cannot hold it; the message counts the layers.
        OutputError: the output is not empty, or cannot be written.
    """
    folder, target_folder = Path(checkpoint), Path(output)
    opened = open_any(folder)
    if not opened.config:
        raise CheckpointError(f"{folder} has no {CONFIG}; copy the original model's into it")
    if to == GGUF:
        return _export_gguf(opened, target_folder, dtype, allow_inexact)
    target = target_of(to, dtype, opened.config)
    refuse_non_empty(target_folder)
    grids = {name: _grid(opened, spec) for name, spec in opened.layers.items()}
    verdicts = {name: target.judge(grid) for name, grid in grids.items()}
    _check(target.title, verdicts, target.judge_all(grids.values()), allow_inexact)
    with CheckpointWriter(
        target_folder, _planned(opened, target, grids), max_shard_size, metadata=target.metadata
    ) as writer:
        for name in opened.tensors:
            layer, _, part = name.rpartition(".")
            if layer not in grids or part not in PARTS:
                writer.add(name, opened.tensor(name))
            elif part == QWEIGHT:
                for short, tensor in target.tensors(opened.codes(layer)).items():
                    writer.add(f"{layer}.{short}", tensor)
        others = {n: path for n, path in files_beside_weights(folder).items() if n not in _LEFT_OUT}
        writer.finish_as(target.config(_config(opened), list(grids.values()), _plain(opened)), others)
    return _result(target_folder, target.name, verdicts, target.notes(list(grids.values())))


def target_of(name: str, dtype: str | None, config: Mapping[str, Any]) -> Target:
    """Return the target called `name`.

    Raises:
        ConfigError: there is none, or it takes no such `dtype`.
    """
    if name not in TARGETS:
        raise ConfigError(f"cannot export to {name!r}; targets are {', '.join((*TARGETS, GGUF))}")
    if name != Dense.name:
        if dtype is not None:
            raise ConfigError(f"dtype is for the targets dense and gguf; {name} keeps the scales' dtype")
        return TARGETS[name]()
    stated = dtype or config.get("dtype") or config.get("torch_dtype") or "float16"
    if stated not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}; got {stated!r}")
    return Dense(DTYPES[str(stated)])


def _grid(checkpoint: Checkpoint, spec: LayerSpec) -> LayerGrid:
    """Read scales, zero points and order of a layer."""
    zeros = checkpoint.tensor(f"{spec.name}.{QZEROS}")
    refuse_lost_zeros(zeros, spec, checkpoint.settings)
    expected = sequential_groups(spec.in_features, spec.group_size)
    return LayerGrid(
        name=spec.name,
        shape=(spec.out_features, spec.in_features),
        bits=spec.bits,
        group_size=spec.group_size,
        scales=checkpoint.tensor(f"{spec.name}.{SCALES}").t(),
        zeros=layout.unpack_zeros(zeros, spec.bits, spec.format, spec.out_features).t(),
        act_order=spec.has_g_idx and not torch.equal(checkpoint.tensor(f"{spec.name}.{G_IDX}"), expected),
    )


def _check(
    title: str, verdicts: Mapping[str, Verdict], reason_for_all: str | None, allow_inexact: bool
) -> None:
    """Refuse what a target cannot hold, with the number of layers for each reason."""
    refused = Counter(verdict.refused for verdict in verdicts.values() if verdict.refused)
    said = [f"{count} of {len(verdicts)} layers: {reason}" for reason, count in refused.most_common()]
    said += [reason_for_all] if reason_for_all else []
    if said:
        raise CheckpointError(f"{title} cannot hold this checkpoint: {'; '.join(said)}. Target dense can")
    inexact = [verdict for verdict in verdicts.values() if verdict.error]
    if inexact and not allow_inexact:
        worst = max(inexact, key=lambda verdict: verdict.error)
        raise CheckpointError(
            f"{title} holds {len(inexact)} of {len(verdicts)} layers only nearly: {worst.reason}, which changes a "
            f"weight by up to {worst.error:.2g} of a step of its grid. To accept this: allow_inexact (--allow-inexact)"
        )


def _result(output: Path, target: str, verdicts: Mapping[str, Verdict], notes: Sequence[str]) -> ExportResult:
    return ExportResult(
        output=str(output),
        target=target,
        layers=len(verdicts),
        inexact=dict(Counter(verdict.reason for verdict in verdicts.values() if verdict.error)),
        error=max((verdict.error for verdict in verdicts.values()), default=0.0),
        notes=tuple(notes),
    )


def _export_gguf(opened: Checkpoint, file: Path, dtype: str | None, allow_inexact: bool) -> ExportResult:
    if dtype is not None and dtype not in (*DTYPES, gguf_file.Q8_0):
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, {gguf_file.Q8_0}; got {dtype!r}")
    check_file(file)
    gguf_models.kind_of(opened.config)
    grids = {name: _grid(opened, spec) for name, spec in opened.layers.items()}
    verdicts = {name: gguf_blocks.judge(grid) for name, grid in grids.items()}
    _check("GGUF (llama.cpp)", verdicts, None, allow_inexact)
    file.parent.mkdir(parents=True, exist_ok=True)
    plain = None if dtype is None else DTYPES.get(dtype, gguf_file.Q8_0)
    notes = gguf_file.write_gguf(opened, grids, file, plain)
    kinds = Counter(gguf_blocks.type_of(grid) for grid in grids.values())
    said = ", ".join(f"{count} layers as {kind}" for kind, count in kinds.items())
    return _result(file, GGUF, verdicts, [said, *notes])


def check_file(file: Path) -> None:
    """Check what a GGUF file needs.

    Raises:
        OutputError: it is there already, or has another name.
        DependencyError: the package gguf is missing.
    """
    if file.suffix != ".gguf" or file.exists():
        raise OutputError(f"{file} must be a new file whose name ends with .gguf")
    gguf_file.package()


def _planned(checkpoint: Checkpoint, target: Target, grids: Mapping[str, LayerGrid]) -> dict[str, Shaped]:
    """Dtype and shape of every tensor of the result, in its order."""
    planned: dict[str, Shaped] = {}
    for name, info in checkpoint.tensors.items():
        layer, _, part = name.rpartition(".")
        if layer not in grids or part not in PARTS:
            planned[name] = info
        elif part == QWEIGHT:
            planned |= {f"{layer}.{short}": tensor for short, tensor in target.planned(grids[layer]).items()}
    return planned


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    config = with_legacy_keys(checkpoint.config)  # mlx-lm looks there
    return {key: value for key, value in config.items() if key != "quantization_config"}


def _plain(checkpoint: Checkpoint) -> list[str]:
    """Full names of what is a matrix and not quantized; the output layer too where it shares the embedding."""
    matrices = [name for name, info in checkpoint.tensors.items() if len(info.shape) == 2]
    names = [name.removesuffix(".weight") for name in matrices if name.endswith(".weight")]
    return names if "lm_head" in (*names, *checkpoint.layers) else [*names, "lm_head"]
