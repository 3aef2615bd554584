"""Whole models next to each other: prefill and decode, memory, loading, in interleaved rounds.

Every model lives in a process of its own (`worker`), all of them at once: the machine must hold them together.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from ..errors import KernelError
from .timing import Times, in_turns

FEWBIT_WORKER = (sys.executable, "-m", "fewbit.bench.worker")


@dataclass(frozen=True)
class Candidate:
    """A model and what runs it.

    Attributes:
        kernel: of fewbit, by name; None: the model is not quantized.
        options: for `fewbit.load`, or of `open_source` where it is not quantized.
        command: a process that speaks the protocol of `worker`.
    """

    model: str
    dtype: str
    kernel: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    command: tuple[str, ...] = FEWBIT_WORKER


@dataclass(frozen=True)
class Result:
    """What one candidate reached.

    Attributes:
        prefill, decode: seconds per token, over rounds.
        kernels: what its layers run on.
        load_seconds, memory_bytes: of loading, and in use after it.
        peak_bytes: largest use of the whole process, libraries included; None where the system does not say.
    """

    prefill: Times
    decode: Times
    kernels: list[str]
    load_seconds: float
    memory_bytes: int
    peak_bytes: int | None


class WorkerProcess:
    """A `worker` and the pipes to it, to be used in a ``with``."""

    def __init__(self, command: Sequence[str], threads: int) -> None:
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads))
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            KernelError: the worker cannot do it, or has died.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise KernelError(
                f"the process that was to {request['do']} a model ended with code {self._process.wait()}; "
                "what it wrote is above"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise KernelError(answer["error"])
        return answer


def measure_models(
    candidates: Mapping[str, Candidate],
    *,
    threads: int,
    prefill_tokens: int = 512,
    decode_tokens: int = 32,
    rounds: int = 5,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> tuple[dict[str, Result], dict[str, str]]:
    """Load all candidates, then let them take turns.

    Returns:
        name → result; and the candidates that could not be loaded, with the reason.
    """
    refused: dict[str, str] = {}
    loaded: dict[str, dict[str, Any]] = {}
    workers: dict[str, WorkerProcess] = {}
    with _closing(workers):
        for done, (name, candidate) in enumerate(candidates.items()):
            progress(f"load {name}", done, len(candidates))
            workers[name] = WorkerProcess(candidate.command, threads)
            try:
                loaded[name] = _load(workers[name], candidate, threads)
            except KernelError as error:
                refused[name] = str(error)
        ready = {name: workers[name] for name in loaded}
        prefill = _turns(ready, "prefill", prefill_tokens, rounds, progress)
        decode = _turns(ready, "decode", decode_tokens, rounds, progress)
        peaks = {name: worker.ask(do="memory")["peak_bytes"] for name, worker in ready.items()}
    results = {
        name: Result(
            prefill[name],
            decode[name],
            facts["kernels"],
            facts["seconds"],
            facts["memory_bytes"],
            peaks[name],
        )
        for name, facts in loaded.items()
    }
    return results, refused


def _load(worker: WorkerProcess, candidate: Candidate, threads: int) -> dict[str, Any]:
    return worker.ask(
        do="load",
        model=candidate.model,
        dtype=candidate.dtype,
        kernel=candidate.kernel,
        threads=threads,
        options=candidate.options,
    )


def _turns(
    workers: Mapping[str, WorkerProcess],
    work: str,
    tokens: int,
    rounds: int,
    progress: Callable[[str, int, int], None],
) -> dict[str, Times]:
    """Seconds per token of `work`, after one run of each to warm up."""
    done = 0

    def measure(worker: WorkerProcess) -> float:
        nonlocal done
        answer = worker.ask(do=work, tokens=tokens)
        progress(work, done, (rounds + 1) * len(workers))
        done += 1
        return float(answer["seconds"]) / int(answer.get("tokens", tokens))

    for worker in workers.values():
        measure(worker)
    return in_turns({n: functools.partial(measure, worker) for n, worker in workers.items()}, rounds)


class _closing:  # noqa: N801  (reads as the verb it is, like contextlib's)
    """Ends every worker that was started, also after an error."""

    def __init__(self, workers: dict[str, WorkerProcess]) -> None:
        self._workers = workers

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        for worker in self._workers.values():
            worker.__exit__(None, None, None)
