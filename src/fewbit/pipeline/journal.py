"""The journal: finished blocks on disk, so that a killed run can be resumed.

``OUT/.fewbit/`` holds ``run.json`` and one safetensors file for each finished block. ``run.json`` is written once. It
has the fingerprint of everything that decides the result (config, data, source weights); a journal with another
fingerprint is refused. A block's file has the final tensors of its layers, and in its metadata the hash of the
fingerprint and the records of the layers. Every file is written under a temporary name, synced and renamed.

A block file name has its number and the SHA-256 of its bytes. A file whose bytes do not match its name, or that
belongs to a run with another fingerprint, leaves its block unfinished: the file is deleted, and the block is solved
again, to the same bytes. Hashes guard against accidents, not against somebody who can write to the folder.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..atomic_io import TEMPORARY_SUFFIX, write_whole
from ..checkpoint.manifest import hash_file
from ..errors import FewbitError, OutputError, ResumeError

FOLDER = ".fewbit"

_RUN, _LOCK = "run.json", "lock"
_OLD_JOURNAL = "journal"  # of fewbit versions with a line for each block
_BLOCK_NAME = re.compile(r"block-(\d{5,})-([0-9a-f]{64})\.safetensors")
_METADATA = "fewbit"
# Part of the fingerprint: a journal of another form is refused.
_FORM = {"form of the journal": "3"}
_LARGEST_RUN = 1 << 20  # bytes; a fingerprint has less than a thousand


class Journal:
    """Finished blocks of one output folder, held by one process.

    Attributes:
        output: The output folder.
        folder: The journal's folder in it.
        records: Layer name → what was written about the layer (plain JSON types), for finished layers.
        notes: Sentences about damaged parts that will be done again.
    """

    def __init__(self, output: Path, fingerprint: Mapping[str, str], resume: bool = True) -> None:
        """Open or start the journal of `output`.

        Raises:
            OutputError: The folder holds something that is not an interrupted run of fewbit, another process is writing
                to it, or it cannot be written.
            ResumeError: The interrupted run had another fingerprint, its journal cannot be used, or `resume` is False.
        """
        self.output = output
        self.folder = output / FOLDER
        self.records: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []
        self._files: dict[str, Path] = {}
        self._next_number = 0
        self._fingerprint = {**fingerprint, **_FORM}
        self._run = _hash(json.dumps(self._fingerprint, sort_keys=True))
        check_output(output)
        self._lock = _locked(self.folder)
        with ExitStack() as undo:
            undo.callback(self._lock.release)
            # Checked again: another run may have begun or ended here before the lock was acquired.
            self._start(check_output(output), resume)
            undo.pop_all()

    def tensors(self, layer: str) -> dict[str, Tensor]:
        """Read the tensors of a finished layer, by their short names (``qweight`` …).

        Raises:
            OutputError: The block's file was changed or removed during the run.
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
        """Write one finished block.

        Args:
            block: Name of the block.
            tensors: Layer → its tensors by their short names.
            records: Layer → its record.

        Raises:
            OutputError: The disk is full or cannot be written.
        """
        flat = {f"{layer}.{key}": tensor for layer, parts in tensors.items() for key, tensor in parts.items()}
        about = json.dumps({"run": self._run, "block": block, "layers": records})
        data = safetensors.torch.save(flat, metadata={_METADATA: about})
        sha256 = hashlib.sha256(data).hexdigest()
        path = self.folder / f"block-{self._next_number:05d}-{sha256}.safetensors"
        with _write_errors(path, len(data)):
            write_whole(path, data)
        self._next_number += 1
        self._take(path, records)

    def close(self) -> None:
        """Release the folder; the journal stays and can be resumed."""
        self._lock.release()

    def remove(self) -> None:
        """Delete the journal: the checkpoint is complete.

        Raises:
            OutputError: It cannot be deleted.
        """
        try:
            # run.json last: until then the folder is recognized as fewbit's own.
            for path in sorted(self.folder.iterdir(), key=lambda path: path.name == _RUN):
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

    def _take(self, path: Path, records: Mapping[str, Any]) -> None:
        for layer, record in records.items():
            self.records[layer] = dict(record)
            self._files[layer] = path

    def _start(self, existing: bool, resume: bool) -> None:
        path = self.folder / _RUN
        if existing and not resume:
            raise ResumeError(
                f"{self.output} holds an interrupted run and resuming is switched off (--no-resume): "
                f"delete {self.folder} to start again, or leave --no-resume out to go on"
            )
        try:
            known = existing and self._check_fingerprint(path)
            files = sorted(self.folder.glob("block-*.safetensors"))
            blocks = {file: self._read_block(file) for file in files} if existing else {}
            if existing and not known:
                if files and not any(blocks.values()):
                    raise self._unusable(
                        "its run.json is damaged and no block belongs to a run with these inputs"
                    )
                self.notes.append("the journal's run.json is damaged: it was written again")
            for file in files:
                block = blocks.get(file)
                if block is not None:
                    self._take(file, block["layers"])
                    continue
                if existing:
                    self.notes.append(f"the journal's file {file.name} is damaged: its block is done again")
                file.unlink()
            for temporary in self.folder.glob(f".*{TEMPORARY_SUFFIX}"):
                temporary.unlink()
            numbers = [int(match[1]) for file in files if (match := _BLOCK_NAME.fullmatch(file.name))]
            self._next_number = max(numbers, default=-1) + 1
            if not known:
                text = json.dumps(self._fingerprint)
                write_whole(
                    path, json.dumps({"fingerprint": self._fingerprint, "sha256": _hash(text)}).encode()
                )
        except FewbitError:
            raise
        except OSError as error:
            raise OutputError(
                f"cannot use {path}: {error.strerror}. Make room, or make it accessible, and run the same command again"
            ) from error

    def _check_fingerprint(self, path: Path) -> bool:
        """Return True if run.json has this run's fingerprint, False if it is damaged.

        Raises:
            ResumeError: It has another fingerprint.
        """
        size = path.stat().st_size
        if size > _LARGEST_RUN:
            raise self._unusable(f"{size:,} bytes are more than fewbit writes")
        try:
            values = json.loads(path.read_bytes())
            before = values["fingerprint"]
            if values["sha256"] != _hash(json.dumps(before)):
                return False
        except (ValueError, KeyError, TypeError, RecursionError):
            return False
        if not isinstance(before, dict):
            raise self._unusable("its run.json has no fingerprint")
        keys = dict.fromkeys([*self._fingerprint, *before])
        changed = [key for key in keys if before.get(key) != self._fingerprint.get(key)]
        if changed:
            raise ResumeError(
                f"{self.output} holds an interrupted run made with another {' and another '.join(changed)}. "
                f"Use the same inputs to go on, choose another folder, or delete {self.folder} to start again."
            )
        return True

    def _read_block(self, path: Path) -> dict[str, Any] | None:
        """Read what a block's file says about its block; None if it is damaged or belongs to another run."""
        match = _BLOCK_NAME.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_file() or hash_file(path) != match[2]:
            return None
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()[_METADATA])
            whole = about["run"] == self._run and all(isinstance(r, dict) for r in about["layers"].values())
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        return about if whole else None

    def _unusable(self, reason: str) -> ResumeError:
        return ResumeError(
            f"the journal in {self.folder} cannot be used: {reason}. Delete {self.folder} to start again, "
            "or choose another output folder"
        )


def check_output(output: Path) -> bool:
    """Return True if `output` holds an interrupted run; False if it is missing or empty.

    Raises:
        OutputError: The path is a file, cannot be read, or holds anything else.
        ResumeError: The interrupted run is of an older version of fewbit.
    """
    folder = output / FOLDER
    try:
        if not output.exists():
            return False
        if not output.is_dir():
            raise OutputError(f"{output} is a file; give a folder that is empty or does not exist")
        links = [str(path) for path in (folder, folder / _RUN, folder / _OLD_JOURNAL) if path.is_symlink()]
        if links:
            raise OutputError(f"{links[0]} is a link; fewbit follows none there. Remove it and start again")
        if (folder / _RUN).is_file():
            return True
        if (folder / _OLD_JOURNAL).is_file():
            raise ResumeError(
                f"{output} holds an interrupted run made with another form of the journal, of an older version of "
                f"fewbit. Choose another folder, or delete {folder} to start again."
            )
        others = sorted(path.name for path in output.iterdir() if path.name != FOLDER)
    except FewbitError:
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
    """Lock the journal in `folder`. The system releases the lock when the process dies."""
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


@contextmanager
def _write_errors(path: Path, size: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {path} ({size:,} bytes): {error.strerror}. Finished blocks are safe: "
            "make room and run the same command again to go on."
        ) from error


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
