"""What this machine has left (memory, GPU memory, disk), and which predicted sizes do not fit: each with what to do."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..context import RunContext
from ..formatting import size
from .predict import Memory, Sizes

_MEMINFO = Path("/proc/meminfo")
_STATM = Path("/proc/self/statm")
_OWN_CGROUP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Limit:
    """The bytes that are left of a resource, and what limits them, in words."""

    bytes: int
    name: str


def memory_left() -> Limit | None:
    """How much more memory this process can take: the least of what the machine, its control group (containers,
    batch systems) and its own limit (``ulimit -v``) leave. None if the system does not say.
    """
    found = [limit for limit in (_machine(), _cgroup(), _address_space()) if limit is not None]
    return min(found, key=lambda limit: limit.bytes, default=None)


def device_left(device: torch.device) -> Limit | None:
    """Memory that is free on a CUDA device; None on others, which do not say."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return Limit(free, f"free on {device}")


def disk_left(folder: Path) -> Limit:
    """Free space on the disk of `folder`, which need not exist."""
    parent = existing(folder)
    return Limit(shutil.disk_usage(parent).free, f"free at {parent}")


def existing(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that exists."""
    folder = folder.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _machine() -> Limit | None:
    if not _MEMINFO.exists():
        return None
    lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line)
    if "MemAvailable" not in lines:
        return None
    return Limit(1024 * int(lines["MemAvailable"].split()[0]), "available on this machine")


def _cgroup() -> Limit | None:
    """The tightest limit of this process's control group (version 2) and those above it."""
    if not _OWN_CGROUP.exists():
        return None
    own = next((line[3:] for line in _OWN_CGROUP.read_text().splitlines() if line.startswith("0::")), None)
    if own is None:
        return None
    group, found = _CGROUPS / own.strip().lstrip("/"), []
    for level in (group, *group.parents):
        if _CGROUPS not in (level, *level.parents):
            break
        limit = _read_number(level / "memory.max")
        used = _read_number(level / "memory.current")
        if limit is not None and used is not None:
            found.append(limit - used + _file_cache(level / "memory.stat"))
    return Limit(max(0, min(found)), "left of the control group's memory.max") if found else None


def _read_number(path: Path) -> int | None:
    text = path.read_text().strip() if path.exists() else ""
    return int(text) if text.isdigit() else None


def _file_cache(path: Path) -> int:
    """Cached files count as used, but are dropped on demand."""
    if not path.exists():
        return 0
    values = dict(line.split() for line in path.read_text().splitlines() if line.count(" ") == 1)
    return int(values.get("inactive_file", 0))


def _address_space() -> Limit | None:
    if sys.platform == "win32" or not _STATM.exists():
        return None
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return None
    used = int(_STATM.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return Limit(max(0, soft - used), "left of the address space that ulimit -v allows")


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
