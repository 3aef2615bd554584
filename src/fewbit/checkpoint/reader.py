"""Opening a GPTQ checkpoint from any tool: headers and configuration first, data on request.

`open_checkpoint` finds the configuration (config.json, or AutoGPTQ's quantize_config.json) and the weights
(one file, an index with shards, or AutoGPTQ's names) and deduces every quantized layer from the tensors
that exist. A contradiction is refused here with a `CheckpointError`; `fewbit.verification` lists them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
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

# Writers that take 1 off whole words in format "gptq": what looks overwritten is exact in their files.
_WHOLE_WORD_WRITERS = ("gptqmodel", "gptq-model", "gpt-qmodel")
_PICKLES = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class LayerSpec:
    """One quantized layer, from the headers alone.

    Attributes:
        name: Full module name.
        bits: Configured bits of a code.
        group_size: Configured group size.
        sym: True if the layer is configured as symmetric.
        desc_act: True if the layer is configured with groups that are not consecutive inputs.
        format: "gptq" or "gptq_v2".
        in_features: Columns of the weight matrix, from the tensors' shapes.
        out_features: Rows of the weight matrix, from the tensors' shapes.
        groups: Groups of each row, from the tensors' shapes.
        has_g_idx: True if the group of each input is stored.
        padded: True if a packed axis is longer than its values.
        configured: False if the tensors exist although the configuration leaves this layer out.
        parts: Short names of its tensors, ``bias`` included.
        nbytes: Bytes of its tensors without the bias.
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
        return LayerFormat(self.bits, self.group_size, self.sym, self.desc_act)


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of a folder.

    Attributes:
        folder: The folder.
        index: The index file; None for a single file.
        files: Every file that belongs to the checkpoint.
        tensors: Dtype, shape and offsets of every tensor by name.
        file_of: File of every tensor by name.
    """

    folder: Path
    index: Path | None
    files: tuple[Path, ...]
    tensors: dict[str, TensorInfo]
    file_of: dict[str, Path]
    _open: dict[Path, Any] = field(default_factory=dict, repr=False, compare=False)

    def tensor(self, name: str) -> Tensor:
        """The tensor called `name`, memory-mapped.

        Raises:
            CheckpointError: there is none, or its file cannot be read any more.
        """
        if name not in self.file_of:
            raise CheckpointError(f"{self.folder} has no tensor {name}")
        path = self.file_of[name]
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
        path: Its folder.
        config: Content of config.json; empty for an AutoGPTQ folder without one.
        quantization: The quantization configuration as written.
        settings: The parsed quantization configuration.
        weights: The weight files.
        layers: Every quantized layer by its full module name.
    """

    path: Path
    config: dict[str, Any]
    quantization: dict[str, Any]
    settings: CheckpointSettings
    weights: WeightFiles
    layers: dict[str, LayerSpec]

    @property
    def tensors(self) -> dict[str, TensorInfo]:
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
        return unpack_layer(self.layers[layer], self.tensor, f"layer {layer} of {self.path}")


class Configuration(NamedTuple):
    """The configurations of `Checkpoint`, and the file that holds the one of the quantization."""

    model: dict[str, Any]
    quantization: dict[str, Any]
    settings: CheckpointSettings
    file: Path


def open_checkpoint(path: str | Path, quantization_config: Mapping[str, Any] | None = None) -> Checkpoint:
    """Open the checkpoint in the folder `path`.

    Args:
        path: the folder.
        quantization_config: taken where the folder has none.

    Raises:
        CheckpointError: it is not a GPTQ checkpoint, is unfinished, or contradicts itself.
    """
    folder = Path(path)
    config, found, settings, _ = read_config(folder, quantization_config)
    weights = open_weights(folder, found.get("model_file_base_name"))
    layers = {name: layer_spec(name, settings, weights.tensors) for name in layer_names(weights.tensors)}
    if not layers:
        raise CheckpointError(f"{folder} says it is quantized, but has no tensor named *.{QWEIGHT}")
    return Checkpoint(folder, config, found, settings, weights, layers)


def unpack_layer(spec: LayerSpec, tensor: Callable[[str], Tensor], where: str) -> QuantizedMatrix:
    """Unpack one layer, whose tensors `tensor` returns by their full names.

    Raises:
        CheckpointError: Its contents are damaged; the message begins with `where`.
    """
    tensors = {part: tensor(f"{spec.name}.{part}") for part in spec.parts if part in PARTS}
    try:
        return layout.unpack(
            tensors, spec.bits, spec.group_size, spec.format, spec.in_features, spec.out_features
        )
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error


def read_config(folder: Path, given: Mapping[str, Any] | None = None) -> Configuration:
    """Read the configuration files. `given` is used where no file has a quantization configuration.

    Raises:
        CheckpointError: no folder, no quantization configuration, one that is not GPTQ, or unreadable JSON.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder of a quantized checkpoint")
    file, legacy = folder / CONFIG, folder / QUANTIZE_CONFIG
    if not file.exists() and (folder / MARKER).exists():
        raise CheckpointError(f"{folder} is unfinished: fewbit was interrupted; run the same command again")
    model = read_json(file) if file.exists() else {}
    found = model.get("quantization_config")
    if found is None and legacy.exists():
        file, found = legacy, read_json(legacy)
    elif found is None and given is not None:
        found = dict(given)
    if found is None:
        raise CheckpointError(
            f"{folder} is not a quantized checkpoint: neither {CONFIG} has a quantization_config "
            f"nor is there a {QUANTIZE_CONFIG}. Quantize it with: fewbit quantize {folder} -o OUT"
        )
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} has a quantization_config that is no JSON object: {shown(found)}")
    default_method = "gptq" if file == legacy else None
    return Configuration(model, found, quantization.parse(found, str(file), default_method), file)


def open_weights(folder: Path, base_name: str | None = None) -> WeightFiles:
    """Read the headers of the safetensors files in `folder`.

    Args:
        folder: of a model, quantized or not.
        base_name: AutoGPTQ's ``model_file_base_name``, where its configuration has one.

    Raises:
        CheckpointError: no weights, several candidates, a damaged file, or an index that does not match.
    """
    index, files = find_weights(folder, base_name)
    tensors: dict[str, TensorInfo] = {}
    file_of: dict[str, Path] = {}
    for path in files:
        infos, _ = read_header(path)
        for name, info in infos.items():
            if name in file_of:
                raise CheckpointError(
                    f"tensor {name} is both in {file_of[name].name} and in {path.name} of {folder}"
                )
            tensors[name], file_of[name] = info, path
    if index is not None:
        for name, file in read_weight_map(index).items():
            if file_of.get(name) != folder / file:
                raise CheckpointError(f"{index} says that {name} is in {file}, but it is not")
    return WeightFiles(folder, index, files, tensors, file_of)


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

    g_idx gives the number of inputs; without one it is the packed rows, limited by the groups.

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


def refuse_lost_zeros(qzeros: Tensor, spec: LayerSpec, settings: CheckpointSettings) -> None:
    """Refuse a layer with words of zero points that look overwritten.

    Raises:
        CheckpointError: there are some (`overwritten_words`).
    """
    lost = overwritten_words(qzeros, spec, settings)
    if lost:
        raise CheckpointError(
            f"layer {spec.name}: {lost} words of qzeros look overwritten, so that zero points are lost; "
            "fewbit verify says more"
        )


def overwritten_words(qzeros: Tensor, spec: LayerSpec, settings: CheckpointSettings) -> int:
    """Count the full words of a v1 ``qzeros`` (G, words) whose bits from the second-highest value up are all set.

    A writer that stores zero point 0 as -1 in 32 bits leaves such words: it sets every field above. At 3 bits the
    highest value of the first two words of three continues in the next word. Files of writers that subtract from whole
    words can hold the same bits and are read exactly: the count for them is 0.
    """
    whole_words = any(name.lower().startswith(_WHOLE_WORD_WRITERS) for name in settings.quantizers)
    if spec.format != "gptq" or whole_words:
        return 0
    full = spec.out_features * spec.bits // 32
    lowest = torch.tensor([27, 28, 26] if spec.bits == 3 else [32 - 2 * spec.bits]).repeat(full)[:full]
    words = qzeros[:, :full].to(torch.int64) & 0xFFFFFFFF
    return int((words >> lowest == 2 ** (32 - lowest) - 1).sum())
