"""What the predicted sizes do not fit into, in words, each with what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from .. import formatting as words
from ..config import QuantConfig
from . import limits
from .memory import Memory
from .sizes import Sizes


def of_disk(output: Path | None, sizes: Sizes | None) -> list[str]:
    """Whether result and journal fit on the disk of the output folder."""
    if output is None or sizes is None:
        return []
    left = limits.disk_left(output)
    if sizes.disk <= left.bytes:
        return []
    return [
        f"the disk is too small: {words.size(sizes.disk)} are needed while the result is written "
        f"({words.size(sizes.output)} of them for the result), {words.size(left.bytes)} are {left.name}: make room, or "
        "give an output folder on another disk"
    ]


def of_scratch(folder: Path | None, scratch: int) -> list[str]:
    """Whether the activations fit on the disk of the folder that they are to be kept in."""
    left = limits.disk_left(folder) if folder is not None else None
    if left is None or scratch <= left.bytes:
        return []
    return [
        f"the disk for activations is too small: {words.size(scratch)} are needed, {words.size(left.bytes)} are "
        f"{left.name}. Use fewer calibration sequences (--num-samples), --fast, or another --offload-dir"
    ]


def of_units(units: Mapping[str, int], device: torch.device) -> list[str]:
    """Whether one block of the model fits into memory at all."""
    largest = max(units, key=lambda unit: units[unit])
    left = limits.device_left(device) or limits.memory_left()
    if left is None or units[largest] <= left.bytes:
        return []
    return [
        f"memory is too small for the weights of {largest or 'the model'}: {words.size(units[largest])} are needed, "
        f"{words.size(left.bytes)} are {left.name}. One block must fit: read it in another --dtype, or use a machine "
        "with more memory"
    ]


def of_memory(
    memory: Memory,
    used: int,
    config: QuantConfig,
    device: torch.device,
    *,
    offloaded: bool,
    processes: int = 1,
) -> list[str]:
    """Whether the worst moment fits into what is left, of the machine and of a GPU.

    Args:
        used: by this process now. processes: on this machine, each of which takes as much.
    """
    found = []
    left = limits.memory_left()
    more = processes * memory.peak - used
    if left is not None and more > left.bytes:
        each = f"each of {processes} processes" if processes > 1 else "the run"
        found.append(
            f"memory is too small: {each} takes {words.size(memory.peak)} while {memory.moment}, "
            f"{words.size(more)} more than now, and {words.size(left.bytes)} are {left.name}. "
            + _advice(memory, (left.bytes - more) // processes, config, offloaded)
        )
    on_device = limits.device_left(device)
    if on_device is not None and (memory.device_peak or 0) > on_device.bytes:
        found.append(
            f"the GPU's memory is too small: without the activations of waiting batches the run takes "
            f"{words.size(memory.device_peak)}, and {words.size(on_device.bytes)} are {on_device.name}. Use a smaller "
            "--batch-size, shorter sequences (--seq-len), --fast, or --device cpu"
        )
    return found


def _advice(memory: Memory, excess: int, config: QuantConfig, offloaded: bool) -> str:
    """What would lower the peak, the cheapest first. `excess` is negative: what is missing."""
    activations = memory.parts.get("activations", 0) + memory.parts.get("allocator", 0)
    ways = []
    if memory.spilled:
        ways.append("a GPU with more memory")
    if activations > -excess:
        fitting = int(config.num_samples * (activations + excess) / activations)
        if fitting >= 1:
            ways.append(f"--num-samples {fitting}")
        ways.append(f"--seq-len {max(1, config.seq_len // 2)}")
    if activations and not offloaded:
        ways.append("--offload-dir FOLDER, which keeps them on disk")
    if not config.fast:
        ways.append("--fast, which halves the activations")
    if config.dtype == "auto":
        ways.append("--dtype bfloat16, if the model is stored in float32")
    ways.append("a machine with more memory")
    return f"What helps: {'; '.join(ways)}"
