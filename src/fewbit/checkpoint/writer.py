"""Writing a checkpoint so that a half-written one cannot be taken for a whole one.

Names, dtypes and shapes of all tensors are known before the first one is written. So the tensors are divided into
shards at the start, and each shard file begins with its header; `add` writes a tensor at its offset. Memory
holds one tensor, whatever the shard size. Shards have temporary names until `finish`, which then writes the other
files, the manifest and, last, config.json: a folder that has one is complete. Every file is synced before it is
renamed. The same tensors and settings give the same bytes.

While a folder is unfinished it holds the file `MARKER`. A new writer removes what an interrupted writer left, and no
other files.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..atomic_io import TEMPORARY_SUFFIX, sync_file, sync_folder, temporary_path, write_whole
from ..errors import CheckpointError, ConfigError, OutputError
from . import manifest
from .layout import Shaped
from .manifest import FileHash
from .safetensors_file import DTYPE_NAMES, encode_header

CONFIG = "config.json"
QUANTIZE_CONFIG = "quantize_config.json"
REPORT_NAME = "fewbit_report.json"
PAGE_NAME = "fewbit_report.html"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MARKER = ".fewbit-incomplete"

_SHARD_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_RESERVED = {CONFIG, QUANTIZE_CONFIG, INDEX, SINGLE, MARKER, manifest.NAME}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
# Keys that transformers 5 moved from the top of config.json into ``rope_parameters``.
_MOVED_ROPE_KEYS = ("rope_theta", "partial_rotary_factor")


@dataclass
class _Shard:
    """One weight file.

    Attributes:
        name: Its final name.
        size: Bytes of the whole file.
        header: Header, the first bytes of the file.
        starts: Offset of each tensor's first byte in the file, by the tensor's name.
        missing: Names of the tensors that are not written yet.
        file: The open file under its temporary name; None before the first tensor and after the last one.
        hash: Size and SHA-256 of the file, once it is complete.
    """

    name: str
    size: int
    header: bytes
    starts: dict[str, int]
    missing: set[str] = field(default_factory=set)
    file: BinaryIO | None = None
    hash: FileHash | None = None


class CheckpointWriter:
    """Writes tensors into a checkpoint folder. Use it in a ``with`` block: an error removes the temporary files.

    Args:
        folder: Created if it is missing. It may hold other files, but no config.json and no weights.
        tensors: Dtype and shape of every tensor by name, in the order of the checkpoint.
        max_shard_size: Bytes, or a text such as "5GB" (10^9) or "512MiB". A larger tensor gets its own shard.
        metadata: ``format`` in the header of each file.

    Raises:
        ConfigError: The shard size cannot be read.
        CheckpointError: Safetensors files cannot hold a dtype.
        OutputError: The folder holds a finished checkpoint or other weights, or cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, Shaped],
        max_shard_size: int | str = "5GB",
        *,
        metadata: str = "pt",
    ) -> None:
        self.folder = Path(folder)
        self._tensors = tensors
        for name, tensor in tensors.items():
            if tensor.dtype not in DTYPE_NAMES:
                raise CheckpointError(f"tensor {name} is {tensor.dtype}, which safetensors files cannot hold")
        self._shards = _divide(tensors, parse_size(max_shard_size), metadata)
        self._shard_of = {name: shard for shard in self._shards for name in shard.starts}
        with _disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._claim()
        for shard in self._shards:
            if not shard.missing:  # a checkpoint without any tensor
                self._open(shard)
                self._complete(shard)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for shard in self._shards:
            if shard.file is not None:
                with suppress(OSError):
                    shard.file.close()
        if kind is not None:
            with suppress(OSError):  # the first error is the one to report
                self._remove_temporaries()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of any device and layout; it is not kept.

        Raises:
            CheckpointError: The tensor was not announced so, or it was added before.
            OutputError: The disk is full or fails.
        """
        shard, planned = self._shard_of.get(name), self._tensors.get(name)
        if shard is None or planned is None:
            raise CheckpointError(f"tensor {name} was not announced to the writer")
        if name not in shard.missing:
            raise CheckpointError(f"tensor {name} was added twice; tied weights are written once")
        if (tensor.dtype, tuple(tensor.shape)) != (planned.dtype, tuple(planned.shape)):
            raise CheckpointError(
                f"tensor {name} is {tensor.dtype} {tuple(tensor.shape)}; "
                f"{planned.dtype} {tuple(planned.shape)} was announced to the writer"
            )
        file = shard.file or self._open(shard)
        with _disk_errors(self.folder / shard.name, tensor.nbytes):
            file.seek(shard.starts[name])
            file.write(_bytes_of(tensor))
        shard.missing.remove(name)
        if not shard.missing:
            self._complete(shard)

    def finish(
        self,
        config: Mapping[str, Any],
        quantization: Mapping[str, Any],
        extra_files: Mapping[str, bytes | Path] | None = None,
    ) -> None:
        """Complete a GPTQ checkpoint, once all tensors are added.

        Args:
            config: The model's configuration. ``quantization_config`` in it is replaced, and keys of older versions of
                transformers are added (`with_legacy_keys`).
            quantization: From `quantization_config.build`; also written as quantize_config.json.
            extra_files: Tokenizer and so on: name in the folder → content, or the file to copy.

        Raises:
            CheckpointError: A tensor is missing.
            OutputError: The disk is full or fails, or an extra file has a reserved name.
        """
        described = {**with_legacy_keys(config), "quantization_config": dict(quantization)}
        self.finish_as(described, extra_files, {QUANTIZE_CONFIG: _json(dict(quantization))})

    def finish_as(
        self,
        config: Mapping[str, Any],
        extra_files: Mapping[str, bytes | Path] | None = None,
        own_files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Complete a folder whose config.json is `config` as it is.

        Args:
            config: The content of config.json.
            extra_files: As in `finish`.
            own_files: Other files of the format, by their names, which may be reserved ones.

        Raises:
            CheckpointError: A tensor is missing.
            OutputError: The disk is full or fails, or an extra file has a reserved name.
        """
        self._check_names(extra_files or {})
        missing = [name for shard in self._shards for name in shard.missing]
        if missing:
            raise CheckpointError(f"{len(missing)} tensors were not written, for example {missing[0]}")
        hashes = self._rename_shards()
        for name, content in (extra_files or {}).items():
            hashes[name] = self._write_extra(name, content)
        written = {**(own_files or {}), CONFIG: _json(dict(config))}
        hashes |= {name: manifest.hash_bytes(content) for name, content in written.items()}
        self._write(manifest.NAME, manifest.encode(hashes))
        for name, content in written.items():  # config.json last: a folder that has one is complete
            self._write(name, content)
        with _disk_errors(self.folder):
            (self.folder / MARKER).unlink()

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
        for path in self.folder.glob(f".*{TEMPORARY_SUFFIX}"):
            path.unlink(missing_ok=True)

    def _temporary(self, shard: _Shard) -> Path:
        return temporary_path(self.folder / shard.name)

    def _open(self, shard: _Shard) -> BinaryIO:
        path = self._temporary(shard)
        with _disk_errors(self.folder / shard.name, shard.size):
            shard.file = path.open("xb")
            shard.file.write(shard.header)
        return shard.file

    def _complete(self, shard: _Shard) -> None:
        assert shard.file is not None
        with _disk_errors(self.folder / shard.name):
            sync_file(shard.file)
            shard.file.close()
            shard.hash = FileHash(shard.size, manifest.hash_file(self._temporary(shard)))
        shard.file = None

    def _rename_shards(self) -> dict[str, FileHash]:
        """Give the shards their final names; write the index if there are several."""
        hashes: dict[str, FileHash] = {}
        for shard in self._shards:
            assert shard.hash is not None
            with _disk_errors(self.folder / shard.name):
                os.replace(self._temporary(shard), self.folder / shard.name)
            hashes[shard.name] = shard.hash
        if len(self._shards) > 1:
            total = sum(_nbytes(tensor) for tensor in self._tensors.values())
            weight_map = {name: shard.name for name, shard in sorted(self._shard_of.items())}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            hashes[INDEX] = self._write(INDEX, _json(index))
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
        with _disk_errors(path, len(data)):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, data)
        return manifest.hash_bytes(data)


def refuse_non_empty(output: Path) -> None:
    """Refuse a folder with other content than what an interrupted writer left.

    Raises:
        OutputError: it is a file, or not empty.
    """
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file; give a folder")
    if output.is_dir() and not (output / MARKER).exists() and any(output.iterdir()):
        raise OutputError(f"{output} is not empty; choose another output folder")


def is_written(folder: Path) -> bool:
    """Whether a writer has finished the checkpoint in `folder`, even if it was killed right afterwards.

    Raises:
        OutputError: files of the finished checkpoint are damaged.
    """
    if not (folder / CONFIG).exists():
        return False
    manifest.require(folder)
    (folder / MARKER).unlink(missing_ok=True)
    return True


def _divide(tensors: Mapping[str, Shaped], limit: int, metadata: str) -> list[_Shard]:
    """Fill one shard after the other with tensors in their order, up to `limit` bytes each."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + _nbytes(tensor) > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += _nbytes(tensor)
    count = len(groups)
    names = (
        [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    )
    return [
        _shard(name, {key: tensors[key] for key in group}, metadata)
        for name, group in zip(names, groups, strict=True)
    ]


def _shard(name: str, tensors: Mapping[str, Shaped], metadata: str) -> _Shard:
    # Widest dtypes first, so that every tensor is aligned although the format allows no gaps.
    order = sorted(tensors, key=lambda key: -tensors[key].dtype.itemsize)
    header = encode_header(((key, tensors[key].dtype, tuple(tensors[key].shape)) for key in order), metadata)
    starts, position = {}, len(header)
    for key in order:
        starts[key] = position
        position += _nbytes(tensors[key])
    return _Shard(name, position, header, starts, set(order))


def with_legacy_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Add the keys of transformers 4 beside ``rope_parameters``, in the parts of a multimodal model too.

    transformers 5 moved ``rope_theta``, ``partial_rotary_factor`` and ``rope_scaling`` from the top of config.json into
    ``rope_parameters``. A reader that finds none of its keys takes a default without a warning and computes something
    else. Newer versions read a file with both like one with ``rope_parameters`` alone.

    Keys that exist are kept. Where each type of layer has its own settings, ``rope_parameters`` is nested; no older key
    can express that, and nothing is added.
    """
    result = {
        key: with_legacy_keys(value) if key.endswith("_config") and isinstance(value, Mapping) else value
        for key, value in config.items()
    }
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        return result
    for key in _MOVED_ROPE_KEYS:
        if rope.get(key) is not None:
            result.setdefault(key, rope[key])
    scaling = {key: value for key, value in rope.items() if key not in _MOVED_ROPE_KEYS}
    if scaling not in ({}, {"rope_type": "default"}):
        result.setdefault("rope_scaling", scaling)
    return result


def parse_size(size: int | str) -> int:
    """Convert "5GB", "512MiB", "1000" or a number to bytes.

    Raises:
        ConfigError: The text is no size, or the size is not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    unit = _UNITS.get(match[2].upper()) if match else None
    value = int(float(match[1]) * unit) if match and unit else 0
    if value < 1:
        raise ConfigError(f"max_shard_size {size!r} is no size; write bytes or for example 5GB or 512MiB")
    return value


def _nbytes(tensor: Shaped) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


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
            free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else None
            message += f", {free:,} are free" if free is not None else ""
        raise OutputError(f"{message}. Correct this and run the same command again: it resumes.") from error
