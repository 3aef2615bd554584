"""The files of a checkpoint with other values for some tensors: same names, dtypes, shapes and order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import __version__
from ..checkpoint import manifest
from ..checkpoint.layout import PARTS, QWEIGHT, SCALES
from ..checkpoint.reader import open_weights, read_config
from ..checkpoint.safe_io import files_beside_weights
from ..checkpoint.writer import CONFIG, PAGE_NAME, QUANTIZE_CONFIG, REPORT_NAME, CheckpointWriter, is_written
from ..hf.quantized_layers import FileNames


def model_names(model: Any, folder: Path) -> dict[str, str]:
    """Name in the files → name in the model, of tensors that are the same in both: parameters, and scales of layers."""
    tensors = open_weights(folder).tensors
    layers = {name.removesuffix(f".{QWEIGHT}") for name in tensors if name.endswith(f".{QWEIGHT}")}
    names = FileNames(model, sorted(layers))
    result = {}
    for name in tensors:
        layer, _, part = name.rpartition(".")
        is_packed = layer in layers and part in PARTS
        if is_packed and part != SCALES:
            continue
        renamed, merged = names.rename(f"{layer}.weight" if is_packed else name)
        if not merged:
            result[name] = f"{renamed.removesuffix('.weight')}.{SCALES}" if is_packed else renamed
    return result


def vectors(folder: Path, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Vectors of the files by their names in the model."""
    weights = open_weights(folder)
    return {
        name: weights.tensor(on_disk)
        for on_disk, name in names.items()
        if len(weights.tensors[on_disk].shape) == 1
    }


def rewrite(folder: Path, target: Path, replaced: Mapping[str, Tensor], max_shard_size: int | str) -> None:
    """Write the checkpoint in `folder` with other values for the tensors `replaced`."""
    if is_written(target):  # killed between the last file and the end of the run
        return
    config, found, _, _ = read_config(folder)
    weights = open_weights(folder)
    left_out = (CONFIG, QUANTIZE_CONFIG, manifest.NAME, REPORT_NAME, PAGE_NAME)
    extra = {name: path for name, path in files_beside_weights(folder).items() if name not in left_out}
    meta: Any = found.get("meta")
    meta = {**(meta if isinstance(meta, dict) else {}), "distilled": f"fewbit:{__version__}"}
    with CheckpointWriter(target, weights.tensors, max_shard_size) as writer:
        for name in weights.tensors:
            writer.add(name, replaced[name] if name in replaced else weights.tensor(name))
        writer.finish(config, {**found, "meta": meta}, extra)
