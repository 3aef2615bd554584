"""The results of benchmarks/accuracy.py as Markdown.

`write` puts the tables between the two marks in a file and leaves the rest of it alone. A cell measured
twice counts with its later measurement.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- tables: begin (written by benchmarks/accuracy.py) -->", "<!-- tables: end -->"

PROMPT = "The capital of France is"
_SHOWN = 120  # characters

LABELS = {
    "original": "original",
    "rtn-minmax": "round to nearest, min-max grid",
    "rtn": "round to nearest, fewbit's grid",
    "plain": "plain GPTQ",
    "plain-act-order": "plain GPTQ, act-order",
    "gptqmodel": "GPTQModel 7.7.0",
    "gptqmodel-mse": "GPTQModel 7.7.0, `mse=2.4`",
    "fast": "fewbit `--fast`",
    "fast-order-none": "fewbit `--fast --act-order none`",
    "fast-order-full": "fewbit `--fast --act-order full`",
    "default": "**fewbit**",
    "order-none": "fewbit `--act-order none`",
    "order-full": "fewbit `--act-order full`",
    "tune": "**fewbit `--tune`**",
}

Record = dict[str, Any]


def read(results: Path) -> list[Record]:
    """The records of a file of JSON lines; none if there is no file."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    return [json.loads(line) for line in lines]


def write(document: Path, records: list[Record]) -> None:
    """Replace what lies between the marks.

    Raises:
        SystemExit: the file has no marks.
    """
    text = document.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{document} has no place for the tables: put the lines {BEGIN} and {END} into it")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    document.write_text(f"{before}{BEGIN}\n\n{tables(records)}\n{END}{after}", encoding="utf-8")


def tables(records: Iterable[Record]) -> str:
    """One section per protocol, one table per bits, group size and symmetry."""
    latest = {json.dumps([record["protocol"], record["cell"]]): record for record in records}
    protocols: dict[str, list[Record]] = {}
    for record in latest.values():
        protocols.setdefault(json.dumps(record["protocol"]), []).append(record)
    return "\n".join(_section(json.loads(key), group) for key, group in protocols.items())


def _section(protocol: dict[str, Any], records: list[Record]) -> str:
    original = [r for r in records if r["cell"]["row"] == "original"]
    grids: dict[tuple[int, int, bool], list[Record]] = {}
    for record in records:
        cell = record["cell"]
        if cell["row"] != "original":
            key = (cell["bits"], cell["group_size"], cell["sym"])
            grids.setdefault(key, []).append(record)
    head = (
        f"## {protocol['model']}\n\nCalibrated on {protocol['samples']} × {protocol['seq_len']} tokens of "
        f"{protocol['calibration']} in {protocol['dtype']}; scored on {protocol['windows']} × "
        f"{protocol['seq_len']} tokens of each text ({protocol['texts']}).\n"
    )
    order = sorted(grids, key=lambda key: (-key[0], key[1] % 10000, not key[2]))  # group −1 last
    return "\n".join([head, *(_grid(key, original + grids[key]) for key in order)])


def _grid(key: tuple[int, int, bool], records: list[Record]) -> str:
    bits, group_size, sym = key
    groups = "one group per row" if group_size == -1 else f"groups of {group_size}"
    texts = list(dict.fromkeys(text for record in records for text in record.get("texts", {})))
    columns = [f"{text}: {what}" for text in texts for what in ("perplexity", "KL")]
    header = ["", *columns, "seconds", "peak GB", "seeds"]
    lines = [
        f"### {bits} bits, {groups}, {'symmetric' if sym else 'asymmetric'}\n",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
    ]
    for row, label in LABELS.items():
        chosen = [record for record in records if record["cell"]["row"] == row]
        if chosen:
            lines.append(f"| {label} | " + " | ".join(_row(chosen, texts)) + " |")
    return "\n".join([*lines, *_sayings(records)]) + "\n"


def _sayings(records: list[Record]) -> list[str]:
    """What the models said after the prompt, one line for each row that was asked."""
    lines = []
    for row, label in LABELS.items():
        said = [r["continuation"] for r in records if r["cell"]["row"] == row and "continuation" in r]
        if said:
            text = " ".join(said[0].replace("`", "'").split())
            lines.append(f"- {label}: `{text[:_SHOWN]}{'…' if len(text) > _SHOWN else ''}`")
    return ["", f"“{PROMPT} …”, first choices only:", "", *lines] if lines else []


def _row(records: list[Record], texts: list[str]) -> list[str]:
    errors = [record["error"] for record in records if "error" in record]
    if errors:
        return [f"failed: {errors[0]}", *[""] * (2 * len(texts) + 2)]
    found: list[str] = []
    for text in texts:
        scores = [record["texts"][text] for record in records]
        found.append(_mean(scores, "perplexity", "stderr", 2))
        found.append(_mean(scores, "kl", "kl_stderr", 4))
    found.append(_average(records, "seconds", 1, 0))
    found.append(_average(records, "peak_memory_bytes", 1e9, 2))
    return [*found, str(len({record["cell"]["seed"] for record in records}))]


def _mean(scores: list[dict[str, Any]], value: str, error: str, digits: int) -> str:
    """Mean over seeds ± standard error over windows, and the standard deviation over seeds in brackets."""
    values = [score[value] for score in scores]
    if any(number is None for number in values):
        return "0" if value == "kl" else "∞"
    mean = statistics.fmean(values)
    if mean >= 1000:
        return f"{mean:,.0f}"
    errors = [score[error] for score in scores if score[error] is not None]
    shown = f"{mean:.{digits}f}" + (f" ± {statistics.fmean(errors):.{digits}f}" if errors else "")
    return shown + (f" ({statistics.stdev(values):.{digits}f})" if len(values) > 1 else "")


def _average(records: list[Record], key: str, unit: float, digits: int) -> str:
    values = [record[key] for record in records if record.get(key) is not None]
    return f"{statistics.fmean(values) / unit:.{digits}f}" if values else ""
