"""docs/vllm.md: what vLLM makes of every way to give it a checkpoint, with and without fewbit's plugin.

    python tests/engines/vllm_formats.py --python V/bin/python     measures; writes vllm_formats.json and the page
    python tests/engines/vllm_formats.py                           writes the page from the record

runs in fewbit's environment; V is vLLM's, with fewbit installed (read_vllm_cpu.py, read_vllm_fewbit.py). The
checkpoints are those of `cells`; outcomes are those of `measure`, and ``not written`` where `fewbit export` refuses.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cells import VARIATIONS, Cell
from measure import ask, checkpoint, outcome

import fewbit
from fewbit.errors import CheckpointError

HERE = Path(__file__).parent
RECORD = HERE / "vllm_formats.json"
PAGE = HERE.parents[1] / "docs" / "vllm.md"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
_ALIKE, _SHOWN = 40, 160  # characters of a reason
EXPORTS = ("compressed-tensors", "awq", "auto-round")
# Column → (engine, export or None for the checkpoint itself).
WAYS = {
    "the checkpoint": ("vllm-cpu", None),
    "the checkpoint, with the plugin": ("vllm-fewbit", None),
    **{f"--to {target}": ("vllm-cpu", target) for target in EXPORTS},
}
CELLS = (
    *(Cell(bits=bits, sym=sym) for bits in (2, 3, 4, 8) for sym in (True, False)),
    *(Cell(group_size=group_size) for group_size in (32, 64, -1)),
    Cell(act_order="full"),
    Cell(format="gptq_v2", sym=False),
    *VARIATIONS,
)


def measure(python: str, work: Path) -> dict[str, Any]:
    """The record: versions, and for each cell an outcome for each way."""
    cells = {label(cell): {} for cell in CELLS}
    versions: dict[str, str] = {}
    for way, (engine, target) in WAYS.items():
        folders, sources = {}, {}
        for cell in CELLS:
            sources[label(cell)] = checkpoint(cell, work)
            written = exported(sources[label(cell)], target)
            if isinstance(written, str):
                cells[label(cell)][way] = {"outcome": "not written", "reason": written}
            else:
                folders[label(cell)] = written
        versions, answers = ask(engine, python, list(folders.values()), work)
        (work / f"{engine}.jsonl").unlink()
        for name, answer in zip(folders, answers, strict=True):
            cells[name][way] = outcome(engine, sources[name], answer)
    return {"versions": versions, "fewbit": fewbit.__version__, "cells": cells}


def exported(source: Path, target: str | None) -> Path | str:
    """The folder to serve, or why it cannot be written."""
    if target is None:
        return source
    folder = source.with_name(f"{source.name}-{target}")
    if not folder.exists():
        try:
            fewbit.export(source, folder, target)
        except CheckpointError as error:
            return str(error).replace(str(source), "the checkpoint")
    return folder


def label(cell: Cell) -> str:
    """As the table calls it."""
    grid = "symmetric" if cell.sym else "asymmetric"
    rows = "one group per row" if cell.group_size == -1 else f"groups of {cell.group_size}"
    extra = [
        cell.variation,
        "act-order full" if cell.act_order == "full" else "",
        "gptq_v2" if cell.format == "gptq_v2" else "",
    ]
    return ", ".join([f"{cell.bits} bits", grid, rows, *filter(None, extra)])


def table(record: Mapping[str, Any]) -> str:
    """The measured part of the page."""
    return "\n".join(_lines(record)) + "\n"


def _lines(record: Mapping[str, Any]) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    yield f"{versions}, fewbit {record['fewbit']}, one thread of a CPU, float16."
    yield ""
    yield f"| | {' | '.join(WAYS)} |"
    yield "|---" * (len(WAYS) + 1) + "|"
    notes: dict[str, str] = {}
    for name, ways in record["cells"].items():
        yield f"| {name} | {' | '.join(_field(ways[way], notes) for way in WAYS)} |"
    yield ""
    for number, note in enumerate(notes.values(), 1):
        yield f"{number}. {note}"


def _field(found: Mapping[str, Any], notes: dict[str, str]) -> str:
    """One cell of the table. Reasons become numbered notes: one, with its first example, for those that begin alike."""
    if found["outcome"] == "reads":
        return "yes"
    if found["outcome"] == "misreads":
        return f"**wrong**, KL {found['kl']:g}"
    # The counts and layers before the reason differ from cell to cell.
    text = re.sub(r"^.*cannot hold this checkpoint: (\d+ of \d+ layers: )?", "", found["reason"])
    text = text.removesuffix(". Target dense can").replace("`", "").replace("|", "/")
    who = "vLLM refuses" if found["outcome"] == "refuses" else "`fewbit export` refuses"
    key = who + re.sub(r"\d+|True|False", "", text)[:_ALIKE]
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]} …"
    notes.setdefault(key, f"{who}, for example: `{shown}`")
    return f"no ({list(notes).index(key) + 1})"


def page_with(text: str, record: Mapping[str, Any]) -> str:
    """The page with its measured part replaced."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table(record)}\n{END}{tail}"


def main() -> None:
    """Measure if there is a vLLM, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", help="of vLLM's environment")
    parser.add_argument("--work", type=Path, help="folder for checkpoints and logs, kept")
    arguments = parser.parse_args()
    if arguments.python:
        with tempfile.TemporaryDirectory() as temporary:
            work = arguments.work or Path(temporary)
            work.mkdir(parents=True, exist_ok=True)
            RECORD.write_text(
                json.dumps(measure(arguments.python, work), indent=1, ensure_ascii=False) + "\n"
            )
    PAGE.write_text(page_with(PAGE.read_text(), json.loads(RECORD.read_text())))


if __name__ == "__main__":
    main()
