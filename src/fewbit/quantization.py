"""`quantize`: the whole story, top to bottom.

    config ─ source ─ calibration ─ plan ─ walk (Hessian → solve → weight in place → journal) ─ writer ─ report

For a path the result is a folder and a `Report`; for a model in memory it is the same model with its
layers replaced.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from . import mixed_precision as budget
from .calibration import Calibration
from .checkpoint.writer import parse_size
from .config import QuantConfig
from .context import Progress, RunContext, no_progress
from .delivery import meta_of, quantization_config, upload, write_checkpoint
from .distributed import Communicator, open_communicator
from .errors import ConfigError, ModelError
from .evaluation import evaluate
from .modeling.experts import unfuse
from .modeling.source import Source, load_tokenizer, open_source
from .pipeline.journal import Journal, check_output
from .pipeline.layer_quantizer import MemorySink, NonLeaderSink
from .pipeline.offload import check_offload_dir
from .pipeline.quantize_layers import check_weights, quantize_layers
from .pipeline.streaming import Weights
from .planning import Plan, make_plan
from .preparation import (
    Evaluation,
    calibrate,
    check_processes,
    evaluation_windows,
    fingerprint_of,
    open_model,
    ranges_of,
    resolve_device,
)
from .profiling import Profiler, peak_memory_bytes
from .report.collect import Origin, Report, collect, write_text
from .report.model_card import CARD_NAME, model_card
from .report.reproduce import reproduce

M = TypeVar("M", bound=nn.Module)

_LOG = logging.getLogger("fewbit")


def quantize(
    model: str | Path | M,
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
    push_to_hub: str | None = None,
    offload_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Report | M:
    """Quantize a model with GPTQ.

    Where torch.distributed has a process group, as under torchrun, its processes share the work: all of them call
    this with the same arguments and can read the same files. Rank 0 writes; all get the same result.

    Args:
        model: a folder, a ``.gguf`` file or a Hub id; or an nn.Module, which is quantized in place.
        config: what to do; the default is 4 bits, group size 128, symmetric.
        dataset: calibration text in any form that `fewbit.calibration.prepare` takes: a list of strings
            or of token dicts, a `datasets.Dataset`, a .txt, .jsonl or .parquet file, or a known name.
        tokenizer: for text; by default the one beside the model.
        output: folder to write; it must be new, empty, or hold an interrupted run of the same inputs.
        device: "auto", "cpu", "cuda", "cuda:1", "xpu" or "mps"; ignored for a model in memory.
        resume: go on with an interrupted run found in `output`; False refuses it.
        max_shard_size: bytes, or text such as "5GB".
        trust_remote_code: run Python code that comes with the model.
        allow_pickle: read weights from .bin files.
        evaluate_on: a text on which the result is then measured against the original, for the report.
        push_to_hub: a Hub repository that the result is uploaded to.
        offload_dir: a folder for the activations of calibration batches that wait, which are then not held in
            memory. Nothing stays in it. The result is the same.
        progress: called as ``progress(phase, done, total)``.

    Returns:
        A `Report` for a path; for a module the module itself, its layers now `QuantLinear`, with the
        report as its attribute ``fewbit_report``.

    Raises:
        FewbitError: a subclass says what is wrong, where, and what to do next.
    """
    config = config or QuantConfig()
    progress = progress or no_progress
    arguments = {
        "dataset": dataset,
        "tokenizer": tokenizer,
        "output": output,
        "device": device,
        "max_shard_size": max_shard_size,
        "trust_remote_code": trust_remote_code,
        "allow_pickle": allow_pickle,
        "evaluate_on": evaluate_on,
    }
    command = reproduce(model, config, arguments)
    if offload_dir is not None:
        check_offload_dir(offload_dir)
        offload_dir = Path(offload_dir)
    if isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(tokenizer)
    if isinstance(model, nn.Module):
        if any(option is not None for option in (output, evaluate_on, push_to_hub)) or config.dtype != "auto":
            raise ConfigError(
                "output, evaluate_on, push_to_hub and dtype are for models on disk; this one is in memory: quantize "
                "it, then call model.save_pretrained, model.push_to_hub or fewbit.evaluation.evaluate"
            )
        with open_communicator() as comm:
            return _quantize_module(model, config, dataset, tokenizer, progress, command, comm, offload_dir)
    if output is None:
        raise ConfigError("no output folder was given: pass output=…")
    if dataset == "-" == evaluate_on:
        raise ConfigError(
            "standard input cannot be both the calibration and the evaluation text: use a file for one"
        )
    shard_bytes = parse_size(max_shard_size)
    source = open_source(model, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    origin = {"name": _model_name(model), "hub_id": None if Path(model).expanduser().exists() else str(model)}
    job = _PathJob(source, config, Path(output), progress, origin, command, push_to_hub, offload_dir)
    with open_communicator() as comm:
        if comm.is_leader:
            check_output(job.output)
        where = resolve_device(device)
        # Read before the work, so that a text that cannot be used is refused now.
        evaluation = None if evaluate_on is None else evaluation_windows(source, evaluate_on, tokenizer)
        report = job.run(dataset, tokenizer, where, resume, shard_bytes, evaluation, comm)
    if push_to_hub is not None and comm.is_leader:
        upload(job.output, push_to_hub)
    return report


@dataclass
class _PathJob:
    """One run from a model on disk to a checkpoint on disk."""

    source: Source
    config: QuantConfig
    output: Path
    progress: Progress
    origin: dict[str, Any]
    command: str
    repository: str | None
    offload_dir: Path | None

    def run(
        self,
        dataset: Any,
        tokenizer: Any,
        device: torch.device,
        resume: bool,
        shard_bytes: int,
        evaluation: Evaluation | None,
        comm: Communicator,
    ) -> Report:
        check_processes(dataset, comm.world_size)
        start, profiler = time.perf_counter(), Profiler(device)
        ctx = RunContext(self.config, device, comm, profiler, self.progress, self.offload_dir)
        with profiler.time("calibration"):
            model_config = self.source.load_config()
            tokenizer = tokenizer or self.source.load_tokenizer()
            calibration = calibrate(self.config, dataset, tokenizer, model_config)
        model, weights = open_model(self.source, self.config.dtype, device, profiler)
        plan = make_plan(model, self.config)
        budget.check(plan, self.config)
        origin = Origin.of(model, **self.origin, files=self.source.weight_files())
        with profiler.time("check"):
            fingerprint = fingerprint_of(self.config, calibration, self.source.fingerprint())
            comm.assert_same(**fingerprint)
        if not comm.is_leader:
            return self._follow(model, weights, plan, calibration, ctx)
        journal = Journal(self.output, fingerprint, resume)
        try:
            resumed = len(comm.broadcast_object(journal.records))
            store = budget.Store(journal.folder, fingerprint, journal.records)
            plan, choice = budget.meet(model, plan, calibration, ctx, store, weights)
            comm.broadcast_object(plan)
            notes = [*self.source.notes, *plan.notes, *calibration.notes, *journal.notes, *choice]
            notes += quantize_layers(model, plan, calibration, journal, weights, ctx)
            with profiler.time("write"):
                write_checkpoint(
                    self.output,
                    self.source,
                    model,
                    weights,
                    plan,
                    self.config,
                    calibration,
                    journal,
                    shard_bytes,
                    tokenizer,
                )
            report = collect(
                output=self.output,
                origin=origin,
                config=self.config,
                plan=plan,
                records=journal.records,
                fingerprint=fingerprint,
                calibration=calibration,
                notes=notes,
                seconds=time.perf_counter() - start,
                profiler=profiler,
                resumed_layers=resumed,
                command=self.command,
                ranks=comm.world_size,
                peak=_peak(comm),
            )
            self._leave(report)
            if evaluation is not None:
                del model, weights  # two others are about to be loaded
                with profiler.time("evaluate"):
                    scores = self._evaluate(evaluation, device)
                report = replace(report, evaluation=scores, phases=tuple(profiler.to_list()))
                self._leave(report)
            journal.remove()
        finally:
            journal.close()
        _log(report)
        return comm.broadcast_object(report)

    def _follow(
        self,
        model: nn.Module,
        weights: Weights,
        plan: Plan,
        calibration: Calibration,
        ctx: RunContext,
    ) -> Report:
        """The same in the processes that do not write, from the journal on."""
        comm = ctx.comm
        sink = NonLeaderSink(comm.broadcast_object({}))
        plan = comm.broadcast_object(plan)
        quantize_layers(model, plan, calibration, sink, weights, replace(ctx, progress=no_progress))
        _peak(comm)
        report: Any = comm.broadcast_object(None)
        assert isinstance(report, Report)
        return report

    def _evaluate(self, evaluation: Evaluation, device: torch.device) -> dict[str, Any]:
        """Perplexity of the original and of the result, and the distance between them."""
        from .hf.load import load

        base = self.source.load_model("auto", device)
        model = load(self.output, device=device, trust_remote_code=self.source.trust_remote_code)

        text = evaluation.windows

        def report(start: int) -> Callable[[int, int], None]:
            return lambda done, total: self.progress("evaluate", start + done, 2 * total)

        return {
            "dataset": evaluation.dataset,
            "base": evaluate(base, text, progress=report(0)).to_dict(),
            "quantized": evaluate(model, text, against=base, progress=report(len(text))).to_dict(),
        }

    def _leave(self, report: Report) -> None:
        """The report and the model card: about the run, so after the checkpoint, which is complete without them."""
        report.write(self.output)
        write_text(self.output / CARD_NAME, model_card(report.to_dict(), self.repository))


def _quantize_module(
    model: M,
    config: QuantConfig,
    dataset: Any,
    tokenizer: Any,
    progress: Progress,
    command: str,
    comm: Communicator,
    offload_dir: Path | None = None,
) -> M:
    """Quantize a model in memory, in place. An error midway leaves it partly changed."""
    from .hf.replace import replace_layers

    check_processes(dataset, comm.world_size)
    choice: list[str] = []
    start, sink = time.perf_counter(), MemorySink()
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    profiler = Profiler(device)
    ctx = RunContext(config, device, comm, profiler, progress, offload_dir)
    if getattr(getattr(model, "config", None), "quantization_config", None):
        raise ModelError(f"this {type(model).__name__} is already quantized: quantize the original model")
    calibration = calibrate(config, dataset, tokenizer, getattr(model, "config", None))
    check_weights(model)
    unfuse(model)
    plan = make_plan(model, config)
    origin = Origin.of(model, type(model).__name__)
    was_training = model.training
    model.eval()
    comm.assert_same(**fingerprint_of(config, calibration, ranges_of(model) if comm.world_size > 1 else ""))
    if comm.is_leader:
        plan, choice = budget.meet(model, plan, calibration, ctx)
    plan, choice = comm.broadcast_object((plan, choice))
    notes = [*plan.notes, *calibration.notes, *choice]
    notes += quantize_layers(model, plan, calibration, sink, Weights(model), ctx)
    quantization = quantization_config(config, model, plan, meta_of(calibration))
    replace_layers(model, plan, sink.tensors, quantization)
    report = collect(
        output=None,
        origin=origin,
        config=config,
        plan=plan,
        records=sink.records,
        fingerprint={},
        calibration=calibration,
        notes=notes,
        seconds=time.perf_counter() - start,
        profiler=profiler,
        resumed_layers=0,
        command=command,
        ranks=comm.world_size,
        peak=_peak(comm),
    )
    if comm.is_leader:
        _log(report)
    model.fewbit_report = report  # type: ignore[assignment]
    return model.train() if was_training else model


def _peak(comm: Communicator) -> int | None:
    """Memory of the process that had the most, in bytes; None where unknown."""
    return max(
        (peak for peak in comm.all_gather_object(peak_memory_bytes()) if peak is not None), default=None
    )


def _log(report: Report) -> None:
    """Say once, through logging, what is not as the user might expect; the report has it all."""
    for note in report.notes:
        _LOG.warning(note)
    for name, count in report.fallbacks.items():
        _LOG.warning("%d layers needed a fallback: %s", count, name)


def _model_name(model: str | Path) -> str:
    """For people: the Hub id, or the name of the folder or file."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else str(model)
