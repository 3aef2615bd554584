"""`quantize`: the whole story, top to bottom.

    config ─ preparation (model, calibration, plan) ─ pipeline (Hessian → solve → weight in place) ─ result ─ report

For a path the result is a folder and a `Report`; for a model in memory it is the same model with its layers replaced.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

from .config import EVALUATION_TOKENS, QuantConfig, dtype_name
from .context import RunContext, computing_dtype, resolve_device
from .distributed import Communicator, open_communicator
from .errors import ConfigError
from .evaluation import evaluate
from .hf.fuse import fast_attention
from .mixed_precision import choose_bits
from .modeling.source import LoadedModel, Source, open_source
from .output import CheckpointFolder, InPlace, upload
from .pipeline.offload import check_offload_dir
from .pipeline.output_hessians import output_hessians
from .pipeline.quantize_layers import quantize_layers
from .preparation import EvaluationText, Preparation
from .profiling import Profiler, peak_memory_bytes
from .progress import Progress, progress_of
from .report.report import Report, RunResult, collect
from .report.reproduce import reproduce

M = TypeVar("M", bound=nn.Module)

_LOG = logging.getLogger("fewbit")


def quantize(
    model: str | Path | M,
    config: QuantConfig | Mapping[str, Any] | None = None,
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
    evaluate_tokens: int = EVALUATION_TOKENS,
    push_to_hub: str | None = None,
    offload_dir: str | Path | None = None,
    progress: Progress | bool | None = True,
    **settings: Any,
) -> Report | M:
    """Quantize a model with GPTQ.

    If torch.distributed has a process group, as under torchrun, its processes share the work: all of them call this
    with the same arguments and can read the same files. Rank 0 writes; every rank gets the same result.

    Args:
        model: a folder, a ``.gguf`` file or a Hub id; or an nn.Module, which is quantized in place.
        config: settings, as a `QuantConfig` or a dict of its fields; the default is 4 bits, symmetric.
        dataset: calibration text in any form that `fewbit.calibration.prepare` takes: a list of strings
            or of token dicts, a `datasets.Dataset`, a .txt, .jsonl or .parquet file, or a known name.
        tokenizer: tokenizer for the text; by default the one beside the model.
        output: folder to write; it must be new, empty, or hold an interrupted run of the same inputs.
        device: "auto", "cpu", "cuda", "cuda:1", "xpu" or "mps"; ignored for a model in memory.
        resume: continue an interrupted run found in `output`; False refuses it.
        max_shard_size: bytes, or text such as "5GB".
        trust_remote_code: run Python code that comes with the model.
        allow_pickle: read weights from .bin files.
        evaluate_on: a text on which the result is then measured against the original, for the report.
        evaluate_tokens: tokens of that text at most.
        push_to_hub: a Hub repository that the result is uploaded to.
        offload_dir: a folder for the activations of paused calibration batches, which are then not held in memory.
            It is left empty. The result is the same.
        progress: True for a bar in a terminal or notebook, and lines in the log elsewhere; False for neither; or a
            callback, called as ``progress(phase, done, total)``.
        settings: fields of `QuantConfig`, such as ``bits=3``, instead of `config`.

    Returns:
        A `Report` for a path; for a module the module itself, its layers now `QuantLinear`, with the
        report as its attribute ``fewbit_report``.

    Raises:
        FewbitError: a subclass says what is wrong, where, and what to do next.
    """
    config = QuantConfig.of(config, settings, quantize)
    arguments = {
        "dataset": dataset,
        "tokenizer": tokenizer,
        "output": output,
        "device": device,
        "max_shard_size": max_shard_size,
        "trust_remote_code": trust_remote_code,
        "allow_pickle": allow_pickle,
        "evaluate_on": evaluate_on,
        "evaluate_tokens": evaluate_tokens,
    }
    commands = reproduce(model, config, arguments), reproduce(model, config, arguments, published=True)
    if offload_dir is not None:
        check_offload_dir(offload_dir)
        offload_dir = Path(offload_dir)
    source: Source | LoadedModel
    destination: CheckpointFolder | InPlace
    if isinstance(model, nn.Module):
        if any(option is not None for option in (output, evaluate_on, push_to_hub)) or config.dtype != "auto":
            raise ConfigError(
                "output, evaluate_on, push_to_hub and dtype are for models on disk; this one is in memory: quantize "
                "it, then call model.save_pretrained, model.push_to_hub or fewbit.evaluate"
            )
        if config.distill:
            raise ConfigError(
                "distill compares the result with the original, which a model in memory no longer is: quantize from a "
                "folder, or save the result and call fewbit.distill"
            )
        source, destination = LoadedModel(model), InPlace()
    else:
        destination = CheckpointFolder(output, max_shard_size, resume, push_to_hub)
        source = open_source(model, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    with open_communicator() as comm:
        where = source.device or resolve_device(device)
        shown = progress_of(progress if comm.is_leader else False, "quantize")
        ctx = RunContext(config, where, comm, Profiler(where), shown, offload_dir)
        run = Preparation(ctx, source, dataset, tokenizer, evaluate_on, evaluate_tokens)
        destination.check(comm)
        run.check()
        with destination.open(run) as sink:
            resumed = len(sink.records)
            plan, choice = choose_bits(
                run.model, run.plan, run.calibration, run.weights, run.ctx, destination.budget
            )
            outputs, missing = output_hessians(
                run.model, plan, run.calibration, run.weights, run.ctx, destination.output_hessians
            )
            notes = [*run.notes, *plan.notes, *run.calibration.notes, *destination.notes, *choice, *missing]
            with fast_attention(run.model):
                notes += quantize_layers(
                    run.model, plan, run.calibration, sink, run.weights, run.ctx, outputs
                )
            destination.write(run, plan, sink)
            distilled = destination.distillation
            notes += distilled.notes if distilled else ()
            facts = distilled.to_dict() if distilled else None
            result = RunResult(
                plan, sink.records, notes, *commands, destination.folder, resumed, _peak(comm), facts
            )
            report: Any = comm.broadcast_object(_report(run, result, destination) if comm.is_leader else None)
    if push_to_hub is not None and comm.is_leader:
        upload(Path(report.output), push_to_hub)
    if isinstance(model, nn.Module):
        model.fewbit_report = report
        return model
    return cast(Report, report)


def _report(run: Preparation, result: RunResult, destination: CheckpointFolder | InPlace) -> Report:
    """Leave the report, then the evaluation in it: the checkpoint is complete without either. On rank 0 alone."""
    profiler = run.ctx.profiler
    report = collect(run, result)
    destination.publish(report)
    if run.evaluation is not None:
        with profiler.time("evaluate"):
            scores = _evaluate(run, run.evaluation, result.output)
        report = replace(report, evaluation=scores, phases=tuple(profiler.to_list()))
        destination.publish(report)
    destination.complete()
    for note in report.notes:
        _LOG.warning(note)
    for name, count in report.fallbacks.items():
        _LOG.warning("%d layers needed a fallback: %s", count, name)
    return report


def _evaluate(run: Preparation, text: EvaluationText, folder: Path | None) -> dict[str, Any]:
    """Perplexity of the original and of the result, and the distance between them."""
    from .hf.load import load

    assert isinstance(run.source, Source)
    assert folder is not None
    run.release()  # two other models are loaded
    dtype = computing_dtype(getattr(torch, run.origin.dtype), run.ctx.device)
    base = run.source.load_model(dtype_name(dtype), run.ctx.device)
    # As `fewbit eval`: only the weights are rounded.
    model = load(folder, run.ctx.device, dtype, "auto_a16", run.source.trust_remote_code)
    count = len(text.windows)

    def shown(start: int) -> Callable[[int, int], None]:
        return lambda done, total: run.ctx.progress("evaluate", start + done, 2 * total)

    return {
        "dataset": text.dataset,
        "base": evaluate(base, text.windows, progress=shown(0)).to_dict(),
        "quantized": evaluate(model, text.windows, against=base, progress=shown(count)).to_dict(),
    }


def _peak(comm: Communicator) -> int | None:
    """Memory of the process that had the most, in bytes; None where unknown."""
    peaks = comm.all_gather_object(peak_memory_bytes())
    return max((peak for peak in peaks if peak is not None), default=None)
