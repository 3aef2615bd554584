"""Whole runs of the `fewbit` command, many and fast: each in a process of its own, forked from one that has it loaded.

Started as a program, this file imports fewbit, transformers and torch once and runs one command itself, so that
everything is loaded. Then it reads jobs from stdin, one JSON object in a line. For each it forks a child that runs
the command as `python -m fewbit` would, and answers with one line when the child has ended. A job may name a moment
at which the child gets SIGKILL, seen from outside: by what lies in the output folder, and a delay after that.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

POLL = 0.001


class Outcome(NamedTuple):
    """How a run ended. `returncode` is negative after a signal; `seconds` is its duration."""

    returncode: int
    seconds: float
    stdout: str
    stderr: str

    @property
    def words(self) -> str:
        """What it said on stderr, without line breaks."""
        return " ".join(self.stderr.split())


class ForkedRuns:
    """The parent of many runs. Use it in a ``with`` block.

    Args:
        warm_up: arguments of a command that is run at once, to load everything that it needs.
    """

    def __init__(self, warm_up: list[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(warm_up)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        if self._answer() != "ready":
            raise RuntimeError("the first run did not succeed; see stderr")

    def __enter__(self) -> ForkedRuns:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def run(self, arguments: list[str], *, prelude: str = "", kill: dict[str, Any] | None = None) -> Outcome:
        """Run ``fewbit ARGUMENTS`` and wait for its end.

        Args:
            prelude: Python code that the child executes first.
            kill: ``phase`` ("start", "walk", "write" or "end"), ``blocks`` (for "walk": how many lie in the journal),
                ``after``: seconds from the moment when the phase is reached. A run that ends before is not killed.
        """
        assert self._process.stdin is not None
        job = {"arguments": arguments, "prelude": prelude, "kill": kill}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return Outcome(*self._answer())

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the parent of the runs has ended; see stderr")
        return json.loads(line)


def blocks_in_journal(output: Path) -> int | None:
    """Finished blocks in the journal of `output`; None where there is no journal."""
    folder = output / ".fewbit"
    return len(list(folder.glob("block-*"))) if (folder / "run.json").exists() else None


def phase_of(output: Path) -> tuple[str, int]:
    """(phase, blocks in the journal) of a run, as its folder shows it."""
    blocks = blocks_in_journal(output)
    if (output / "config.json").exists():
        return "end", blocks or 0
    if (output / ".fewbit-incomplete").exists():
        return "write", blocks or 0
    return ("start", 0) if not blocks else ("walk", blocks)


def _reached(output: Path, kill: dict[str, Any]) -> bool:
    phase, blocks = phase_of(output)
    order = ("start", "walk", "write", "end")
    if order.index(phase) != order.index(kill["phase"]):
        return order.index(phase) > order.index(kill["phase"])
    return phase != "walk" or blocks >= kill["blocks"]


def _command(arguments: list[str], prelude: str) -> int:
    """What a child does. Returns the exit code."""
    from fewbit.cli.main import run

    exec(prelude, {})
    sys.argv = ["fewbit", *arguments]
    try:
        run()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _fork(job: dict[str, Any], logs: list[Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    for number, log in enumerate(logs, start=1):
        os.dup2(log.fileno(), number)
    code = 70
    try:
        code = _command(job["arguments"], job["prelude"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(job: dict[str, Any]) -> tuple[int, float, str, str]:
    output = Path(job["arguments"][job["arguments"].index("-o") + 1])
    kill = job["kill"]
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        start = time.perf_counter()
        pid = _fork(job, [stdout, stderr])
        deadline: float | None = None
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                break
            if kill is not None:
                if deadline is None and _reached(output, kill):
                    deadline = time.perf_counter() + kill["after"]
                if deadline is not None and time.perf_counter() >= deadline:
                    os.kill(pid, signal.SIGKILL)
                    kill = None
            time.sleep(POLL)
        seconds = time.perf_counter() - start
        said = []
        for log in (stdout, stderr):
            log.seek(0)
            said.append(log.read())
    return os.waitstatus_to_exitcode(status), seconds, said[0], said[1]


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the first run prints is no answer
    import torch

    torch.set_num_threads(1)
    code = _command(json.loads(sys.argv[1]), "")
    print(json.dumps("ready" if code == 0 else "failed"), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
