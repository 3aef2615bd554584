"""Small files that are either whole or absent, whatever happens to the process, the disk or the power."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Put `data` into the file `path` in one step: a new file, on disk before it gets its name.

    Never writes through a link or into a file that somebody else has open.

    Raises:
        OSError: the disk is full or cannot be written. What was at `path` is as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    with open(temporary, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def append_synced(path: Path, data: bytes) -> None:
    """Add `data` to the end of a file and wait until it is on disk. Raises OSError."""
    with open(path, "ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on disk. Raises OSError."""
    if os.name != "posix":  # elsewhere a folder cannot be opened, and renames are durable without it
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
