"""What this machine has left: memory, GPU memory, disk."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

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


def takes_at_most(share: float, needed: int, device: torch.device) -> bool:
    """Whether `needed` bytes are at most this share of the memory that is left; True if the system does not say."""
    left = device_left(device) or memory_left()
    return left is None or needed <= share * left.bytes


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


def rows_at_once(length: int, device: torch.device) -> int:
    """How many float32 rows of `length` numbers to work on at once when several passes over them follow.

    Args:
        length: numbers in a row, for example the vocabulary.
        device: on a CPU the rows should stay in its cache (4 MB); a GPU wants long operations (64 MB).
    """
    return max(1, (1 << 20 if device.type == "cpu" else 1 << 24) // length)
