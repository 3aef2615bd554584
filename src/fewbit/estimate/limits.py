"""Which predicted sizes do not fit into what this machine has left: each with what to do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ..context import RunContext
from ..formatting import size
from ..resources import device_left, disk_left, memory_left
from .predict import Memory, Sizes


def disk_problems(output: Path, sizes: Sizes) -> list[str]:
    """Whether result and journal fit on the disk of the output folder."""
    left = disk_left(output)
    if sizes.disk <= left.bytes:
        return []
    return [
        f"the disk is too small: {size(sizes.disk)} are needed while the result is written "
        f"({size(sizes.output)} of them for the result), {size(left.bytes)} are {left.name}: make room, or "
        "give an output folder on another disk"
    ]


def offload_problems(folder: Path, needed: int) -> list[str]:
    """Whether the activations fit on the disk of the offload folder."""
    left = disk_left(folder)
    if needed <= left.bytes:
        return []
    return [
        f"the disk for activations is too small: {size(needed)} are needed, {size(left.bytes)} are "
        f"{left.name}. Use fewer calibration sequences (--num-samples), --fast, or another --offload-dir"
    ]


def shard_problems(shards: Mapping[str, int], device: torch.device) -> list[str]:
    """Whether one block of the model fits into memory at all."""
    largest = max(shards, key=lambda shard: shards[shard])
    left = device_left(device) or memory_left()
    if left is None or shards[largest] <= left.bytes:
        return []
    return [
        f"memory is too small for the weights of {largest or 'the model'}: {size(shards[largest])} are needed, "
        f"{size(left.bytes)} are {left.name}. One block must fit: read it in another --dtype, or use a machine "
        "with more memory"
    ]


def memory_problems(memory: Memory, used: int, ctx: RunContext, processes: int = 1) -> list[str]:
    """Whether the worst moment of each process fits into the memory of the machine and of a GPU.

    This process already uses `used` bytes.
    """
    found = []
    left = memory_left()
    more = processes * memory.peak - used
    if left is not None and more > left.bytes:
        each = f"each of {processes} processes" if processes > 1 else "the run"
        found.append(
            f"memory is too small: {each} takes {size(memory.peak)} while {memory.moment}, "
            f"{size(more)} more than now, and {size(left.bytes)} are {left.name}. "
            + _advice(memory, (more - left.bytes) // processes, ctx)
        )
    on_device = device_left(ctx.device)
    if on_device is not None and (memory.device_peak or 0) > on_device.bytes:
        found.append(
            f"the GPU's memory is too small: without the activations of waiting batches the run takes "
            f"{size(memory.device_peak)}, and {size(on_device.bytes)} are {on_device.name}. Use a smaller "
            "--batch-size, shorter sequences (--seq-len), --fast, or --device cpu"
        )
    return found


def _advice(memory: Memory, missing: int, ctx: RunContext) -> str:
    """What would lower the peak by the `missing` bytes, the cheapest first."""
    config = ctx.config
    activations = memory.parts.get("activations", 0) + memory.parts.get("allocator", 0)
    ways = []
    if memory.host_activations:
        ways.append("a GPU with more memory")
    if activations > missing:
        fitting = int(config.num_samples * (activations - missing) / activations)
        if fitting >= 1:
            ways.append(f"--num-samples {fitting}")
        ways.append(f"--seq-len {max(1, config.seq_len // 2)}")
    if activations and ctx.offload_dir is None:
        ways.append("--offload-dir FOLDER, which keeps them on disk")
    if not config.fast:
        ways.append("--fast, which halves the activations")
    if config.dtype == "auto":
        ways.append("--dtype bfloat16, if the model is stored in float32")
    ways.append("a machine with more memory")
    return f"What helps: {'; '.join(ways)}"
