"""Translate the older tools' loading arguments: devices, memory, and names of weight files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.reader import find_weights
from ..context import resolve_device
from ..errors import CheckpointError, ConfigError

_AUTOMATIC_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def device_arguments(
    device: Any = None, device_map: Any = None, max_memory: Mapping[Any, Any] | None = None
) -> dict[str, Any]:
    """Translate device arguments for `fewbit.load`; a map to one device needs no accelerate.

    Raises:
        ConfigError: a device does not exist, a map is unknown, or it has disk entries.
    """
    refuse_disk(device_map, max_memory)
    if isinstance(device_map, Mapping) and len(device_map) == 1:
        device, device_map = next(iter(device_map.values())), None
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


def check_weights_name(folder: Path, requested: str, aliases: Sequence[str] = ()) -> None:
    """Check that the weight file in `folder` has the requested name, with or without an ending.

    Names in `aliases` stand for the weights under any file name.

    Raises:
        CheckpointError: the file has another name.
    """
    index, files = find_weights(folder, requested)
    name = (index or files[0]).name
    stem = name.removesuffix(".index.json").removesuffix(".safetensors")
    if requested.removesuffix(".index.json").removesuffix(".safetensors") not in (stem, *aliases):
        raise CheckpointError(
            f"the weights in {folder} are {name}, not {requested}: leave out the name, or keep only the file you mean"
        )
