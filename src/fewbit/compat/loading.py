"""Translate the older tools' loading arguments: devices, memory, file names, Hub repositories."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..checkpoint.reader import find_weights
from ..context import resolve_device
from ..errors import CheckpointError, ConfigError
from ..hf.load import load
from ..hf.quantized_layers import prepare_layers
from ..modeling.source import download

# Arguments for downloading from the Hub.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_AUTOMATIC_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def local_folder(name: str | Path, subfolder: str = "", **hub: Any) -> Path:
    """Return the folder `name`, or the local copy of the Hub repository with that name.

    Raises:
        CheckpointError: there is neither, or the download fails.
    """
    path = Path(name).expanduser()
    return (path if path.exists() else download(str(name), CheckpointError, **hub)) / subfolder


def device_arguments(
    device: Any = None, device_map: Any = None, max_memory: Mapping[Any, Any] | None = None
) -> dict[str, Any]:
    """Translate device arguments for `fewbit.load`; a map to one device needs no accelerate.

    Raises:
        ConfigError: a device does not exist, a map is unknown, or it has disk entries.
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
    """Raise ConfigError for disk entries in a device map or a memory limit."""
    in_map = device_map.values() if isinstance(device_map, Mapping) else ()
    if "disk" in in_map or "disk" in (max_memory or ()):
        raise ConfigError(
            "quantized layers cannot run from disk, and quantizing needs none: leave the disk entries out of "
            "device_map and max_memory. A model that does not fit in memory is quantized by "
            "fewbit.quantize(FOLDER, output=OUT), which streams it"
        )


def check_weights_name(folder: Path, asked: str, aliases: tuple[str, ...]) -> None:
    """Check that the weight file that will be loaded is called `asked`, with or without an ending.

    Args:
        folder: folder of the checkpoint.
        asked: name that the user gave.
        aliases: names that stand for the folder's weights under any file name.

    Raises:
        CheckpointError: the file has another name.
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
    """Load a checkpoint with `fewbit.load`, and choose kernels with gradients if `trainable`.

    Args:
        folder: folder of the checkpoint.
        where: device arguments from `device_arguments`.
        kernel: kernel name, as `fewbit.load` takes it.
        trainable: whether gradients to the layers' inputs are needed.
        **options: further arguments of `fewbit.load`.

    Raises:
        FewbitError: as `fewbit.load`.
    """
    model = load(folder, kernel=kernel, **where, **options)
    if trainable:
        prepare_layers(model, kernel, trainable=True)
    return model
