"""Writing a checkpoint so that nothing half-written can be taken for whole.

`add` streams a tensor's bytes into a spool file, so that memory holds one tensor whatever the shard size.
When a shard is full its safetensors file is written from the spool, hashed on the way, under a temporary
name. `finish` gives the shards their final names, then writes the other files, the manifest and, last of
all, config.json: a folder that has one is complete. Every file is fsynced before it is renamed. The same
tensors and settings give the same bytes.

While a folder is unfinished it holds the file `MARKER`. A new writer removes what an interrupted one left,
but never a file from anyone else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..atomic_io import sync_folder
from ..errors import CheckpointError, ConfigError, OutputError
from . import manifest
from .header import DTYPE_NAMES, encode_header
from .manifest import FileHash
from .model_config import for_older_readers

CONFIG = "config.json"
QUANTIZE_CONFIG = "quantize_config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MARKER = ".fewbit-incomplete"

_SHARD_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_RESERVED = {CONFIG, QUANTIZE_CONFIG, INDEX, SINGLE, MARKER, manifest.NAME}
_TEMPORARY = ".fewbit-tmp"
_CHUNK = 1 << 23
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class _Entry(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


class _Shard(NamedTuple):
    path: Path
    names: tuple[str, ...]
    hash: FileHash


class CheckpointWriter:
    """Streams tensors into a checkpoint folder. Use it in a ``with`` block: an error removes the temporaries.

    Args:
        folder: created if missing. It may hold other files, but no config.json and no weights.
        max_shard_size: bytes, or a text such as "5GB" (10^9) or "512MiB". A larger tensor gets its own shard.

    Raises:
        ConfigError: the shard size cannot be read.
        OutputError: the folder holds a finished checkpoint or somebody's weights, or cannot be written.
    """

    def __init__(self, folder: Path, max_shard_size: int | str = "5GB") -> None:
        self.folder = Path(folder)
        self._limit = parse_size(max_shard_size)
        self._entries: list[_Entry] = []
        self._shards: list[_Shard] = []
        self._names: set[str] = set()
        self._spool: BinaryIO | None = None
        self._spooled = 0
        self._total = 0
        with _disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._claim()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._close_spool()
            return
        with suppress(OSError):  # the first error is the one to report
            self._close_spool()
            self._remove_temporaries()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of any device, layout and safetensors dtype; it is not kept.

        Raises:
            CheckpointError: the name was added before, or safetensors has no such dtype.
            OutputError: the disk is full or fails.
        """
        if name in self._names:
            raise CheckpointError(f"tensor {name} was added twice; tied weights are written once")
        if tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"tensor {name} is {tensor.dtype}, which safetensors files cannot hold")
        nbytes = tensor.numel() * tensor.element_size()
        if self._entries and self._spooled + nbytes > self._limit:
            self._close_shard()
        self._names.add(name)
        with _disk_errors(self._spool_path, nbytes):
            if self._spool is None:
                self._spool = self._spool_path.open("wb")
            if nbytes:
                self._spool.write(_bytes_of(tensor))
        self._entries.append(_Entry(name, tensor.dtype, tuple(tensor.shape), self._spooled, nbytes))
        self._spooled += nbytes

    def finish(
        self,
        config: Mapping[str, Any],
        quantization: Mapping[str, Any],
        extra_files: Mapping[str, bytes | Path] | None = None,
    ) -> None:
        """Complete the checkpoint. Nothing may be added afterwards.

        Args:
            config: the model's configuration; ``quantization_config`` in it is replaced, and keys that older readers
                look for are added (`model_config`).
            quantization: from `quantization.build`; also written as quantize_config.json.
            extra_files: tokenizer and so on: name in the folder → content, or the file to copy.

        Raises:
            OutputError: the disk is full or fails, or an extra file has a reserved name.
        """
        self._check_names(extra_files or {})
        if self._entries or not self._shards:
            self._close_shard()
        hashes = self._place_shards()
        for name, content in (extra_files or {}).items():
            hashes[name] = self._write_extra(name, content)
        quantization_json = _json(dict(quantization))
        config_json = _json({**for_older_readers(config), "quantization_config": dict(quantization)})
        hashes[QUANTIZE_CONFIG] = manifest.hash_bytes(quantization_json)
        hashes[CONFIG] = manifest.hash_bytes(config_json)
        self._write(manifest.NAME, manifest.encode(hashes))
        self._write(QUANTIZE_CONFIG, quantization_json)
        self._write(CONFIG, config_json)
        with _disk_errors(self.folder):
            (self.folder / MARKER).unlink()

    @property
    def _spool_path(self) -> Path:
        return self.folder / f".spool{_TEMPORARY}"

    def _claim(self) -> None:
        """Take the folder, or refuse it; clear what an interrupted writer left."""
        if (self.folder / CONFIG).exists():
            raise OutputError(
                f"{self.folder} already holds a finished checkpoint; choose another output folder"
            )
        weights = sorted(path for path in self.folder.iterdir() if _SHARD_NAME.fullmatch(path.name))
        marker = self.folder / MARKER
        if weights and not marker.exists():
            raise OutputError(
                f"{self.folder} holds {weights[0].name} from something else; choose another output folder"
            )
        for path in weights:
            path.unlink()
        self._remove_temporaries()
        marker.write_text("fewbit has not finished writing this checkpoint.\n")
        sync_folder(self.folder)

    def _remove_temporaries(self) -> None:
        for path in self.folder.glob(f".*{_TEMPORARY}"):
            path.unlink(missing_ok=True)

    def _close_spool(self) -> None:
        if self._spool is not None:
            self._spool.close()
            self._spool = None

    def _close_shard(self) -> None:
        """Turn the spool into a safetensors file under a temporary name."""
        path = self.folder / f".shard-{len(self._shards) + 1:05d}{_TEMPORARY}"
        # Widest dtypes first, so that every tensor is aligned although the format allows no holes.
        entries = sorted(self._entries, key=lambda entry: -entry.dtype.itemsize)
        header = encode_header((entry.name, entry.dtype, entry.shape) for entry in entries)
        digest = hashlib.sha256()
        size = 0
        with _disk_errors(path, len(header) + self._spooled):
            self._close_spool()
            with path.open("wb") as file:
                for chunk in self._shard_bytes(header, entries):
                    file.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
                _sync(file)
            self._spool_path.unlink(missing_ok=True)
        names = tuple(entry.name for entry in entries)
        self._shards.append(_Shard(path, names, FileHash(size, digest.hexdigest())))
        self._total += self._spooled
        self._entries, self._spooled = [], 0

    def _shard_bytes(self, header: bytes, entries: list[_Entry]) -> Iterator[bytes]:
        yield header
        if not self._spooled:
            return
        with self._spool_path.open("rb") as spool:
            for entry in entries:
                spool.seek(entry.start)
                left = entry.nbytes
                while left:
                    chunk = spool.read(min(left, _CHUNK))
                    if not chunk:
                        raise OSError(f"{self._spool_path} is shorter than what was written to it")
                    left -= len(chunk)
                    yield chunk

    def _place_shards(self) -> dict[str, FileHash]:
        """Give the shards their final names; write the index where there are several."""
        count = len(self._shards)
        hashes: dict[str, FileHash] = {}
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(self._shards, start=1):
            name = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            with _disk_errors(self.folder / name):
                os.replace(shard.path, self.folder / name)
            hashes[name] = shard.hash
            weight_map.update(dict.fromkeys(shard.names, name))
        if count > 1:
            index = _json(
                {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
            )
            hashes[INDEX] = self._write(INDEX, index)
        return hashes

    def _check_names(self, extra_files: Mapping[str, object]) -> None:
        for name in extra_files:
            if name in _RESERVED or _SHARD_NAME.fullmatch(name):
                raise OutputError(f"an extra file cannot be called {name}: that is the checkpoint's own file")
            if self.folder.resolve() not in (self.folder / name).resolve().parents:
                raise OutputError(f"extra file {name} would lie outside {self.folder}")

    def _write_extra(self, name: str, content: bytes | Path) -> FileHash:
        if isinstance(content, Path):
            with _disk_errors(content, verb="read"):
                content = content.read_bytes()
        return self._write(name, content)

    def _write(self, name: str, data: bytes) -> FileHash:
        path = self.folder / name
        temporary = self.folder / f".file{_TEMPORARY}"
        with _disk_errors(path, len(data)):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                _sync(file)
            os.replace(temporary, path)
            sync_folder(path.parent)
        return manifest.hash_bytes(data)


def parse_size(size: int | str) -> int:
    """Bytes of "5GB", "512MiB", "1000" or a number.

    Raises:
        ConfigError: the text is no size, or the size is not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    unit = _UNITS.get(match[2].upper()) if match else None
    value = int(float(match[1]) * unit) if match and unit else 0
    if value < 1:
        raise ConfigError(f"max_shard_size {size!r} is no size; write bytes or for example 5GB or 512MiB")
    return value


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _disk_errors(path: Path, needed: int | None = None, verb: str = "write") -> Iterator[None]:
    """Turn an OSError into an OutputError that says where, how much was needed, and what to do."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        message = f"cannot {verb} {path}: {error.strerror or error}"
        if needed is not None:
            message += f"; {needed:,} bytes were needed"
            free = _free_bytes(path.parent)
            message += f", {free:,} are free" if free is not None else ""
        raise OutputError(f"{message}. Correct this and run the same command again: it resumes.") from error


def _free_bytes(folder: Path) -> int | None:
    return shutil.disk_usage(folder).free if folder.is_dir() else None
