"""Whole models side by side: prefill, decode, memory and load time, in interleaved rounds.

Every model runs in a separate process (`worker`), all of them at the same time: the machine must hold them all.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from ..errors import KernelError
from .timing import Times, in_turns

FEWBIT_WORKER = (sys.executable, "-m", "fewbit.bench.worker")


@dataclass(frozen=True)
class Candidate:
    """A model and the way to run it.

    Attributes:
        model: folder or Hub id.
        dtype: name of the dtype of the activations.
        kernel: name of a fewbit kernel; None for a model that is not quantized.
        options: further arguments of `fewbit.load`, or of `open_source` for a model that is not quantized.
        device: torch device of the model; memory figures are of this device.
        command: process that speaks the protocol of `worker`.
    """

    model: str
    dtype: str
    kernel: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    command: tuple[str, ...] = FEWBIT_WORKER


@dataclass(frozen=True)
class Result:
    """Measurements of one candidate.

    Attributes:
        prefill: seconds per prompt token, by round.
        decode: seconds per generated token, by round.
        kernels: one line per kernel in use, with its number of layers.
        load_seconds: time to load the model.
        memory_bytes: memory of the process after loading.
        peak_bytes: peak memory of the process; None where the system does not report it.
    """

    prefill: Times
    decode: Times
    kernels: list[str]
    load_seconds: float
    memory_bytes: int
    peak_bytes: int | None


class WorkerProcess:
    """A `worker` and the pipes to it, for use in a ``with`` statement."""

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
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request and return the answer.

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
    """Load all candidates, then measure them in turns.

    Returns:
        name → result; and name → reason for each candidate that could not be loaded.
    """
    refused: dict[str, str] = {}
    loaded: dict[str, dict[str, Any]] = {}
    workers: dict[str, WorkerProcess] = {}
    with ExitStack() as stack:
        for done, (name, candidate) in enumerate(candidates.items()):
            progress(f"load {name}", done, len(candidates))
            worker = stack.enter_context(WorkerProcess(candidate.command, threads))
            try:
                loaded[name] = worker.ask(
                    do="load",
                    model=candidate.model,
                    device=candidate.device,
                    dtype=candidate.dtype,
                    kernel=candidate.kernel,
                    threads=threads,
                    options=candidate.options,
                )
                workers[name] = worker
            except KernelError as error:
                refused[name] = str(error)
        turns = functools.partial(_turns, workers, rounds=rounds, progress=progress)
        prefill, decode = turns("prefill", prefill_tokens), turns("decode", decode_tokens)
        peaks = {name: worker.ask(do="memory")["peak_bytes"] for name, worker in workers.items()}
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


def _turns(
    workers: Mapping[str, WorkerProcess],
    work: str,
    tokens: int,
    *,
    rounds: int,
    progress: Callable[[str, int, int], None],
) -> dict[str, Times]:
    """Seconds per token of `work`, after one run of each candidate to warm up."""
    done = 0

    def measure(worker: WorkerProcess) -> float:
        nonlocal done
        answer = worker.ask(do=work, tokens=tokens)
        progress(work, done, (rounds + 1) * len(workers))
        done += 1
        return float(answer["seconds"]) / int(answer.get("tokens", tokens))

    for worker in workers.values():
        measure(worker)
    return in_turns({name: functools.partial(measure, worker) for name, worker in workers.items()}, rounds)
