"""Checks of a GPTQ checkpoint from any tool: `verify` collects every problem that it finds.

Checked: the configuration, the files against the manifest, headers, the index, tensors that are left over or
that the model needs and the files lack, shapes and dtypes, then every layer's contents: scales finite and not
zero, g_idx in range, zero points plausible, and the configuration's `sym` and `desc_act` true, since fast
kernels rely on them instead of reading the tensors. With `against`, also how far every layer is from the
original weight.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .checkpoint import layout, manifest
from .checkpoint import quantization_config as quantization
from .checkpoint.layout import G_IDX, PARTS, QZEROS, SCALES
from .checkpoint.quantization_config import CheckpointSettings
from .checkpoint.reader import (
    Checkpoint,
    Configuration,
    LayerSpec,
    WeightFiles,
    find_weights,
    layer_names,
    layer_spec,
    open_weights,
    overwritten_words,
    read_config,
    read_weight_map,
)
from .checkpoint.safe_io import read_json
from .checkpoint.safetensors_file import TensorInfo, read_header
from .checkpoint.writer import QUANTIZE_CONFIG
from .errors import CheckpointError
from .hf.model_check import expected
from .quantized_matrix import sequential_groups


class Problem(NamedTuple):
    """One thing that is wrong: where (a file, a tensor or a layer) and what."""

    where: str
    what: str


@dataclass(frozen=True)
class VerifyResult:
    """The result of `verify`.

    Attributes:
        problems: All problems, in the order of the checks.
        layers: Number of quantized layers that were checked.
        errors: Layer → ‖W − Ŵ‖ / ‖W‖ (Frobenius); empty without `against`.
    """

    problems: list[Problem]
    layers: int = 0
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(path: str | Path, against: str | Path | None = None) -> VerifyResult:
    """Check the checkpoint in the folder `path`; never stops at the first problem.

    Args:
        path: a checkpoint's folder.
        against: the folder of the original model (safetensors), to measure every layer's error.

    Raises:
        CheckpointError: `path` is not a folder, or `against` cannot be read. Anything else is a `Problem`.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder of a quantized checkpoint")
    base = open_weights(Path(against)) if against is not None else None

    problems = [Problem(*found) for found in manifest.problems(folder)]
    config, config_problems = _check_config(folder)
    weights, file_problems = _check_files(folder, config)
    problems += config_problems + file_problems
    if config is None or weights is None:
        return VerifyResult(problems)

    specs: dict[str, LayerSpec] = {}
    names = layer_names(weights.tensors)
    for name in names:
        try:
            specs[name] = layer_spec(name, config.settings, weights.tensors)
        except CheckpointError as error:
            problems.append(Problem(name, str(error)))
    if not names:
        problems.append(Problem(str(folder), f"has no tensor named *.{layout.QWEIGHT}: nothing is quantized"))
    problems += _left_over(weights.tensors)
    problems += _missing(folder, config, weights)
    checkpoint = Checkpoint(folder, config.model, config.quantization, config.settings, weights, specs)
    errors: dict[str, float] = {}
    for spec in specs.values():
        problems += _check_layer(checkpoint, spec)
        if base is not None:
            problems += _compare(checkpoint, spec, base, errors)
    problems += _not_finite(weights, specs)
    return VerifyResult(problems, len(specs), errors)


def _check_config(folder: Path) -> tuple[Configuration | None, list[Problem]]:
    try:
        config = read_config(folder)
    except CheckpointError as error:
        return None, [Problem(str(folder), str(error))]
    problems = []
    stated, used = config.quantization.get("format"), config.settings.format
    if "format" in config.quantization and stated != used:
        problems.append(Problem(config.file.name, f"checkpoint_format is {used!r} but format is {stated!r}"))
    beside = folder / QUANTIZE_CONFIG
    if config.file != beside and beside.exists():
        problems += _compare_configs(config.settings, beside, config.file.name)
    return config, problems


def _compare_configs(settings: CheckpointSettings, beside: Path, main: str) -> Iterator[Problem]:
    """Check that both files agree; otherwise old and new tools see different models."""
    try:
        other = quantization.parse(read_json(beside), beside.name, "gptq")
    except CheckpointError as error:
        yield Problem(beside.name, str(error))
        return
    for key in ("bits", "group_size", "sym", "desc_act", "format"):
        if key in settings.assumed or key in other.assumed:
            continue
        mine, its = getattr(settings, key), getattr(other, key)
        if mine != its:
            yield Problem(beside.name, f"{key} is {its!r}, but {main} says {mine!r}")


def _check_files(folder: Path, config: Configuration | None) -> tuple[WeightFiles | None, list[Problem]]:
    """The tensors of all files that can be read, and what is wrong with files and index."""
    try:
        base_name = config.quantization.get("model_file_base_name") if config else None
        index, files = find_weights(folder, base_name)
    except CheckpointError as error:
        return None, [Problem(str(folder), str(error))]
    problems: list[Problem] = []
    tensors: dict[str, TensorInfo] = {}
    file_of: dict[str, Path] = {}
    for path in files:
        try:
            infos, metadata = read_header(path)
        except CheckpointError as error:
            problems.append(Problem(path.name, str(error)))
            continue
        if metadata.get("format") != "pt":
            problems.append(
                Problem(path.name, 'has no metadata {"format": "pt"}; transformers refuses such files')
            )
        for name, info in infos.items():
            if name in file_of:
                problems.append(Problem(name, f"is both in {file_of[name].name} and in {path.name}"))
            tensors[name], file_of[name] = info, path
    if index is not None:
        problems += _check_index(index, tensors, file_of)
    for path in sorted(set(folder.glob("*.safetensors")) - set(files)):
        problems.append(Problem(path.name, "is left over: nothing refers to it"))
    return WeightFiles(folder, index, files, tensors, file_of), problems


def _check_index(index: Path, tensors: dict[str, TensorInfo], file_of: dict[str, Path]) -> Iterator[Problem]:
    weight_map = read_weight_map(index)
    readable = {path.name for path in file_of.values()}
    for name, file in weight_map.items():
        if file in readable and (name not in file_of or file_of[name].name != file):
            yield Problem(index.name, f"says that {name} is in {file}, but it is not")
    for name in file_of.keys() - weight_map.keys():
        yield Problem(index.name, f"does not list {name}, which is in {file_of[name].name}")
    metadata = read_json(index).get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    actual = sum(info.nbytes for info in tensors.values())
    if isinstance(stated, int) and stated != actual and readable == set(weight_map.values()):
        yield Problem(index.name, f"says total_size {stated}, but the tensors have {actual} bytes")


def _left_over(tensors: dict[str, TensorInfo]) -> Iterator[Problem]:
    """Parts without a qweight, and float weights beside quantized ones."""
    layers = set(layer_names(tensors))
    for name in tensors:
        layer, _, part = name.rpartition(".")
        if part in PARTS and layer not in layers:
            yield Problem(name, f"is left over: {layer} has no qweight")
        elif part == "weight" and layer in layers:
            yield Problem(name, f"is left over: {layer} is quantized")


def _missing(folder: Path, config: Configuration, weights: WeightFiles) -> Iterator[Problem]:
    """What the model needs and no file has; if transformers does not know it, what its blocks lack."""
    try:
        model = expected(folder, config.model, weights.tensors)
    except CheckpointError as error:
        yield Problem("config.json", str(error))
        return
    if model is None:
        yield from uneven_blocks(weights.tensors)
        return
    for name in model.missing:
        yield Problem(name, f"is missing: {model.class_name} needs it")
    yield from (Problem(name, what) for name, what in model.mismatches.items())


def uneven_blocks(names: Iterable[str]) -> Iterator[Problem]:
    """Numbers that are missing between blocks, and blocks that have only a part of what most others have.

    A layer counts the same whether it is quantized or not. Blocks that have something else instead (other
    attention, experts) are another kind of block, not an uneven one.
    """
    stacks: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        found = re.match(r"(.*?)\.(\d+)\.(.+)", name)
        if found is None:
            continue
        stack, number, rest = found.groups()
        module, _, part = rest.rpartition(".")
        stacks[stack][int(number)].add(f"{module}.weight" if part in PARTS else rest)
    for stack, blocks in stacks.items():
        # Gaps as wholes: a stranger may number one block 10^12.
        for before, after in itertools.pairwise([-1, *sorted(blocks)]):
            if after - before > 1:
                others = f", as are {after - before - 2} after it" if after - before > 2 else ""
                yield Problem(
                    f"{stack}.{before + 1}", f"is missing{others}, but there is a {stack}.{max(blocks)}"
                )
        usual, count = Counter(map(frozenset, blocks.values())).most_common(1)[0]
        if 2 * count <= len(blocks):
            continue
        for number, have in sorted(blocks.items()):
            if have < usual:
                lacks = ", ".join(sorted(usual - have))
                yield Problem(
                    f"{stack}.{number}", f"lacks {lacks}, which {count} of {len(blocks)} blocks have"
                )


def _check_layer(checkpoint: Checkpoint, spec: LayerSpec) -> Iterator[Problem]:
    if not spec.configured:
        yield Problem(spec.name, "is quantized, but the configuration says that it is not")
    yield from _check_scales(checkpoint.tensor(f"{spec.name}.{SCALES}"), spec)
    yield from _check_zeros(checkpoint.tensor(f"{spec.name}.{QZEROS}"), spec, checkpoint.settings)
    if spec.has_g_idx:
        yield from _check_g_idx(checkpoint.tensor(f"{spec.name}.{G_IDX}"), spec)
    elif spec.desc_act and spec.groups > 1:
        yield Problem(
            f"{spec.name}.{G_IDX}",
            "is missing, although the configuration says desc_act: groups are taken as consecutive, which is right "
            "only if the writer used static groups",
        )


def _check_scales(scales: Tensor, spec: LayerSpec) -> Iterator[Problem]:
    where = f"{spec.name}.{SCALES}"
    bad, zero = int((~scales.isfinite()).sum()), int((scales == 0).sum())
    if bad:
        yield Problem(where, f"{bad} of {scales.numel()} scales are not finite")
    if zero:
        yield Problem(where, f"{zero} of {scales.numel()} scales are zero: their weights are lost")


def _check_zeros(qzeros: Tensor, spec: LayerSpec, settings: CheckpointSettings) -> Iterator[Problem]:
    where = f"{spec.name}.{QZEROS}"
    words = overwritten_words(qzeros, spec, settings)
    if words:
        yield Problem(
            where,
            f"{words} words look overwritten: a zero point of 0 was stored as -1 and set all fields "
            "above it, as AutoGPTQ does; those zero points are lost, quantize the model again",
        )
        return
    zeros = layout.unpack_zeros(qzeros, spec.bits, spec.format, spec.out_features)
    middle = 2 ** (spec.bits - 1)
    off = int((zeros != middle).sum())
    if spec.sym and off:
        yield Problem(
            where,
            f"{off} of {zeros.numel()} zero points are not {middle}, although the configuration says sym: "
            "kernels for symmetric grids compute wrong weights",
        )


def _check_g_idx(g_idx: Tensor, spec: LayerSpec) -> Iterator[Problem]:
    where = f"{spec.name}.{G_IDX}"
    if not g_idx.numel():
        return
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0:
        yield Problem(where, f"holds negative group {low}")
    if high >= spec.groups:
        yield Problem(where, f"holds group {high}, but there are only {spec.groups}")
    sequential = sequential_groups(spec.in_features, spec.group_size)
    if low >= 0 and not spec.desc_act and not torch.equal(g_idx.to(torch.int32), sequential):
        yield Problem(
            where, "is not sequential, although the configuration does not say desc_act: readers ignore it"
        )
    if 0 <= low <= high < spec.groups and spec.group_size != -1:
        most = int(torch.bincount(g_idx).max())
        if most > spec.group_size:
            yield Problem(where, f"gives one group {most} inputs; {spec.group_size} fit")


def _not_finite(weights: WeightFiles, specs: dict[str, LayerSpec]) -> Iterator[Problem]:
    """Non-finite values in what is not quantized (the scales have their own check)."""
    own = {f"{name}.{part}" for name in specs for part in PARTS}
    for name, info in weights.tensors.items():
        if name in own or not info.dtype.is_floating_point or info.dtype.itemsize == 1:
            continue
        bad = int((~weights.tensor(name).isfinite()).sum())
        if bad:
            yield Problem(name, f"{bad} of its values are not finite")


def _compare(
    checkpoint: Checkpoint, spec: LayerSpec, base: WeightFiles, errors: dict[str, float]
) -> Iterator[Problem]:
    """Put ‖W − Ŵ‖ / ‖W‖ into `errors`. Conv1D weights (in, out) are recognised by their shape."""
    key = f"{spec.name}.weight"
    if key not in base.tensors:
        yield Problem(spec.name, f"has no counterpart {key} in {base.folder}")
        return
    original = base.tensor(key).float()
    shape = (spec.out_features, spec.in_features)
    if tuple(original.shape) not in (shape, shape[::-1]):
        yield Problem(spec.name, f"has shape {shape}, the original {tuple(original.shape)}")
        return
    try:
        weight = checkpoint.codes(spec.name).dequantize()
    except CheckpointError as error:
        yield Problem(spec.name, str(error))
        return
    candidates = [w for w in (original, original.t()) if tuple(w.shape) == shape]
    norm = max(float(original.norm()), torch.finfo(torch.float32).tiny)
    errors[spec.name] = min(float((w - weight).norm()) / norm for w in candidates)
    if not errors[spec.name] < 1:
        yield Problem(
            spec.name, f"is as far from the original as zero is (relative error {errors[spec.name]:.2f})"
        )
