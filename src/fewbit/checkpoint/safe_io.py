"""What may be taken from a stranger's folder: regular files of a bounded size, plain JSON, names that stay in it.

Links to files are followed: the Hub's cache keeps every file as one. Names that lead out of the folder are refused.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from ..errors import CheckpointError

LARGEST_JSON = 100_000_000  # bytes; the limit that the safetensors library has for a header
_DEEPEST = 64
_LONGEST_NAME = 1000

Pairs = Callable[[list[tuple[str, Any]]], Any]


def open_regular(path: Path) -> tuple[BinaryIO, int]:
    """A file that is open for reading, and its size; a pipe or a device would never end.

    Raises:
        CheckpointError: it cannot be opened, or is no regular file.
    """
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise CheckpointError(f"cannot read {path}: it is no regular file")
        return path.open("rb"), info.st_size
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL in it
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot read {path}: {reason}") from error


def read_bytes(path: Path) -> bytes:
    """The contents of a regular file of at most `LARGEST_JSON` bytes.

    Raises:
        CheckpointError: it cannot be read, or is larger.
    """
    file, size = open_regular(path)
    with file:
        if size > LARGEST_JSON:
            raise CheckpointError(f"{path} has {size:,} bytes; no such file has more than {LARGEST_JSON:,}")
        try:
            return file.read(LARGEST_JSON)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def parse_json(data: bytes, where: str, pairs: Pairs | None = None) -> dict[str, Any]:
    """The JSON object in `data`: UTF-8, not deeper than any real file's, with texts that can be written again.

    Args:
        where: the file, for messages.
        pairs: as `json.loads` takes it: what an object's pairs become.

    Raises:
        CheckpointError: it is anything else.
    """
    try:
        values = json.loads(data.decode(), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is no valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{where} holds no JSON object")
    _check(values, where)
    return values


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError: it cannot be read or holds something else."""
    return parse_json(read_bytes(path), str(path))


def is_plain_name(name: object) -> bool:
    """Whether `name` is the name of a file right in a folder: no way out of it, nothing that cannot be shown."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not set(name) & set("/\\:")
        and len(name.encode(errors="replace")) <= 255
        and name.isprintable()
    )


def stays_inside(name: str) -> bool:
    """Whether `name`, with ``/`` between its parts, is a path inside the folder that it is relative to."""
    return bool(name) and not name.startswith("/") and all(map(is_plain_name, PurePosixPath(name).parts))


def is_tensor_name(name: str) -> bool:
    """Whether `name` can be a tensor's: printable, so that no terminal obeys it, and not absurdly long."""
    return name.isprintable() and len(name) <= _LONGEST_NAME


def shown(value: object) -> str:
    """`value` for a message: as Python writes it, cut short."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} …"


def _check(values: object, where: str) -> None:
    """Without recursion, and level by level: how deep it goes, and whether all texts are Unicode."""
    level = [values]
    for _ in range(_DEEPEST):
        below: list[object] = []
        for value in level:
            if isinstance(value, dict):
                below += value.keys()
                below += value.values()
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str) and not value.isascii() and _has_surrogates(value):
                raise CheckpointError(f"{where} holds text that is no Unicode: {shown(value)}")
        if not below:
            return
        level = below
    raise CheckpointError(f"{where} is nested more than {_DEEPEST} levels deep")


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)
