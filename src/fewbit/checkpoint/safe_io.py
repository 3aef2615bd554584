"""Validated access to untrusted folders: regular files of a bounded size, plain JSON, names that stay in the folder.

Links to files are followed, because the Hub's cache consists of links. Names that lead out of the folder are refused.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from ..errors import CheckpointError

LARGEST_JSON = 100_000_000  # bytes; the limit that the safetensors library has for a header
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_INDEX_SUFFIX = ".index.json"
_DEEPEST = 64
_LONGEST_NAME = 1000

Pairs = Callable[[list[tuple[str, Any]]], Any]


def open_regular(path: Path) -> tuple[BinaryIO, int]:
    """Open a regular file for reading and return it with its size. Pipes and devices, which never end, are refused.

    Raises:
        CheckpointError: The file cannot be opened, or is not a regular file.
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
    """Read a regular file of at most `LARGEST_JSON` bytes.

    Raises:
        CheckpointError: The file cannot be read, or is larger.
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
    """Parse a JSON object: UTF-8, of limited depth, with texts that can be encoded again.

    Args:
        data: The bytes.
        where: The file, for messages.
        pairs: `object_pairs_hook` of `json.loads`.

    Raises:
        CheckpointError: `data` is anything else.
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
    """Read the JSON object in a file. Raise CheckpointError if it cannot be read or holds something else."""
    return parse_json(read_bytes(path), str(path))


def read_card(folder: Path) -> dict[str, Any]:
    """Read the header of a folder's model card; an empty dict where none can be read."""
    from huggingface_hub import metadata_load  # only folders with a card need it
    from yaml import YAMLError

    path = folder / "README.md"
    try:
        found = metadata_load(path) if path.is_file() else None
    except (OSError, ValueError, YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def files_beside_weights(folder: Path) -> dict[str, Path]:
    """Find the files of a model folder and its subfolders by relative name, without weights and hidden files."""
    files = {path.relative_to(folder): path for path in sorted(folder.rglob("*"))}
    return {
        str(name): path
        for name, path in files.items()
        if path.is_file()
        and not any(part.startswith((".", "__")) for part in name.parts)
        and not path.name.endswith(WEIGHT_SUFFIXES)
        and not path.name.endswith(_INDEX_SUFFIX)
    }


def is_plain_name(name: object) -> bool:
    """Return True if `name` is the printable name of a file directly in a folder."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not set(name) & set("/\\:")
        and len(name.encode(errors="replace")) <= 255
        and name.isprintable()
    )


def stays_inside(name: str) -> bool:
    """Return True if the relative path `name`, with ``/`` between its parts, stays inside its folder."""
    return bool(name) and not name.startswith("/") and all(map(is_plain_name, PurePosixPath(name).parts))


def is_tensor_name(name: str) -> bool:
    """Return True if `name` can name a tensor. It must be printable, so that it cannot inject terminal escapes."""
    return name.isprintable() and len(name) <= _LONGEST_NAME


def shown(value: object) -> str:
    """Format `value` for a message: its `repr`, shortened."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} …"


def _check(values: object, where: str) -> None:
    """Check the depth, and that all texts are Unicode, level by level without recursion."""
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
