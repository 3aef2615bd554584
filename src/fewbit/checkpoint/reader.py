"""Opening a GPTQ checkpoint, whoever wrote it: headers and configuration only; data on request.

`open_checkpoint` finds the configuration (config.json, or AutoGPTQ's quantize_config.json) and the weights
(one file, an index with shards, or AutoGPTQ's names) and deduces every quantized layer from the tensors
that exist. What contradicts itself is refused here with a `CheckpointError`; `verify` lists it all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..quantized_matrix import QuantizedMatrix, group_count
from . import layout
from . import quantization_config as quantization
from .layout import G_IDX, PARTS, QWEIGHT, QZEROS, SCALES
from .quantization_config import CheckpointSettings, LayerFormat
from .safe_io import is_plain_name, read_json, shown
from .safetensors_file import TensorInfo, read_header
from .writer import CONFIG, INDEX, MARKER, QUANTIZE_CONFIG, SINGLE

_PICKLES = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class LayerSpec:
    """One quantized layer, from the headers alone.

    Attributes:
        name: full module name. parts: the short names of the tensors it has, ``bias`` included.
        bits, group_size, sym, desc_act: as configured for this layer. format: "gptq" or "gptq_v2".
        in_features, out_features, groups: as the tensors say.
        has_g_idx: whether the groups are stored. padded: whether a packed axis is longer than its values.
        configured: False where the tensors exist although the configuration leaves this layer out.
        nbytes: of all its tensors but the bias.
    """

    name: str
    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    format: str
    in_features: int
    out_features: int
    groups: int
    has_g_idx: bool
    padded: bool
    configured: bool
    parts: tuple[str, ...]
    nbytes: int

    @property
    def layer_format(self) -> LayerFormat:
        """Bits, group size, symmetry and order."""
        return LayerFormat(self.bits, self.group_size, self.sym, self.desc_act)


@dataclass(frozen=True)
class Weights:
    """The safetensors files of a folder.

    Attributes:
        folder: where they lie. index: the index file, where there is one.
        files: every file that belongs to the checkpoint.
        tensors: dtype, shape and place of every tensor. place: the file of every tensor.
    """

    folder: Path
    index: Path | None
    files: tuple[Path, ...]
    tensors: dict[str, TensorInfo]
    place: dict[str, Path]
    _open: dict[Path, Any] = field(default_factory=dict, repr=False, compare=False)

    def tensor(self, name: str) -> Tensor:
        """The tensor called `name`, memory-mapped.

        Raises:
            CheckpointError: there is none, or its file cannot be read any more.
        """
        if name not in self.place:
            raise CheckpointError(f"{self.folder} has no tensor {name}")
        path = self.place[name]
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt")
            tensor: Tensor = self._open[path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read tensor {name} from {path}: {error}") from error
        return tensor


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        path: its folder. config: config.json, empty for an AutoGPTQ folder without one.
        quantization: the quantization configuration as written; settings: the same, parsed.
        weights: the files. layers: every quantized layer by its full module name.
    """

    path: Path
    config: dict[str, Any]
    quantization: dict[str, Any]
    settings: CheckpointSettings
    weights: Weights
    layers: dict[str, LayerSpec]

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor's dtype and shape by its full name."""
        return self.weights.tensors

    def tensor(self, name: str) -> Tensor:
        """The tensor called `name`, memory-mapped. Raises `CheckpointError` where there is none."""
        return self.weights.tensor(name)

    def codes(self, layer: str) -> QuantizedMatrix:
        """The unpacked layer.

        Raises:
            CheckpointError: no such layer, or its contents are damaged.
        """
        if layer not in self.layers:
            raise CheckpointError(f"{self.path} has no quantized layer {layer}")
        spec = self.layers[layer]
        tensors = {part: self.tensor(f"{layer}.{part}") for part in spec.parts if part in PARTS}
        try:
            return layout.unpack(
                tensors, spec.bits, spec.group_size, spec.format, spec.in_features, spec.out_features
            )
        except CheckpointError as error:
            raise CheckpointError(f"layer {layer} of {self.path}: {error}") from error


def open_checkpoint(path: str | Path, quantization_config: Mapping[str, Any] | None = None) -> Checkpoint:
    """Open the checkpoint in the folder `path`.

    Args:
        path: the folder.
        quantization_config: taken where the folder has none.

    Raises:
        CheckpointError: it is not a GPTQ checkpoint, is unfinished, or contradicts itself.
    """
    folder = Path(path)
    config, found, where = find_config(folder, quantization_config)
    default_method = "gptq" if where.name == QUANTIZE_CONFIG else None
    settings = quantization.parse(found, str(where), default_method)
    weights = open_weights(folder, found.get("model_file_base_name"))
    layers = {name: layer_spec(name, settings, weights.tensors) for name in layer_names(weights.tensors)}
    if not layers:
        raise CheckpointError(f"{folder} says it is quantized, but has no tensor named *.{QWEIGHT}")
    return Checkpoint(folder, config, found, settings, weights, layers)


def find_config(
    folder: Path, given: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """(model configuration, quantization configuration, the file of the latter).

    Where there is none of the latter, it is the one that is `given`.

    Raises:
        CheckpointError: no folder, no quantization configuration, or unreadable JSON.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder of a quantized checkpoint")
    config_path, legacy_path = folder / CONFIG, folder / QUANTIZE_CONFIG
    if not config_path.exists() and (folder / MARKER).exists():
        raise CheckpointError(f"{folder} is unfinished: fewbit was interrupted; run the same command again")
    config = read_json(config_path) if config_path.exists() else {}
    found = config.get("quantization_config")
    if found is None and legacy_path.exists():
        return config, read_json(legacy_path), legacy_path
    if found is None and given is not None:
        return config, dict(given), config_path
    if found is None:
        raise CheckpointError(
            f"{folder} is not a quantized checkpoint: neither {CONFIG} has a quantization_config "
            f"nor is there a {QUANTIZE_CONFIG}. Quantize it with: fewbit quantize {folder} -o OUT"
        )
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{config_path} has a quantization_config that is no JSON object: {shown(found)}"
        )
    return config, found, config_path


def open_weights(folder: Path, base_name: str | None = None) -> Weights:
    """Read the headers of the safetensors files in `folder`.

    Args:
        folder: of a model, quantized or not.
        base_name: AutoGPTQ's ``model_file_base_name``, where its configuration has one.

    Raises:
        CheckpointError: no weights, several candidates, a damaged file, or an index that does not match.
    """
    index, files = find_weights(folder, base_name)
    tensors: dict[str, TensorInfo] = {}
    place: dict[str, Path] = {}
    for path in files:
        infos, _ = read_header(path)
        for name, info in infos.items():
            if name in place:
                raise CheckpointError(
                    f"tensor {name} is both in {place[name].name} and in {path.name} of {folder}"
                )
            tensors[name], place[name] = info, path
    if index is not None:
        for name, file in read_weight_map(index).items():
            if place.get(name) != folder / file:
                raise CheckpointError(f"{index} says that {name} is in {file}, but it is not")
    return Weights(folder, index, files, tensors, place)


def find_weights(folder: Path, base_name: str | None = None) -> tuple[Path | None, tuple[Path, ...]]:
    """(index or None, weight files) of a folder: what transformers would load, else AutoGPTQ's names.

    Raises:
        CheckpointError: no safetensors files, several candidates, an unreadable index, or a `base_name` that
            leads out of the folder.
    """
    if base_name and not is_plain_name(base_name):
        raise CheckpointError(
            f"{folder} has model_file_base_name {shown(base_name)}, which is not a file in its folder"
        )
    stems = [SINGLE.removesuffix(".safetensors"), *([base_name] if base_name else [])]
    for stem in stems:
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if single.exists():
            return None, (single,)
        if index.exists():
            return index, _shards(index)
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) == 1:
        return indexes[0], _shards(indexes[0])
    singles = sorted(folder.glob("*.safetensors"))
    if len(singles) == 1 and not indexes:
        return None, (singles[0],)
    if singles:
        names = ", ".join(path.name for path in singles[:5])
        raise CheckpointError(f"{folder} has several weight files and no {INDEX}: {names}; keep only one set")
    pickles = [path.name for pattern in _PICKLES for path in sorted(folder.glob(pattern))]
    if pickles:
        raise CheckpointError(
            f"{folder} has its weights in a pickle ({pickles[0]}), which can run code when it is loaded. "
            f"If you trust it, rewrite it with: fewbit convert {folder} -o OUT --allow-pickle"
        )
    raise CheckpointError(f"{folder} has no weights: no file named *.safetensors")


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name → file name from an index file.

    Raises:
        CheckpointError: it is damaged, or names a file outside its folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to files")
    for file in set(weight_map.values()):
        if not is_plain_name(file):
            raise CheckpointError(f"{index} names {shown(file)}, which is not a file in its folder")
    return weight_map


def _shards(index: Path) -> tuple[Path, ...]:
    return tuple(index.parent / file for file in sorted(set(read_weight_map(index).values())))


def layer_names(tensors: Mapping[str, Any]) -> list[str]:
    """Names of the quantized layers: every NAME for which NAME.qweight exists, in the files' order."""
    return [name.removesuffix(f".{QWEIGHT}") for name in tensors if name.endswith(f".{QWEIGHT}")]


def layer_spec(name: str, settings: CheckpointSettings, tensors: Mapping[str, TensorInfo]) -> LayerSpec:
    """Deduce one layer from its tensors' shapes.

    The inputs are counted by g_idx; without one by the packed rows, as far as the groups reach.

    Raises:
        CheckpointError: a tensor is missing, or the shapes contradict each other or the configuration.
    """
    parts = {part: tensors[f"{name}.{part}"] for part in (*PARTS, "bias") if f"{name}.{part}" in tensors}
    configured = settings.layer(name)
    bits, group_size, sym, desc_act = configured or settings.base
    missing = [part for part in (QWEIGHT, QZEROS, SCALES) if part not in parts]
    if missing:
        raise CheckpointError(f"layer {name} has no {' and no '.join(missing)}")
    if any(len(parts[part].shape) != 2 or 0 in parts[part].shape for part in (QWEIGHT, QZEROS, SCALES)):
        shapes = ", ".join(f"{part} {parts[part].shape}" for part in (QWEIGHT, QZEROS, SCALES))
        raise CheckpointError(f"layer {name} does not consist of matrices: {shapes}")
    groups, out_features = parts[SCALES].shape
    in_features = _in_features(parts, bits, group_size, groups)
    expected_groups = group_count(in_features, group_size)
    problems = layout.shape_problems(parts, bits, expected_groups, in_features, out_features)
    if "bias" in parts and parts["bias"].shape != (out_features,):
        problems.append(f"bias has shape {parts['bias'].shape}, expected {(out_features,)}")
    if problems:
        raise CheckpointError(
            f"layer {name} does not fit its configuration (bits {bits}, group_size {group_size}, "
            f"{in_features} inputs, {out_features} outputs): {'; '.join(problems)}"
        )
    return LayerSpec(
        name=name,
        bits=bits,
        group_size=group_size,
        sym=sym,
        desc_act=desc_act,
        format=settings.format,
        in_features=in_features,
        out_features=out_features,
        groups=groups,
        has_g_idx=G_IDX in parts,
        padded=(parts[QWEIGHT].shape[0], parts[QZEROS].shape[1])
        != (in_features * bits / 32, out_features * bits / 32),
        configured=configured is not None,
        parts=tuple(parts),
        nbytes=sum(info.nbytes for part, info in parts.items() if part != "bias"),
    )


def _in_features(parts: Mapping[str, TensorInfo], bits: int, group_size: int, groups: int) -> int:
    if G_IDX in parts and len(parts[G_IDX].shape) == 1:
        return parts[G_IDX].shape[0]
    packed = parts[QWEIGHT].shape[0] * 32 // bits
    return packed if group_size == -1 else min(packed, groups * group_size)
