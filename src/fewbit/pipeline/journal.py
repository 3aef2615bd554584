"""The journal: finished blocks on disk, so that a killed run goes on where it stopped.

``OUT/.fewbit/`` holds ``journal``, append-only lines of the form ``CHECKSUM JSON``, and one
safetensors file per finished block with the final tensors of its layers. The first line is the
fingerprint of everything that decides the result (config, data, source weights); a journal with
another fingerprint is refused. A block counts once its line is on disk, and the line is written after
the block's file, whose SHA-256 it holds.

The checksum of a block's line covers the fingerprint too: a line from a run with other inputs does not
pass for one of this run, wherever it came from. So lines may be lost, doubled or in any order. A damaged
line or file makes its block unfinished: it is solved again, to the same bytes. A line names no file; the
file's name follows from the block's, so that nothing outside the folder is ever read. Checksums guard
against accidents, not against somebody who can write to the folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..atomic_io import append_synced, write_whole
from ..checkpoint.manifest import hash_file
from ..errors import OutputError, ResumeError

FOLDER = ".fewbit"

_JOURNAL, _LOCK = "journal", "lock"
# Part of the fingerprint: journals of another form are refused, not misread.
_FORM = {"form of the journal": "2"}
# The lines of a model with 61 blocks of 256 experts take less than 30 MB.
_LARGEST = 1 << 28


class Journal:
    """The finished blocks of one output folder, held by one process.

    Attributes:
        records: layer name → what was written about it (plain JSON types), for finished layers.
        notes: damaged parts that were found and will be done again.
    """

    def __init__(self, output: Path, fingerprint: Mapping[str, str], resume: bool = True) -> None:
        """Open or start the journal of `output`.

        Raises:
            OutputError: the folder holds something that is not an interrupted run of fewbit, another
                process is writing to it, or it cannot be written.
            ResumeError: the interrupted run had another fingerprint, its journal is damaged beyond use, or
                `resume` is False.
        """
        self.output = output
        self.folder = output / FOLDER
        self.records: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []
        self._files: dict[str, Path] = {}
        self._fingerprint = {**fingerprint, **_FORM}
        self._run = hashlib.sha256(json.dumps(self._fingerprint, sort_keys=True).encode()).hexdigest()
        check_output(output)
        self._lock = _locked(self.folder)
        with ExitStack() as undo:
            undo.callback(self._lock.release)
            # Looked at again: until the lock was ours another run may have begun or ended here.
            self._start(check_output(output), resume)
            undo.pop_all()

    def tensors(self, layer: str) -> dict[str, Tensor]:
        """The stored tensors of a finished layer, by their short names (``qweight`` …).

        Raises:
            OutputError: the block's file was changed or removed under the running process.
        """
        path, prefix = self._files[layer], layer + "."
        try:
            with safe_open(path, framework="pt") as file:
                return {
                    key[len(prefix) :]: file.get_tensor(key)
                    for key in file.keys()  # noqa: SIM118 - not a mapping
                    if key.startswith(prefix) and "." not in key[len(prefix) :]
                }
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"cannot read {path} back: {error}. Something else changed it; run the same command again and "
                "its block is done again"
            ) from error

    def append(
        self, block: str, tensors: Mapping[str, Mapping[str, Tensor]], records: Mapping[str, Any]
    ) -> None:
        """Write one finished block: layer → its tensors, and layer → its record.

        Raises:
            OutputError: the disk is full or cannot be written.
        """
        path = self._path(block)
        flat = {f"{layer}.{key}": tensor for layer, parts in tensors.items() for key, tensor in parts.items()}
        data = safetensors.torch.save(flat)
        line = {"block": block, "sha256": hashlib.sha256(data).hexdigest(), "layers": records}
        with _write_errors(path, len(data)):
            write_whole(path, data)
            append_synced(self.folder / _JOURNAL, _format_line(line, self._run))
        self._take(path, records)

    def close(self) -> None:
        """Let go of the folder; the journal stays, to be resumed."""
        self._lock.release()

    def remove(self) -> None:
        """Delete the journal: the checkpoint is complete.

        Raises:
            OutputError: it cannot be deleted.
        """
        try:
            # The journal file last: until then the folder is recognised as fewbit's own.
            for path in sorted(self.folder.iterdir(), key=lambda path: path.name == _JOURNAL):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != _LOCK:
                    path.unlink()
            self._lock.release()
            (self.folder / _LOCK).unlink(missing_ok=True)
            with suppress(OSError):  # another process is about to find out that this run has ended
                self.folder.rmdir()
        except OSError as error:
            raise OutputError(
                f"{self.output} is complete, but its journal {self.folder} cannot be deleted: {error.strerror}. "
                "Delete it yourself"
            ) from error

    def _path(self, block: str) -> Path:
        return self.folder / f"block-{hashlib.sha256(block.encode()).hexdigest()[:16]}.safetensors"

    def _take(self, path: Path, records: Mapping[str, Any]) -> None:
        for layer, record in records.items():
            self.records[layer] = dict(record)
            self._files[layer] = path

    def _start(self, existing: bool, resume: bool) -> None:
        path = self.folder / _JOURNAL
        blocks: list[dict[str, Any]] = []
        if existing and not resume:
            raise ResumeError(
                f"{self.output} holds an interrupted run and resuming is switched off (--no-resume): "
                f"delete {self.folder} to start again, or leave --no-resume out to go on"
            )
        try:
            if existing:
                blocks = [line for line in self._read(path).values() if self._resume(line)]
            lines = [_format_line({"fingerprint": self._fingerprint})]
            lines += [_format_line(line, self._run) for line in blocks]
            data = b"".join(lines)
            # Also where a line was cut off: the next one must start on a line of its own.
            if not existing or path.read_bytes() != data:
                write_whole(path, data)
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(
                f"cannot use {path}: {error.strerror}. Make room, or make it accessible, and run the same command again"
            ) from error

    def _read(self, path: Path) -> dict[str, dict[str, Any]]:
        """Block → its line, for every line of this run that is whole; says how many are not."""
        if path.stat().st_size > _LARGEST:
            raise self._unusable(f"{path.stat().st_size:,} bytes are more than fewbit writes")
        blocks: dict[str, dict[str, Any]] = {}
        count = damaged = 0
        with path.open("rb") as file:
            header = _parse_line(file.readline())
            if header is not None:
                self._compare(header)
            for count, raw in enumerate(file, start=1):  # noqa: B007 - the last is the number of lines
                line = _parse_line(raw, self._run)
                if line is not None and _is_block(line):
                    blocks[line["block"]] = line
                else:
                    damaged += 1
        if header is None:
            if damaged and not blocks:
                raise self._unusable(
                    "its first line is damaged and no other belongs to a run with these inputs"
                )
            self.notes.append("the journal's first line is damaged: it was written again")
        if damaged:
            self.notes.append(
                f"{damaged} of {count} blocks in the journal have damaged lines: they are done again"
            )
        return blocks

    def _compare(self, header: Mapping[str, Any]) -> None:
        before = header.get("fingerprint")
        if not isinstance(before, dict):
            raise self._unusable("its first line has no fingerprint")
        keys = dict.fromkeys([*self._fingerprint, *before])
        changed = [key for key in keys if before.get(key) != self._fingerprint.get(key)]
        if changed:
            raise ResumeError(
                f"{self.output} holds an interrupted run made with another {' and another '.join(changed)}. "
                f"Use the same inputs to go on, choose another folder, or delete {self.folder} to start again."
            )

    def _resume(self, line: Mapping[str, Any]) -> bool:
        """Take a block whose file is as it was written."""
        path = self._path(line["block"])
        whole = path.is_file() and hash_file(path) == line["sha256"]
        if whole:
            self._take(path, line["layers"])
        else:
            self.notes.append(f"the journal's file for {line['block']} is damaged: the block is done again")
        return whole

    def _unusable(self, reason: str) -> ResumeError:
        return ResumeError(
            f"the journal in {self.folder} cannot be used: {reason}. Delete {self.folder} to start again, "
            "or choose another output folder"
        )


def check_output(output: Path) -> bool:
    """Whether an interrupted run of fewbit lies in `output`; a missing or empty folder has none.

    Raises:
        OutputError: the path is a file, cannot be read, or holds anything else.
    """
    folder = output / FOLDER
    try:
        if not output.exists():
            return False
        if not output.is_dir():
            raise OutputError(f"{output} is a file; give a folder that is empty or does not exist")
        links = [str(path) for path in (folder, folder / _JOURNAL) if path.is_symlink()]
        if links:
            raise OutputError(f"{links[0]} is a link; fewbit follows none there. Remove it and start again")
        if (folder / _JOURNAL).is_file():
            return True
        others = sorted(path.name for path in output.iterdir() if path.name != FOLDER)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot look into {output}: {error.strerror}; choose another folder") from error
    if others:
        shown = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
        raise OutputError(
            f"{output} already holds something else ({shown}). Nothing was changed: choose another folder or empty it."
        )
    return False


def _locked(folder: Path) -> FileLock:
    """The lock of the journal in `folder`, held. The system lets go of it when the process dies."""
    lock = FileLock(folder / _LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(
            f"another fewbit process is writing to {folder.parent}; wait for it or choose another folder"
        ) from error
    except OSError as error:
        raise OutputError(
            f"cannot create {folder} and lock it: {error.strerror}; choose another folder"
        ) from error
    except NotImplementedError as error:
        raise OutputError(
            f"the file system of {folder} has no locks, so that two runs could mix there; choose another folder"
        ) from error
    return lock


def _is_block(line: Mapping[str, Any]) -> bool:
    layers = line.get("layers")
    return (
        isinstance(line.get("block"), str)
        and isinstance(line.get("sha256"), str)
        and isinstance(layers, dict)
        and all(isinstance(record, dict) for record in layers.values())
    )


def _format_line(value: Mapping[str, Any], run: str = "") -> bytes:
    text = json.dumps(value, sort_keys=True)
    return f"{_checksum(text, run)} {text}\n".encode()


def _checksum(text: str, run: str) -> str:
    return hashlib.sha256((run + text).encode()).hexdigest()[:16]


def _parse_line(raw: bytes, run: str = "") -> dict[str, Any] | None:
    """The JSON object in a line; None where its checksum does not match or it holds anything else."""
    checksum, _, text = raw.decode(errors="replace").rstrip("\n").partition(" ")
    if checksum != _checksum(text, run):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


@contextmanager
def _write_errors(path: Path, size: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {path} ({size:,} bytes): {error.strerror}. Finished blocks are safe: "
            "make room and run the same command again to go on."
        ) from error
