"""`quantize`: the whole story, top to bottom.

    config ─ source ─ calibration ─ plan ─ walk (Hessian → solve → weight in place → journal) ─ writer ─ report

For a path the result is a folder and a `Report`; for a model in memory it is the same model with its
layers replaced.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import __version__, budget
from .calibration import Calibration, prepare
from .checkpoint import manifest
from .checkpoint.assemble import checkpoint_tensors, names_on_disk
from .checkpoint.quantization import build as build_quantization_config
from .checkpoint.writer import CONFIG, MARKER, CheckpointWriter, parse_size
from .config import QuantConfig
from .errors import CalibrationError, ConfigError, ModelError, OutputError
from .evaluate import evaluate, windows
from .plan import Plan, make_plan, output_embedding_name
from .report.collect import PAGE_NAME, REPORT_NAME, Origin, Report, collect, write_text
from .report.model_card import CARD_NAME, model_card
from .report.reproduce import reproduce
from .source import Source, load_tokenizer, open_source
from .timers import Timers, peak_memory_bytes
from .walk.experts import unfuse
from .walk.journal import Journal, check_output
from .walk.quantizer import Follower, MemorySink, Progress
from .walk.ranks import Ranks, current
from .walk.run import check_weights, quantize_layers
from .walk.spill import check_folder
from .walk.weights import StreamedWeights, Weights

M = TypeVar("M", bound=nn.Module)

_LOG = logging.getLogger("fewbit")

# What `evaluate_on` measures.
EVALUATION_SEQ_LEN = 512
EVALUATION_WINDOWS = 64

_PLACEHOLDER = re.compile(r"(image|video|audio|speech)\w*_token_(id|index)$")


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
    progress = progress or _silent
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
        check_folder(offload_dir)
    if isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(tokenizer)
    if isinstance(model, nn.Module):
        if any(option is not None for option in (output, evaluate_on, push_to_hub)) or config.dtype != "auto":
            raise ConfigError(
                "output, evaluate_on, push_to_hub and dtype are for models on disk; this one is in memory: quantize "
                "it, then call model.save_pretrained, model.push_to_hub or fewbit.evaluate.evaluate"
            )
        with current() as ranks:
            return _quantize_module(model, config, dataset, tokenizer, progress, command, ranks, offload_dir)
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
    with current() as ranks:
        if ranks.leader:
            check_output(job.output)
        where = resolve_device(device)
        # Read before the work, so that a text that cannot be used is refused now.
        evaluation = None if evaluate_on is None else evaluation_windows(source, evaluate_on, tokenizer)
        report = job.run(dataset, tokenizer, where, resume, shard_bytes, evaluation, ranks)
    if push_to_hub is not None and ranks.leader:
        _upload(job.output, push_to_hub)
    return report


def resolve_device(name: str) -> torch.device:
    """The device called `name`; "auto" takes cuda, then xpu, then the CPU (mps lacks float64: by name only).

    Raises:
        ConfigError: the name is unknown or the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "xpu" if torch.xpu.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def open_model(source: Source, dtype: str, device: torch.device, timers: Timers) -> tuple[nn.Module, Weights]:
    """The model, and its weights: read block by block where the source allows it, otherwise all of them."""
    with timers.time("load"):
        if source.streams:
            model, files = source.build_model(dtype)
            unfuse(model)
            return model, StreamedWeights(model, files, device, timers)
        model = source.load_model(dtype, device)
        check_weights(model)
        unfuse(model)
        return model, Weights(model)


@dataclass(frozen=True)
class Evaluation:
    """What the result will be measured on: token ids (count, seq_len), and where they are from."""

    dataset: str
    windows: Tensor


def evaluation_windows(source: Source, dataset: Any, tokenizer: Any = None) -> Evaluation:
    """The windows on which the result will be measured.

    Raises:
        ConfigError: the model is no causal language model.
        CalibrationError: the text cannot be used.
    """
    config = source.load_config()
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            "evaluation (--eval) measures causal language models; this one is an encoder-decoder: leave it out"
        )
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or EVALUATION_SEQ_LEN
    seq_len = min(EVALUATION_SEQ_LEN, positions)
    text = windows(dataset, tokenizer or source.load_tokenizer(), seq_len, EVALUATION_WINDOWS)
    return Evaluation(_text_name(dataset), text)


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
    offload_dir: str | Path | None

    def run(
        self,
        dataset: Any,
        tokenizer: Any,
        device: torch.device,
        resume: bool,
        shard_bytes: int,
        evaluation: Evaluation | None,
        ranks: Ranks,
    ) -> Report:
        _check_ranks(self.config, dataset, ranks)
        start, timers = time.perf_counter(), Timers(device)
        with timers.time("calibration"):
            model_config = self.source.load_config()
            tokenizer = tokenizer or self.source.load_tokenizer()
            calibration = calibrate(self.config, dataset, tokenizer, model_config)
        model, weights = open_model(self.source, self.config.dtype, device, timers)
        plan = make_plan(model, self.config)
        budget.check(plan, self.config)
        origin = Origin.of(model, **self.origin, files=self.source.weight_files())
        with timers.time("check"):
            fingerprint = fingerprint_of(self.config, calibration, self.source.fingerprint())
            ranks.alike(**fingerprint)
        if not ranks.leader:
            return self._follow(model, weights, plan, calibration, timers, ranks)
        journal = Journal(self.output, fingerprint, resume)
        try:
            resumed = len(ranks.from_leader(journal.records))
            store = budget.Store(journal.folder, fingerprint, journal.records)
            plan, choice = budget.meet(
                model, plan, self.config, calibration, timers, self.progress, store, weights
            )
            ranks.from_leader(plan)
            notes = [*self.source.notes, *plan.notes, *calibration.notes, *journal.notes, *choice]
            notes += quantize_layers(
                model,
                plan,
                self.config,
                calibration,
                journal,
                timers,
                self.progress,
                weights,
                ranks,
                self.offload_dir,
            )
            with timers.time("write"):
                self._write(model, weights, plan, calibration, journal, shard_bytes, tokenizer)
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
                timers=timers,
                resumed_layers=resumed,
                command=self.command,
                ranks=ranks.world,
                peak=_peak(ranks),
            )
            self._leave(report)
            if evaluation is not None:
                del model, weights  # two others are about to be loaded
                with timers.time("evaluate"):
                    scores = self._evaluate(evaluation, device)
                report = replace(report, evaluation=scores, phases=tuple(timers.to_list()))
                self._leave(report)
            journal.remove()
        finally:
            journal.close()
        _log(report)
        return ranks.from_leader(report)

    def _follow(
        self,
        model: nn.Module,
        weights: Weights,
        plan: Plan,
        calibration: Calibration,
        timers: Timers,
        ranks: Ranks,
    ) -> Report:
        """The same in the processes that do not write, from the journal on."""
        sink = Follower(ranks.from_leader({}))
        plan = ranks.from_leader(plan)
        quantize_layers(
            model, plan, self.config, calibration, sink, timers, _silent, weights, ranks, self.offload_dir
        )
        _peak(ranks)
        report: Any = ranks.from_leader(None)
        assert isinstance(report, Report)
        return report

    def _evaluate(self, evaluation: Evaluation, device: torch.device) -> dict[str, Any]:
        """Perplexity of the original and of the result, and the distance between them."""
        from .runtime.load import load

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

    def _write(
        self,
        model: nn.Module,
        weights: Weights,
        plan: Plan,
        calibration: Calibration,
        journal: Journal,
        shard_bytes: int,
        tokenizer: Any,
    ) -> None:
        if (self.output / CONFIG).exists():  # killed between the last file and the end of the journal
            manifest.require(self.output)
            (self.output / MARKER).unlink(missing_ok=True)
            return
        names = [layer.name for layer in plan.layers]
        config = self.source.config_dict(model)
        if output_embedding_name(model) in names:
            config["tie_word_embeddings"] = False
        extra: dict[str, Path | bytes] = dict(self.source.files_to_copy())
        if self.source.gguf is not None:
            extra.update(_saved_files(tokenizer, getattr(model, "generation_config", None)))
        with CheckpointWriter(self.output, shard_bytes) as writer:
            for name, tensor in checkpoint_tensors(model, names, journal.tensors, weights):
                writer.add(name, tensor)
            writer.finish(config, quantization_config(self.config, model, plan, _meta(calibration)), extra)


def _quantize_module(
    model: M,
    config: QuantConfig,
    dataset: Any,
    tokenizer: Any,
    progress: Progress,
    command: str,
    ranks: Ranks,
    offload_dir: str | Path | None = None,
) -> M:
    """Quantize a model in memory, in place. An error midway leaves it partly changed."""
    from .runtime.replace import replace_layers

    _check_ranks(config, dataset, ranks)
    choice: list[str] = []
    start, sink = time.perf_counter(), MemorySink()
    timers = Timers(next((parameter.device for parameter in model.parameters()), None))
    if getattr(getattr(model, "config", None), "quantization_config", None):
        raise ModelError(f"this {type(model).__name__} is already quantized: quantize the original model")
    calibration = calibrate(config, dataset, tokenizer, getattr(model, "config", None))
    check_weights(model)
    unfuse(model)
    plan = make_plan(model, config)
    origin = Origin.of(model, type(model).__name__)
    was_training = model.training
    model.eval()
    ranks.alike(**fingerprint_of(config, calibration, _ranges(model) if ranks.world > 1 else ""))
    if ranks.leader:
        plan, choice = budget.meet(model, plan, config, calibration, timers, progress)
    plan, choice = ranks.from_leader((plan, choice))
    notes = [*plan.notes, *calibration.notes, *choice]
    notes += quantize_layers(
        model, plan, config, calibration, sink, timers, progress, ranks=ranks, offload_dir=offload_dir
    )
    quantization = quantization_config(config, model, plan, _meta(calibration))
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
        timers=timers,
        resumed_layers=0,
        command=command,
        ranks=ranks.world,
        peak=_peak(ranks),
    )
    if ranks.leader:
        _log(report)
    model.fewbit_report = report  # type: ignore[assignment]
    return model.train() if was_training else model


def _check_ranks(config: QuantConfig, dataset: Any, ranks: Ranks) -> None:
    """Raises ConfigError for what one process alone can do."""
    if ranks.world == 1:
        return
    if config.tune:
        raise ConfigError(
            f"tuning learns from all batches in one process, but there are {ranks.world}: leave out --tune, or start "
            "without torchrun"
        )
    if dataset == "-":
        raise ConfigError(
            f"standard input cannot be read by all {ranks.world} processes: save the calibration text to a file"
        )


def _peak(ranks: Ranks) -> int | None:
    """Memory of the process that had the most, in bytes; None where unknown."""
    return max((peak for peak in ranks.collect(peak_memory_bytes()) if peak is not None), default=None)


def _ranges(model: nn.Module) -> str:
    """The smallest and largest value of every weight: enough to tell models apart that should be the same."""
    return str([[float(value) for value in p.detach().aminmax()] for p in model.parameters() if p.numel()])


def _log(report: Report) -> None:
    """Say once, through logging, what is not as the user might expect; the report has it all."""
    for note in report.notes:
        _LOG.warning(note)
    for name, count in report.fallbacks.items():
        _LOG.warning("%d layers needed a fallback: %s", count, name)


def calibrate(config: QuantConfig, dataset: Any, tokenizer: Any, model_config: Any) -> Calibration:
    """The calibration batches; none for a run that needs none.

    Raises:
        CalibrationError: no text was given, or it cannot be used.
    """
    methods = {config.method} | {
        s["method"] for s in config.override.values() if isinstance(s, dict) and "method" in s
    }
    if methods == {"rtn"}:
        return Calibration(batches=[], fingerprint="none", tokens=0, sequences=0, source="none")
    if dataset is None:
        raise CalibrationError(
            "no dataset was given, and GPTQ needs calibration text: pass a .txt, .jsonl or .parquet file, a list "
            "of strings, or a known name such as wikitext2 (or choose method rtn, which needs none)"
        )
    encoder_decoder = bool(getattr(model_config, "is_encoder_decoder", False))
    text_config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    return prepare(
        dataset,
        tokenizer,
        num_samples=config.num_samples,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        seed=config.seed,
        max_positions=getattr(text_config, "max_position_embeddings", None),
        vocab_size=getattr(text_config, "vocab_size", None),
        placeholders=_special_ids(model_config),
        decoder_start_token_id=_decoder_start(model_config) if encoder_decoder else None,
    )


def _special_ids(model_config: Any) -> set[int]:
    """Ids that stand for images or sound, such as ``image_token_id``, and may have no embedding."""
    settings: dict[str, Any] = getattr(model_config, "to_dict", dict)()
    named = [value for key, value in settings.items() if _PLACEHOLDER.match(key)]
    return {value for value in named if isinstance(value, int)}


def _decoder_start(model_config: Any) -> int:
    for key in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        value = getattr(model_config, key, None)
        if value is not None:
            return int(value)
    raise ModelError(
        "this encoder-decoder names no decoder_start_token_id in its config.json: add it, or give the data as token "
        "dicts with decoder_input_ids"
    )


def fingerprint_of(config: QuantConfig, calibration: Calibration, weights: str) -> dict[str, str]:
    """What decides the bytes of the result, each as a hash; `weights` is the source's own fingerprint."""
    settings = json.dumps(config.to_dict())  # unsorted: the order of overrides decides
    return {
        "fewbit version": __version__,
        "config": hashlib.sha256(settings.encode()).hexdigest(),
        "calibration data": calibration.fingerprint,
        "model": weights,
    }


def _meta(calibration: Calibration) -> dict[str, Any]:
    return {"calibration": calibration.fingerprint}


def quantization_config(
    config: QuantConfig, model: nn.Module, plan: Plan, meta: dict[str, Any]
) -> dict[str, Any]:
    """What config.json says of a model before its layers are replaced, in the names of the original files."""
    names = [layer.name for layer in plan.layers] + [item.name for item in plan.skipped]
    on_disk = names_on_disk(model, names)
    if config.target_bits is not None:
        bits, group_size = budget.stated(plan)
        config = replace(config, bits=bits, group_size=group_size)
    return build_quantization_config(
        config,
        {name: layer.settings for layer in plan.layers for name in on_disk[layer.name]},
        [name for item in plan.skipped for name in on_disk[item.name]],
        meta,
    )


def _model_name(model: str | Path) -> str:
    """For people: the Hub id, or the name of the folder or file."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else str(model)


def _text_name(dataset: Any) -> str:
    """For people: the name of a set or file, without its folder."""
    if dataset == "-":
        return "standard input"
    return Path(dataset).name if isinstance(dataset, (str, Path)) else "given texts"


def _upload(folder: Path, repository: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    hub = HfApi()
    try:
        hub.create_repo(repository, exist_ok=True)
        hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=f"Quantized with fewbit {__version__}",
            ignore_patterns=[REPORT_NAME, PAGE_NAME],  # they tell paths of this machine
        )
    except (HfHubHTTPError, OSError) as error:
        raise OutputError(
            f"{folder} is complete, but could not be uploaded to {repository}: {error}. "
            "Log in with `hf auth login` and upload the folder, or try again."
        ) from error


def _saved_files(*parts: Any) -> dict[str, bytes]:
    """What `save_pretrained` of each part writes, for models that came without such files."""
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            if part is not None:
                part.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def _silent(phase: str, done: int, total: int) -> None:
    """The progress callback of those who want none."""
