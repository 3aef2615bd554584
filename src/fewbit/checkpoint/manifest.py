"""``fewbit_manifest.json``: size and SHA-256 of every file that fewbit wrote into a checkpoint.

The manifest is written before config.json and holds the hash of the config's bytes, so any later change of a listed
file is found. It has a digest of its content and one fixed form, so a change of the manifest is found too. Markdown
files are not listed: people edit model cards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..errors import CheckpointError, OutputError
from .safe_io import read_bytes, stays_inside

NAME = "fewbit_manifest.json"
_CHUNK = 1 << 23


class FileHash(NamedTuple):
    """Size in bytes and SHA-256 in hexadecimal."""

    size: int
    sha256: str


def encode(files: Mapping[str, FileHash]) -> bytes:
    """Encode the manifest: the same files give the same bytes."""
    listed = {
        name: {"sha256": files[name].sha256, "size": files[name].size}
        for name in sorted(files)
        if not name.endswith(".md")
    }
    digest = hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
    return (json.dumps({"version": 1, "files": listed, "digest": digest}, indent=2) + "\n").encode()


def hash_bytes(data: bytes) -> FileHash:
    return FileHash(len(data), hashlib.sha256(data).hexdigest())


def require(folder: Path) -> None:
    """Check that everything in `folder` is as it was written.

    Raises:
        OutputError: A file was changed or is missing, or there is no manifest.
    """
    found = problems(folder) if (folder / NAME).exists() else [(NAME, "is missing")]
    if found:
        name, what = found[0]
        raise OutputError(
            f"{folder} was written to its end, but since then something changed it: {name} {what}. To have it written "
            "again, delete everything in it but .fewbit and run the same command again"
        )


def problems(folder: Path) -> list[tuple[str, str]]:
    """List (file, problem) for every file in `folder` that differs from the manifest; empty without a manifest.

    Every listed file is read once.
    """
    path = folder / NAME
    if not path.exists():
        return []
    try:
        raw = read_bytes(path)
    except CheckpointError as error:
        return [(NAME, str(error))]
    files = _decode(raw)
    if files is None or not all(map(stays_inside, files)):
        return [(NAME, "was changed since fewbit wrote it; nothing it lists can be trusted")]
    found = []
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            found.append((name, "is listed in the manifest but missing"))
        elif file.stat().st_size != expected.size:
            found.append((name, f"has {file.stat().st_size} bytes; {expected.size} were written"))
        elif _hash_of(file) != expected.sha256:
            found.append((name, "was changed since it was written (SHA-256 differs), or cannot be read"))
    return found


def _decode(raw: bytes) -> dict[str, FileHash] | None:
    try:
        listed = json.loads(raw)["files"]
        files = {name: FileHash(entry["size"], entry["sha256"]) for name, entry in listed.items()}
        return files if encode(files) == raw else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _hash_of(path: Path) -> str | None:
    try:
        return hash_file(path)
    except OSError:
        return None


def hash_file(path: Path) -> str:
    """Compute the SHA-256 of a file in hexadecimal, reading it in chunks. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
