"""Files that are either whole or absent, whatever happens to the process, the disk or the power."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

TEMPORARY_SUFFIX = ".fewbit-tmp"


def temporary_path(path: Path) -> Path:
    """Return the name under which the file `path` is written before it is renamed."""
    return path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file for writing that takes the name `path` when the block ends without an error.

    The bytes are on disk before the rename. Nothing is written through a link or into a file that another process has
    open. After an error the old file at `path` is unchanged; only a killed process leaves the temporary file.

    Raises:
        OSError: The disk is full or cannot be written.
    """
    temporary = temporary_path(path)
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "xb") as file:
            yield file
            sync_file(file)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, data: bytes) -> None:
    """Replace the content of the file `path` in one step. Raises OSError."""
    with replacing(path) as file:
        file.write(data)


def sync_file(file: BinaryIO) -> None:
    """Wait until everything written to `file` is on disk. Raises OSError."""
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
