"""What a run would do, need and take, before any work: every module, memory, disk, time, and what cannot work.

    source ─ text ─ model ─ plan ─ trial (one batch through the first blocks) ─ rates ─ memory, time, disk

The steps are those of `api.quantize`, and so are the checks: where one of them refuses, its message becomes a
problem of the forecast, and what does not depend on it goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from .. import preparation
from ..calibration import Calibration
from ..checkpoint.writer import parse_size
from ..config import QuantConfig
from ..context import RunContext, resolve_device
from ..distributed import threads_per_process
from ..errors import FewbitError
from ..gptq import Accuracy
from ..mixed_precision import check_budget
from ..modeling.source import Source, open_source
from ..pipeline.journal import Journal, check_output
from ..pipeline.memory import DEVICE_FRAGMENTATION
from ..pipeline.offload import check_offload_dir
from ..pipeline.quantize_layers import arguments_for
from ..pipeline.streaming import StreamedWeights, Weights
from ..planning import Plan
from ..preparation import Preparation
from ..profiling import Profiler, memory_in_use_bytes
from . import limits, problems
from .extras import Extra, of_budget, of_evaluation, of_tuning
from .memory import Memory, predict_memory, spilled_notes
from .rates import Kind, LayerRate, measure_disk, measure_layers
from .result import Forecast
from .sizes import Sizes, largest_tensor, sizes_of, untie_head
from .timing import predict_seconds
from .trial import Trial, run_trial, tokens_of
from .work import Work, of_one_process, offloaded, work_of

__all__ = ["Forecast", "forecast"]

P = ParamSpec("P")
T = TypeVar("T")
Opened = tuple[nn.Module, Weights]


def forecast(
    model: str | Path,
    config: QuantConfig | None = None,
    *,
    dataset: Any = None,
    tokenizer: Any = None,
    output: str | Path | None = None,
    device: str = "auto",
    resume: bool = True,
    max_shard_size: int | str = "5GB",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    evaluate_on: Any = None,
    offload_dir: str | Path | None = None,
    processes: int = 1,
) -> Forecast:
    """Foresee what `fewbit.quantize` would do with the same arguments. Writes nothing that stays.

    With several `processes` memory and time are those of each. They are taken to be on this machine: without GPUs they
    share its cores and its memory.

    Takes a few seconds: one calibration batch runs through the first blocks, and a layer of every width is solved.
    Without a dataset it plans with as many tokens as the configuration asks for.
    """
    job = _Job(config or QuantConfig(), None if output is None else Path(output), resume, processes)
    attempt = job.attempt
    attempt(preparation.check_processes, dataset, processes)
    text = None if job.problems else dataset
    if job.output is not None:
        attempt(check_output, job.output)
    if offload_dir is not None:
        attempt(check_offload_dir, offload_dir)
        job.offload = Path(offload_dir)
    job.shard_bytes = attempt(parse_size, max_shard_size) or 0
    where = attempt(resolve_device, device)
    source = attempt(open_source, model, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    if source is None or where is None:
        return job.forecast()
    if text is None:
        text = job.nominal_text()
    run = Preparation(
        RunContext(job.config, where, profiler=Profiler(where)), source, text, tokenizer, evaluate_on
    )
    job.predict_all(run, dataset is not None)
    return job.forecast()


class _Job:
    """What is known so far; a step that is refused leaves a problem."""

    def __init__(self, config: QuantConfig, output: Path | None, resume: bool, processes: int) -> None:
        self.config, self.output, self.resume, self.processes = config, output, resume, processes
        self.shard_bytes = 0
        self.offload: Path | None = None
        self.evaluation: preparation.EvaluationText | None = None
        self.plan: Plan | None = None
        self.memory: Memory | None = None
        self.sizes: Sizes | None = None
        self.seconds: dict[str, float] | None = None
        self.notes: list[str] = []
        self.problems: list[str] = []

    def attempt(self, step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """What `step` returns; None where it refuses, which then is a problem."""
        try:
            return step(*args, **kwargs)
        except FewbitError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))
            return None

    def forecast(self) -> Forecast:
        """What was found."""
        notes = tuple(dict.fromkeys(self.notes))
        problems = tuple(self.problems)
        return Forecast(self.plan, self.memory, self.sizes, self.seconds, notes, problems, self.processes)

    def nominal_text(self) -> Any:
        """Token ids in place of a dataset: as many as the configuration asks for. None where none is needed."""
        if self.config.method == "rtn":
            return None
        self.notes.append(
            f"no dataset was given: planned with {self.config.num_samples} sequences of {self.config.seq_len} tokens"
        )
        return [{"input_ids": torch.arange(self.config.seq_len) % 16}] * self.config.num_samples

    def predict_all(self, run: Preparation, is_known: bool) -> None:
        """Ask for everything that a run needs, and predict what it takes; `is_known`: a dataset was given."""
        self.evaluation = self.attempt(lambda: run.evaluation)
        calibration = self.attempt(lambda: run.calibration)
        if calibration is not None and not is_known and calibration.batches and run.text_tokenizer is None:
            self.notes.append("no tokenizer lies beside the model: text needs one, token ids do not")
        opened = self.attempt(lambda: run.opened)
        if opened is None:
            return
        if calibration is not None:
            self.notes += calibration.notes
        self.notes += run.source.notes
        self.plan = self.attempt(lambda: run.plan)
        if self.plan is None:
            return
        self.notes += self.plan.notes
        self.attempt(check_budget, self.plan, self.config)
        if calibration is None:
            return
        assert isinstance(run.source, Source)
        self.attempt(self.check_resume, run, is_known)
        with _threads(self.processes if run.ctx.device.type == "cpu" else 1):
            seconds = run.ctx.profiler.seconds["calibration"] if is_known else 0.0
            self.predict(run.source, calibration, opened, run.ctx.profiler, seconds)

    def check_resume(self, run: Preparation, is_known: bool) -> None:
        """Check that an interrupted run in the output folder can be resumed."""
        if self.output is None or not is_known or not self.output.exists() or not check_output(self.output):
            return
        journal = Journal(self.output, run.fingerprint, self.resume)
        journal.close()
        self.notes.append(
            f"goes on with an interrupted run, in which {len(journal.records)} layers are done; the times are those of "
            "a new one"
        )

    def predict(
        self, source: Source, calibration: Calibration, opened: Opened, profiler: Profiler, calibrated: float
    ) -> None:
        """Disk, memory and time. `calibrated`: the seconds that the text took."""
        assert self.plan is not None
        model, weights = opened
        loading = profiler.seconds["load"]
        untie_head(model, self.plan, weights)
        units, baseline = weights.shard_sizes(), memory_in_use_bytes()
        if not isinstance(weights, StreamedWeights) and weights.device.type == "cpu":
            baseline -= sum(units.values())  # they are counted as weights
        self.sizes = self.attempt(sizes_of, model, self.plan, self.config, source)
        self.problems += problems.of_disk(self.output, self.sizes)
        too_large = problems.of_units(units, weights.device) if source.streams else []
        self.problems += too_large
        largest: Mapping[str, torch.Tensor] = max(calibration.batches, key=tokens_of, default={})
        batch = self.attempt(arguments_for, model, largest, weights.device)
        if too_large or self.sizes is None or batch is None:
            return
        trial = run_trial(model, weights, self.plan, batch, profiler)
        work = work_of(model, self.plan, self.config, calibration, trial)
        if self.processes > 1:
            work = of_one_process(work, self.processes, len(calibration.batches))
        if self.offload is not None:
            work = offloaded(work, trial, next(model.parameters()).dtype)
            self.problems += problems.of_scratch(self.offload, work.scratch * self.processes)
        extras = self.extras(model, calibration, trial, work, units)
        file, tensor = largest_tensor(source)
        on_device = limits.device_left(weights.device)
        self.memory = predict_memory(
            self.plan,
            work,
            units,
            baseline=baseline,
            largest_tensor=tensor.nbytes if tensor else 0,
            dtype=next(model.parameters()).dtype,
            device=weights.device,
            extras={name: extra.parts for name, extra in extras.items()},
            device_free=round((1 - DEVICE_FRAGMENTATION) * on_device.bytes) if on_device else None,
        )
        self.notes += spilled_notes(self.memory)
        self.problems += problems.of_memory(
            self.memory,
            memory_in_use_bytes(),
            self.config,
            weights.device,
            offloaded=self.offload is not None,
            processes=self.processes,
        )
        disk = self.attempt(measure_disk, limits.existing(self.output or Path()), file, tensor)
        if disk is None:
            return
        self.seconds = predict_seconds(
            self.plan,
            work,
            trial,
            self.rates(model, weights.device, work),
            disk,
            self.sizes,
            calibration=calibrated,
            load=loading,
            source_bytes=sum(path.stat().st_size for path in source.weight_files()),
            weight_bytes=sum(units.values()),
            ahead=source.streams and weights.device.type != "cpu",
        ) | {name: extra.seconds for name, extra in extras.items()}

    def rates(self, model: nn.Module, device: torch.device, work: Work) -> dict[Kind, LayerRate]:
        """How fast this machine solves layers like those of `model`."""
        return measure_layers(
            work.layers,
            dtype=next(model.parameters()).dtype,
            device=device,
            streams=work.streams,
            accuracy=Accuracy(self.config.effective_correction),
            probe=work.probe,
            fmt=self.config.format,
        )

    def extras(
        self, model: nn.Module, calibration: Calibration, trial: Trial, work: Work, units: Mapping[str, int]
    ) -> dict[str, Extra]:
        """What the options beyond the plain run add, by phase."""
        assert self.plan is not None
        found, everything = {}, sum(units.values())
        if self.config.target_bits is not None:
            found["measuring the cost of bits"] = of_budget(
                model, self.plan, self.config, calibration, trial, everything
            )
        if self.config.tune:
            found["tuning"] = of_tuning(self.plan, self.config, trial, work, units)
        if self.evaluation is not None:
            windows = self.evaluation.windows
            found["evaluation"] = of_evaluation(model, self.plan, trial, windows.numel(), windows.shape[1])
        return found


@contextmanager
def _threads(processes: int) -> Iterator[None]:
    """While entered, torch has as many threads as one of so many processes on this machine would."""
    before, threads = torch.get_num_threads(), threads_per_process(processes) if processes > 1 else None
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
