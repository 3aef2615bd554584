"""The measured parts of docs/compatibility.md and docs/engines.md, from measured.json and fewbit's own rules.

python tests/engines/matrix.py            rewrites what is between the marks of both pages

docs/engines.md has one table of all engines; docs/compatibility.md has the details for those that read the checkpoint
itself.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cells import GROUPS
from measure import MEASURED, TOLERANCE

from fewbit.config import BITS
from fewbit.engines import ENGINES

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
ENGINES_PAGE = PAGE.with_name("engines.md")
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
NO, WRONG = "–", "wrong"
_ALIKE, _SHOWN = 60, 160  # characters of a refusal


def table(record: Mapping[str, Any]) -> str:
    """The measured part of the page, in Markdown."""
    titles = {engine.name: engine.title for engine in ENGINES if not engine.target}
    parts = [_section(titles[name], name, record[name]) for name in titles if name in record]
    return "\n".join(parts)


def _section(title: str, name: str, found: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    cells = found["cells"]
    worst = max((cell["deviation"] for cell in cells if cell["outcome"] == "reads"), default=0.0)
    counts = Counter(cell["outcome"] for cell in cells)
    lines = [
        f"### {title}",
        "",
        f"{versions}; measured {found['date']} with fewbit {found['fewbit']}: reads {counts['reads']} of {len(cells)} "
        f"checkpoints, refuses {counts['refuses']}, misreads {counts['misreads']}. Largest difference of a "
        f"log-probability where it reads: {worst:g} (limit {TOLERANCE[name]:g}).",
        "",
        *_matrix(cells),
        "",
        *_variations(cells),
        *_reasons(cells),
    ]
    return "\n".join(lines) + "\n"


def _matrix(cells: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """A row for bits, grid and order; a column for each group size; the formats that are read in each field."""
    by_place: dict[tuple[Any, ...], dict[str, str]] = {}
    for cell in cells:
        if not cell["variation"]:
            place = (cell["bits"], cell["sym"], cell["act_order"], cell["group_size"])
            by_place.setdefault(place, {})[cell["format"]] = cell["outcome"]
    columns = [("rows" if group == -1 else f"groups of {group}") for group in GROUPS]
    yield f"| bits | grid | act-order | {' | '.join(columns)} |"
    yield "|---" * (3 + len(columns)) + "|"
    for bits in BITS:
        for sym in (True, False):
            for order in ("group", "full"):
                fields = [_field(by_place[bits, sym, order, group]) for group in GROUPS]
                grid = "symmetric" if sym else "asymmetric"
                yield f"| {bits} | {grid} | {'full' if order == 'full' else 'none, group'} | {' | '.join(fields)} |"


def _field(outcomes: Mapping[str, str]) -> str:
    short = {"gptq": "v1", "gptq_v2": "v2"}
    reads = [short[fmt] for fmt, outcome in outcomes.items() if outcome == "reads"]
    wrong = [f"{short[fmt]} {WRONG}" for fmt, outcome in outcomes.items() if outcome == "misreads"]
    return ", ".join(reads + wrong) or NO


def _variations(cells: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    special = [cell for cell in cells if cell["variation"]]
    if special:
        found = "; ".join(f"{cell['variation']}: {cell['outcome']}" for cell in special)
        yield f"Other checkpoints (4 bits, symmetric, v1): {found}."
        yield ""


def _reasons(cells: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """What it said, once for messages that begin alike."""
    reasons: dict[str, list[str]] = {}
    for cell in cells:
        if cell["outcome"] == "refuses":
            reasons.setdefault(cell["reason"][:_ALIKE], []).append(cell["reason"])
    for said in reasons.values():
        text = said[0].replace("`", "'").replace("|", "/")
        yield f"- {len(said)} refused: `{text if len(text) <= _SHOWN else text[:_SHOWN] + ' …'}`"


def overview(record: Mapping[str, Any]) -> str:
    """One table of all engines: a row for each and each bit width, the groups that it reads in each field."""
    orders = ("group", "full")
    columns = [
        f"{grid}{', act-order `full`' if order == 'full' else ''}"
        for order in orders
        for grid in ("symmetric", "asymmetric")
    ]
    lines = [f"| engine | bits | {' | '.join(columns)} | what else it does not read |", "|---" * 7 + "|"]
    for entry in ENGINES:
        for bits in BITS if entry.name in record else ():
            cells = [
                cell for cell in record[entry.name]["cells"] if cell["bits"] == bits and not cell["variation"]
            ]
            fields = [
                _groups([cell for cell in cells if (cell["sym"], cell["act_order"]) == (sym, order)])
                for order in orders
                for sym in (True, False)
            ]
            why = _why_not(record[entry.name]["cells"]) if bits == BITS[0] else ""
            lines.append(
                f"| {entry.name if bits == BITS[0] else ''} | {bits} | {' | '.join(fields)} | {why} |"
            )
    return "\n".join(lines) + "\n"


def _groups(cells: Sequence[Mapping[str, Any]]) -> str:
    """The group sizes that are read, in the formats in which they are."""
    found: dict[str, list[str]] = {}
    for group in GROUPS:
        outcomes = {cell["format"]: cell["outcome"] for cell in cells if cell["group_size"] == group}
        found.setdefault(_field(outcomes), []).append("row" if group == -1 else str(group))
    named = [
        f"{', '.join(groups)}{'' if which == 'v1, v2' else f' ({which})'}"
        for which, groups in found.items()
        if which != NO
    ]
    everything = found.get("v1, v2", []) if len(found) == 1 else []
    return "all" if everything else "; ".join(named) or NO


def _why_not(cells: Sequence[Mapping[str, Any]]) -> str:
    """The other checkpoints that it does not read."""
    return ", ".join(cell["variation"] for cell in cells if cell["variation"] and cell["outcome"] != "reads")


def page_with(text: str, part: str) -> str:
    """The page with its measured part replaced."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{part}\n{END}{tail}"


PARTS = {PAGE: table, ENGINES_PAGE: overview}

if __name__ == "__main__":
    for page, part in PARTS.items():
        page.write_text(page_with(page.read_text(), part(json.loads(MEASURED.read_text()))))
