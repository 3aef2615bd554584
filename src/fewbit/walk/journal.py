"""The journal: finished blocks on disk, so that a killed run goes on where it stopped.

``OUT/.fewbit/`` holds ``journal``, append-only lines of the form ``CHECKSUM JSON``, and one
safetensors file per finished block with the final tensors of its layers. The first line is the
fingerprint of everything that decides the result (config, data, source weights); a journal with
another fingerprint is refused. A block counts once its line is on disk, and the line is written after
the block's file. A damaged line or file makes its block unfinished: it is solved again, to the same
bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors.torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from torch import Tensor

from ..errors import OutputError, ResumeError

FOLDER = ".fewbit"


class Journal:
    """The finished blocks of one output folder, held by one process.

    Attributes:
        records: layer name → what was written about it (plain JSON types), for finished layers.
        notes: damaged parts that were found and will be done again.
    """

    def __init__(self, output: Path, fingerprint: Mapping[str, str], resume: bool = True) -> None:
        """Open or start the journal of `output`.

        Raises:
            OutputError: the folder holds something that is not an interrupted run of fewbit, or another
                process is writing to it.
            ResumeError: the interrupted run had another fingerprint, or `resume` is False.
        """
        self.output = output
        self.folder = output / FOLDER
        self.records: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []
        self._files: dict[str, Path] = {}
        self._fingerprint = dict(fingerprint)
        existing = check_output(output)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot create {self.folder}: {error.strerror}") from error
        self._lock = FileLock(self.folder / "lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise OutputError(
                f"another fewbit process is writing to {output}; wait for it or choose another folder"
            ) from error
        with ExitStack() as undo:
            undo.callback(self._lock.release)
            self._start(existing, resume)
            undo.pop_all()

    def tensors(self, layer: str) -> dict[str, Tensor]:
        """The stored tensors of a finished layer, by their short names (``qweight`` …)."""
        with safe_open(self._files[layer], framework="pt") as file:
            prefix = layer + "."
            return {
                key[len(prefix) :]: file.get_tensor(key)
                for key in file.keys()  # noqa: SIM118 - not a mapping
                if key.startswith(prefix) and "." not in key[len(prefix) :]
            }

    def append(
        self, block: str, tensors: Mapping[str, Mapping[str, Tensor]], records: Mapping[str, Any]
    ) -> None:
        """Write one finished block: layer → its tensors, and layer → its record.

        Raises:
            OutputError: the disk is full or cannot be written.
        """
        path = self.folder / f"block-{hashlib.sha256(block.encode()).hexdigest()[:16]}.safetensors"
        flat = {f"{layer}.{key}": tensor for layer, parts in tensors.items() for key, tensor in parts.items()}
        data = safetensors.torch.save(flat)
        try:
            _write_synced(path, data)
            line = {
                "block": block,
                "file": path.name,
                "sha256": hashlib.sha256(data).hexdigest(),
                "layers": records,
            }
            self._append_line(line)
        except OSError as error:
            raise _cannot_write(error, path, len(data)) from error
        for layer, record in records.items():
            self.records[layer] = dict(record)
            self._files[layer] = path

    def close(self) -> None:
        """Let go of the folder; the journal stays, to be resumed."""
        self._lock.release()

    def remove(self) -> None:
        """Delete the journal: the checkpoint is complete."""
        # The journal file last: until then the folder is recognised as fewbit's own.
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == "journal"):
            if path.name != "lock":
                path.unlink()
        self._lock.release()
        (self.folder / "lock").unlink(missing_ok=True)
        self.folder.rmdir()

    def _start(self, existing: bool, resume: bool) -> None:
        path = self.folder / "journal"
        if not existing:
            self._begin(path)
            return
        if not resume:
            raise ResumeError(
                f"{self.output} holds an interrupted run and resuming is switched off (--no-resume): "
                f"delete {self.folder} to start again, or leave --no-resume out to go on"
            )
        header, *blocks = _read_lines(path)
        if header is None:
            self.notes.append("the journal's first line is damaged: starting again")
            self._begin(path)
            return
        self._compare(header)
        for position, line in enumerate(blocks, start=1):
            if line is None:
                self.notes.append(f"line {position + 1} of the journal is damaged: its block is done again")
            else:
                self._take(line)
        self._repair(path, blocks)

    def _begin(self, path: Path) -> None:
        try:
            _write_synced(path, _format_line({"fingerprint": self._fingerprint}))
        except OSError as error:
            raise _cannot_write(error, path, None) from error

    def _compare(self, header: Mapping[str, Any]) -> None:
        before = header.get("fingerprint", {})
        changed = [key for key, value in self._fingerprint.items() if before.get(key) != value]
        if changed:
            raise ResumeError(
                f"{self.output} holds an interrupted run made with another {' and another '.join(changed)}. "
                f"Use the same inputs to go on, choose another folder, or delete {self.folder} to start again."
            )

    def _take(self, line: Mapping[str, Any]) -> None:
        path = self.folder / line["file"]
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != line["sha256"]:
            self.notes.append(f"the journal's file for {line['block']} is damaged: the block is done again")
            return
        for layer, record in line["layers"].items():
            self.records[layer] = record
            self._files[layer] = path

    def _repair(self, path: Path, blocks: list[dict[str, Any] | None]) -> None:
        """Rewrite the journal without damaged lines, so that the next line starts on a line of its own."""
        lines = [_format_line({"fingerprint": self._fingerprint})]
        lines += [_format_line(line) for line in blocks if line is not None]
        data = b"".join(lines)
        if path.read_bytes() != data:
            try:
                _write_synced(path, data)
            except OSError as error:
                raise _cannot_write(error, path, len(data)) from error

    def _append_line(self, line: Mapping[str, Any]) -> None:
        with open(self.folder / "journal", "ab") as file:
            file.write(_format_line(line))
            file.flush()
            os.fsync(file.fileno())


def check_output(output: Path) -> bool:
    """Whether an interrupted run of fewbit lies in `output`; a missing or empty folder has none.

    Raises:
        OutputError: the path is a file, or holds anything else.
    """
    if not output.exists():
        return False
    if not output.is_dir():
        raise OutputError(f"{output} is a file; give a folder that is empty or does not exist")
    if (output / FOLDER / "journal").is_file():
        return True
    others = sorted(path.name for path in output.iterdir() if path.name != FOLDER)
    if others:
        shown = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
        raise OutputError(
            f"{output} already holds something else ({shown}). Nothing was changed: choose another folder or empty it."
        )
    return False


def _format_line(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(value, sort_keys=True)
    return f"{_checksum(text)} {text}\n".encode()


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_lines(path: Path) -> list[dict[str, Any] | None]:
    """Each line's value; None for a line whose checksum does not match (cut off or changed)."""
    lines: list[dict[str, Any] | None] = []
    for raw in path.read_bytes().splitlines():
        checksum, _, text = raw.decode(errors="replace").partition(" ")
        lines.append(json.loads(text) if checksum == _checksum(text) else None)
    return lines or [None]


def _write_synced(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _cannot_write(error: OSError, path: Path, size: int | None) -> OutputError:
    amount = f" ({size:,} bytes)" if size is not None else ""
    return OutputError(
        f"cannot write {path}{amount}: {error.strerror}. Finished blocks are safe: "
        "make room and run the same command again to go on."
    )
