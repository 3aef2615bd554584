"""Where text comes from: one function turns whatever the user names into a `Corpus` or `Sequences`.

`open_source` reads lazily and knows nothing of windows, batches or models. Files are UTF-8.
A corpus is running text, to be cut into windows later; sequences are items that the user has already
cut (a Python list, or rows with ``input_ids``), each of which stays one sequence.
"""

from __future__ import annotations

import importlib
import io
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CalibrationError, DependencyError

NAMED = ("wikitext2", "c4", "c4-new")
RETIRED = ("ptb", "ptb-new")
SUFFIXES = (".txt", ".jsonl", ".parquet")
STDIN = "-"

# C4 is shuffled: its first documents are a fair sample, and streaming them spares a download of 300 MB.
_C4_DOCUMENTS = 20_000
_C4_EVALUATION_DOCUMENTS = 1100
_READ_CHARACTERS = 1 << 16
_FIELDS = ("input_ids", "messages", "text")


class RetiredDatasetError(CalibrationError, RuntimeError):
    """A data set that older tools offered and that can no longer be loaded."""


@dataclass(frozen=True)
class Corpus:
    """Running text. `pieces` concatenate to the whole text; they can be read once."""

    label: str
    pieces: Iterator[str]


@dataclass(frozen=True)
class Sequences:
    """Items that are one sequence each: strings, token dicts, or bare token ids. They can be read once."""

    label: str
    items: Iterator[Any]


def open_source(dataset: Any, tokenizer: Any = None, *, split: str = "train") -> Corpus | Sequences:
    """Find out what `dataset` is and open it.

    Args:
        dataset: a named set (`NAMED`), a path to a .txt, .jsonl or .parquet file, ``"-"`` for standard
            input, a list (or other iterable) of strings or token dicts, or a `datasets.Dataset`.
            Rows hold ``input_ids`` (each row is one sequence), ``messages`` (a chat, rendered with
            the tokenizer's chat template) or ``text``.
        tokenizer: needed for ``messages`` only.
        split: of a named set: "train" or "test".

    Raises:
        CalibrationError: there is no such data set, or it cannot be read.
        RetiredDatasetError: ptb or ptb-new.
        DependencyError: an optional package is missing.
    """
    if dataset is None:
        raise CalibrationError(
            "no dataset given: pass a list of texts, a .txt, .jsonl or .parquet file, "
            f"or one of {', '.join(NAMED)}"
        )
    if isinstance(dataset, str) and dataset in RETIRED:
        raise RetiredDatasetError(
            f"the dataset {dataset!r} is no longer supported: its files are not hosted any more. "
            f"Use one of {', '.join(NAMED)}, or a text file"
        )
    if isinstance(dataset, str) and dataset in NAMED:
        return _open_named(dataset, split)
    if isinstance(dataset, str) and dataset == STDIN:
        return Corpus("standard input", _read_stream(sys.stdin.buffer, "standard input"))
    if isinstance(dataset, (str, Path)):
        return _open_file(dataset, tokenizer)
    if hasattr(dataset, "column_names"):
        return _open_hub_dataset(dataset, tokenizer)
    if isinstance(dataset, (set, frozenset)):
        raise CalibrationError(
            "a set has another order in every run: pass a list, for example sorted(dataset)"
        )
    if isinstance(dataset, Iterable) and not isinstance(dataset, (bytes, Mapping)):
        return Sequences("a list of sequences", iter(dataset))
    raise CalibrationError(
        f"cannot read a dataset of type {type(dataset).__name__}: pass a list of strings or token dicts, "
        "a datasets.Dataset, a file or the name of a known set"
    )


def _open_file(dataset: str | Path, tokenizer: Any) -> Corpus | Sequences:
    path = Path(dataset)
    shown = str(dataset) if len(str(dataset)) <= 80 else str(dataset)[:77] + "..."
    if not os.path.exists(dataset):  # unlike Path.exists, also false for a text too long for a name
        raise CalibrationError(
            f"there is no dataset {shown!r}: not a file here, and not one of the known names "
            f"({', '.join(NAMED)}). If this is the text itself, pass it in a list"
        )
    if path.is_dir() or path.suffix not in SUFFIXES:
        kind = "a folder" if path.is_dir() else f"a file with the suffix {path.suffix!r}"
        raise CalibrationError(f"{shown!r} is {kind}; a dataset must be a file in {', '.join(SUFFIXES)}")
    if path.suffix == ".txt":
        return Corpus(path.name, _read_file(path))
    if path.suffix == ".jsonl":
        return _from_rows(path.name, _read_jsonl(path), tokenizer)
    return _from_rows(path.name, _read_parquet(path), tokenizer)


def _read_file(path: Path) -> Iterator[str]:
    with path.open("rb") as stream:
        yield from _read_stream(stream, path.name)


def _read_stream(stream: Any, label: str) -> Iterator[str]:
    reader = io.TextIOWrapper(stream, encoding="utf-8", newline=None)
    try:
        while piece := reader.read(_READ_CHARACTERS):
            yield piece
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{label} is not UTF-8 text ({error.reason}): convert it first") from error
    finally:
        reader.detach()


def _read_jsonl(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # malformed JSON or malformed UTF-8
                raise CalibrationError(f"{path.name}, line {number}, is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise CalibrationError(
                    f"{path.name}, line {number}, holds a {type(row).__name__}; every line must be an object"
                )
            yield row


def _read_parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    pyarrow = _optional("pyarrow")
    parquet = _optional("pyarrow.parquet")
    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise CalibrationError(f"{path.name} is not a parquet file: {error}") from error
    with file:
        columns = [name for name in file.schema_arrow.names if name in _FIELDS or name == "attention_mask"]
        if not columns:
            raise _no_field(path.name, file.schema_arrow.names)
        for batch in file.iter_batches(columns=columns, batch_size=1024):
            yield from batch.to_pylist()


def _open_hub_dataset(dataset: Any, tokenizer: Any) -> Corpus | Sequences:
    columns = dataset.column_names
    if isinstance(columns, Mapping):
        raise CalibrationError(
            f"the dataset has several splits ({', '.join(columns)}): pass one, as in dataset['train']"
        )
    return _from_rows(f"a {type(dataset).__name__}", iter(dataset), tokenizer)


def _open_named(name: str, split: str) -> Corpus:
    datasets = _optional("datasets")
    # The usual joins: "\n\n" between the rows, except for the evaluation text called c4-new.
    separator = " " if (name, split) == ("c4-new", "test") else "\n\n"
    return Corpus(name, joined(_hub_texts(datasets, name, split), separator))


def _hub_texts(datasets: Any, name: str, split: str) -> Iterator[str]:
    try:
        for row in _hub_rows(datasets, name, split):
            yield row["text"]
    except (OSError, ValueError) as error:  # streaming reads the network at every step
        raise CalibrationError(
            f"the dataset {name!r} could not be loaded from the Hugging Face Hub ({error}). "
            "Check the connection, or pass a local .txt, .jsonl or .parquet file"
        ) from error


def _hub_rows(datasets: Any, name: str, split: str) -> Iterable[Any]:
    if name == "wikitext2":
        rows: Iterable[Any] = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
        return rows
    shard, limit = {
        "train": ("train.00000-of-01024", _C4_DOCUMENTS),
        "test": ("validation.00000-of-00008", _C4_EVALUATION_DOCUMENTS),
    }[split]
    files = {split: f"en/c4-{shard}.json.gz"}
    rows = datasets.load_dataset("allenai/c4", data_files=files, split=split, streaming=True)
    return itertools.islice(rows, limit)


def _from_rows(label: str, rows: Iterator[Mapping[str, Any]], tokenizer: Any) -> Corpus | Sequences:
    first = next(rows, None)
    if first is None:
        raise CalibrationError(f"{label} is empty: it has no rows")
    rows = itertools.chain([first], rows)
    field = next((name for name in _FIELDS if name in first), None)
    if field is None:
        raise _no_field(label, first)
    if field == "input_ids":
        return Sequences(label, rows)
    values = _column(label, rows, field, str if field == "text" else list)
    if field == "text":
        return Corpus(label, joined(values, "\n\n"))
    if getattr(tokenizer, "chat_template", None) is None:
        raise CalibrationError(
            f"{label} holds chats (messages), but the tokenizer has no chat template: "
            "set tokenizer.chat_template, or use a file with a text field"
        )
    chats = (tokenizer.apply_chat_template(messages, tokenize=False) for messages in values)
    return Corpus(label, joined(chats, ""))


def _column(label: str, rows: Iterator[Mapping[str, Any]], field: str, kind: type) -> Iterator[Any]:
    for number, row in enumerate(rows, start=1):
        value = row.get(field)
        if not isinstance(value, kind):
            raise CalibrationError(
                f"{label}, row {number}: {field!r} is {type(value).__name__}, not {kind.__name__}; "
                "all rows must have the same field"
            )
        yield value


def joined(texts: Iterable[str], separator: str) -> Iterator[str]:
    """The pieces of ``separator.join(texts)``, without holding the whole."""
    for index, text in enumerate(texts):
        if index:
            yield separator
        yield text


def _no_field(label: str, columns: Iterable[str]) -> CalibrationError:
    return CalibrationError(
        f"{label} has none of the fields {', '.join(_FIELDS)}; "
        f"it has {', '.join(map(repr, columns)) or 'none'}. Rename the one with the text to 'text'"
    )


def _optional(module: str) -> Any:
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DependencyError(f"this dataset needs the package {package}: pip install {package}") from error
