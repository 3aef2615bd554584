"""Judge every architecture that transformers can build, and write the table of docs/architectures.md.

    python tests/architectures/judge_all.py                      # those that are not in the results yet
    python tests/architectures/judge_all.py --again failed       # and those with this status
    python tests/architectures/judge_all.py --only mixtral dbrx  # these again
    python tests/architectures/judge_all.py --processes 4 --into docs/architectures.md

Each architecture runs in a process of its own, forked from one that has imported everything. Results are kept after
each, so an interrupted run continues.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import transformers
from judge import Row, judge
from tiny_configs import model_pairs

RESULTS = Path(__file__).parent / "results.json"
SECONDS = 180  # for one architecture


def judge_all(pairs: Iterable[tuple[str, str]], results: Path, processes: int) -> None:
    """Judge `pairs`, each in a forked process, and merge the rows into the file `results`."""
    waiting = list(pairs)
    running: dict[int, tuple[tuple[str, str], Path, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < processes:
                pair = waiting.pop(0)
                target = Path(folder) / "-".join(pair)
                target.mkdir()
                running[_start(pair, target)] = (pair, target, time.monotonic())
            pid, status = os.wait()
            pair, target, start = running.pop(pid)
            found = target / "row.json"
            row = (
                json.loads(found.read_text())
                if found.exists()
                else asdict(Row(*pair, "failed", [f"the process ended with status {status}"]))
            )
            _keep(results, row)
            seconds, why = time.monotonic() - start, "; ".join(row["reasons"])[:200]
            print(f"{row['status']:12} {'/'.join(pair):45} {seconds:5.1f} s  {why}", flush=True)
            shutil.rmtree(target)


def _start(pair: tuple[str, str], folder: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(SECONDS)
    log = open(folder / "log", "w")  # noqa: SIM115
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    row = judge(*pair, folder)
    (folder / "row.tmp").write_text(json.dumps(asdict(row)))
    (folder / "row.tmp").rename(folder / "row.json")
    os._exit(0)


def _keep(results: Path, row: dict) -> None:
    rows = load(results)
    rows[f"{row['task']}/{row['model_type']}"] = row
    content = {"transformers": transformers.__version__, "rows": dict(sorted(rows.items()))}
    temporary = results.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(results)


_TASKS = {
    "CAUSAL_LM": "Causal language models",
    "IMAGE_TEXT_TO_TEXT": "Image and text to text",
    "SEQ_TO_SEQ_CAUSAL_LM": "Encoder-decoders",
    "SPEECH_SEQ_2_SEQ": "Speech to text",
    "MASKED_LM": "Masked language models",
}


def table(content: dict) -> str:
    """The Markdown of docs/architectures.md between its marks."""
    rows = list(content["rows"].values())
    count = Counter(row["status"] for row in rows)
    tried = len(rows) - count["unavailable"]
    lines = [
        f"Of {tried} architectures of transformers {content['transformers']} that run as a tiny model: "
        f"{count['right']} right, {count['partial']} right with matrices left in 16 bits, {count['refused']} refused, "
        f"{count['failed']} failed.",
    ]
    for task, title in _TASKS.items():
        own = [row for row in rows if row["task"] == task]
        right = ", ".join(f"`{row['model_type']}`" for row in own if row["status"] == "right")
        lines += ["", f"### {title}", "", f"Right: {right or 'none'}."]
        others = [row for row in own if row["status"] in ("partial", "refused", "failed")]
        if others:
            lines += ["", "| model_type | result | quantized in blocks | why |", "|---|---|---|---|"]
        for row in others:
            why = "; ".join(dict.fromkeys(reason.replace("|", "\\|") for reason in row["reasons"]))
            share = f"{row['quantized']:.0f}%" if row["status"] == "partial" else ""
            lines.append(f"| `{row['model_type']}` | {row['status']} | {share} | {_short(why)} |")
    untried = [f"`{row['model_type']}`" for row in rows if row["status"] == "unavailable"]
    lines += [
        "",
        "### Not tried",
        "",
        f"The tiny model needs another model or package: {', '.join(untried)}.",
    ]
    return "\n".join(lines)


def _short(text: str, width: int = 240) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def write_table(results: Path, page: Path) -> None:
    """Replace the part of `page` between its marks."""
    begin, end = "<!-- table: begin -->", "<!-- table: end -->"
    text = page.read_text(encoding="utf-8")
    before, after = text.split(begin)[0], text.split(end)[1]
    content = json.loads(results.read_text(encoding="utf-8"))
    page.write_text(f"{before}{begin}\n\n{table(content)}\n\n{end}{after}", encoding="utf-8")


def load(results: Path) -> dict[str, dict]:
    return json.loads(results.read_text())["rows"] if results.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--again", nargs="*", default=[], help="judge rows with these statuses again")
    parser.add_argument("--only", nargs="*", default=[], help="model types")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), help="i n: every n-th from i on")
    parser.add_argument("--into", type=Path, help="a page, whose table is written from the results")
    arguments = parser.parse_args()
    known = load(arguments.results)
    pairs = []
    for pair in model_pairs():
        row = known.get("/".join(pair))
        if (
            (pair[1] in arguments.only)
            if arguments.only
            else (row is None or row["status"] in arguments.again)
        ):
            pairs.append(pair)
    judge_all(pairs[arguments.part[0] :: arguments.part[1]], arguments.results, arguments.processes)
    if arguments.into is not None:
        write_table(arguments.results, arguments.into)


if __name__ == "__main__":
    main()
