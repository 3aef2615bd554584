"""Loading with the arguments that older tools have for it: devices, memory, file names, repositories."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..checkpoint.reader import find_weights
from ..errors import CheckpointError, ConfigError
from ..hf.layers import quantized_layers
from ..hf.load import load
from ..modeling.source import download
from ..preparation import resolve_device

# Arguments that say where on the Hub a repository is and how to get it.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_AUTOMATIC_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def local_folder(name: str | Path, subfolder: str = "", **hub: Any) -> Path:
    """The folder `name`, or the local copy of the Hub repository of that name.

    Raises:
        CheckpointError: it is neither, or cannot be downloaded.
    """
    path = Path(name).expanduser()
    return (path if path.exists() else download(str(name), CheckpointError, **hub)) / subfolder


def placement(
    device: Any = None, device_map: Any = None, max_memory: Mapping[Any, Any] | None = None
) -> dict[str, Any]:
    """Arguments of `fewbit.load` that put a model where these do; a map to one device needs no accelerate.

    Raises:
        ConfigError: a device is not there, a map is unknown, or it has disk entries.
    """
    if isinstance(device_map, Mapping) and len(device_map) == 1 and "disk" not in device_map.values():
        device, device_map = next(iter(device_map.values())), None
    refuse_disk(device_map, max_memory)
    if isinstance(device_map, str) and device_map not in _AUTOMATIC_MAPS:
        device, device_map = device_map, None
    if device_map is None and (max_memory is None or device is not None):
        if isinstance(device, int):
            device = f"cuda:{device}"
        return {"device": resolve_device("auto" if device is None else str(device))}
    return {"device_map": device_map or "auto", "max_memory": max_memory}


def refuse_disk(device_map: Any, max_memory: Mapping[Any, Any] | None) -> None:
    """Raises ConfigError for disk entries in a device map or in what devices may hold."""
    in_map = device_map.values() if isinstance(device_map, Mapping) else ()
    if "disk" in in_map or "disk" in (max_memory or ()):
        raise ConfigError(
            "quantized layers cannot run from disk, and quantizing needs none: leave the disk entries out of "
            "device_map and max_memory. A model that does not fit in memory is quantized by "
            "fewbit.quantize(FOLDER, output=OUT), which streams it"
        )


def check_weights_name(folder: Path, asked: str, aliases: tuple[str, ...]) -> None:
    """Make sure that the weights called `asked` (with or without an ending) are those that are loaded.

    Args:
        folder: of the checkpoint.
        aliases: names that mean the folder's weights whatever their file is called.

    Raises:
        CheckpointError: they are others.
    """
    index, files = find_weights(folder, asked)
    name = (index or files[0]).name
    stem = name.removesuffix(".index.json").removesuffix(".safetensors")
    if asked.removesuffix(".index.json").removesuffix(".safetensors") not in (stem, *aliases):
        raise CheckpointError(
            f"the weights in {folder} are {name}, not {asked}: leave out the name, or keep only the file you mean"
        )


def load_quantized(
    folder: Path, where: Mapping[str, Any], *, kernel: str, trainable: bool = False, **options: Any
) -> PreTrainedModel:
    """`fewbit.load`, with kernels that give gradients where these are wanted.

    Args:
        folder: of the checkpoint.
        where: from `placement`.
        kernel: name, as `fewbit.load` takes it.
        trainable: whether gradients to the layers' inputs are needed.
        **options: of `fewbit.load`.

    Raises:
        FewbitError: as `fewbit.load`.
    """
    model = load(folder, kernel=kernel, **where, **options)
    if trainable:
        prepare(model, kernel, trainable=True)
    return model


def prepare(model: torch.nn.Module, kernel: str, *, trainable: bool = False) -> None:
    """Choose the kernel of every quantized layer again.

    Raises:
        KernelError: the kernel asked for cannot run a layer.
    """
    for _, layer in quantized_layers(model):
        layer.fill_in_g_idx()
        layer.prepare(kernel, trainable=trainable)
