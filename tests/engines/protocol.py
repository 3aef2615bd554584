"""How a engine answers: one JSON line per checkpoint, whether it reads it or not.

    ENGINE-PYTHON tests/engines/read_NAME.py TOKENS.json ANSWERS.jsonl CHECKPOINT [CHECKPOINT …]

The scripts ``read_*.py`` run in an environment of the engine's own and import nothing of fewbit. TOKENS.json is a list
of token ids. The first line of the answers gives the versions; each further one is about one checkpoint, in order:
``logits``, (positions, vocabulary), a row for each token, or ``refusal``, what the engine raised. A engine that dies
leaves its last line out: whoever called it goes on with the next checkpoint.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

Read = Callable[[str, "list[int]"], "list[list[float]]"]


def answer(read: Read, *packages: str) -> None:
    """Read the command line, call ``read(checkpoint, tokens)`` for every checkpoint, write the answers.

    Args:
        read: returns one row of logits, or of logarithms of probabilities, per token; it may leave out the last.
        packages: whose versions are noted.
    """
    tokens_file, answers, *checkpoints = sys.argv[1:]
    tokens = json.loads(Path(tokens_file).read_text())
    with open(answers, "w", encoding="utf-8") as file:
        versions = {name: importlib.metadata.version(name) for name in packages}
        print(json.dumps({"versions": versions}), file=file, flush=True)
        for checkpoint in checkpoints:
            line: dict[str, Any] = {"checkpoint": checkpoint}
            start = time.perf_counter()
            with _Refusals(line):
                line["logits"] = read(checkpoint, tokens)
            line["seconds"] = time.perf_counter() - start
            print(json.dumps(line), file=file, flush=True)
            gc.collect()


class _Refusals:
    """Whatever error is raised inside is an answer too: it goes into `line`, and its traceback to the screen."""

    def __init__(self, line: dict[str, Any]) -> None:
        self._line = line

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if kind is None or not issubclass(kind, Exception):
            return False
        traceback.print_exception(kind, error, trace)
        self._line["refusal"] = f"{kind.__name__}: {error}"
        return True
