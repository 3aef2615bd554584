"""What a run would do, need and take, before any work: every module, memory, disk, time, and what cannot work.

    preparation ─ trial ─ work, rates ─ predict ─ limits

- `trial`: one calibration batch runs through the first blocks: the bytes that it holds, seconds of a forward pass;
- `work`: scales this to all blocks and batches, and measures the rates of this machine;
- `predict`: disk, memory and time of the run;
- `limits`: compares memory and disk with what this machine has left.

The preparation and its checks are the same as in `fewbit.quantize`. If a check refuses, its message becomes a problem
of the estimate, and everything that does not depend on it continues.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from ..checkpoint.safetensors_file import TensorInfo, read_header
from ..checkpoint.writer import parse_size
from ..config import EVALUATION_TOKENS, QuantConfig
from ..context import RunContext, resolve_device
from ..distillation import SHARE
from ..distillation.data import fingerprint_of_run, text_of_run
from ..distributed import threads_per_process
from ..errors import FewbitError
from ..formatting import size
from ..mixed_precision import check_budget
from ..modeling.source import Source, open_source
from ..pipeline.journal import Journal, check_output
from ..pipeline.memory import DEVICE_FRAGMENTATION
from ..pipeline.offload import check_offload_dir
from ..pipeline.quantize_layers import arguments_for
from ..pipeline.streaming import StreamedWeights
from ..planning import Plan, output_embedding_name
from ..preparation import Preparation, check_processes
from ..profiling import Profiler, memory_in_use_bytes
from ..resources import device_left, existing, takes_at_most
from . import limits, predict
from .predict import InputCost, Memory, Sizes
from .trial import run_trial, tokens_of
from .work import LayerBenchmark, Work, measure_disk, of_one_process, offloaded, work_of

__all__ = ["Estimate", "estimate"]

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Estimate:
    """What a run would do and take.

    Attributes:
        processes: processes that share the run; memory and seconds are for each of them.
        plan: every weight matrix with its settings, or why it stays; None if the model cannot be opened.
        parameters: number of parameters of the model; None if it cannot be opened.
        memory: peak memory; None if a problem keeps it from being known.
        sizes: bytes on disk; None if a problem keeps them from being known.
        seconds: seconds by phase; None if a problem keeps them from being known.
        notes: sentences that a user should know.
        problems: why the run cannot work, each with what to do; empty if it can.
    """

    processes: int = 1
    plan: Plan | None = None
    parameters: int | None = None
    memory: Memory | None = None
    sizes: Sizes | None = None
    seconds: dict[str, float] | None = None
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def attempt(self, step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """What `step` returns; None if it refuses, which becomes a problem."""
        try:
            return step(*args, **kwargs)
        except FewbitError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))
            return None

    @property
    def works(self) -> bool:
        """Whether no problem is known."""
        return not self.problems

    @property
    def total_seconds(self) -> float | None:
        """Seconds of all phases."""
        return None if self.seconds is None else sum(self.seconds.values())

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits of the quantized layers, scales, zero points and g_idx included."""
        if self.plan is None or self.sizes is None:
            return None
        return 8 * self.sizes.quantized / self.plan.weights

    @property
    def model_bits_per_weight(self) -> float | None:
        """Stored bits per parameter of the whole model."""
        if self.parameters is None or self.sizes is None:
            return None
        return 8 * (self.sizes.quantized + self.sizes.plain) / self.parameters

    def modules(self) -> list[dict[str, Any]]:
        """Every weight matrix: what will happen to it, or why it stays as it is."""
        if self.plan is None:
            return []
        settings = ("bits", "group_size", "sym", "act_order", "method")
        planned = [
            {
                "name": layer.name,
                "shape": [layer.out_features, layer.in_features],
                **{key: getattr(layer.settings, key) for key in settings},
                "bytes": self.sizes.layers[layer.name] if self.sizes else None,
                "reason": None,
            }
            for layer in self.plan.layers
        ]
        kept = [
            dict.fromkeys(planned[0]) | {"name": item.name, "shape": list(item.shape), "reason": item.reason}
            for item in (*self.plan.skipped, *self.plan.others)
        ]
        return planned + kept

    def summary(self) -> dict[str, Any]:
        """The machine-readable result."""
        return {
            "modules": self.modules(),
            "peak_memory_bytes": self.memory.peak if self.memory else None,
            "output_bytes": self.sizes.output if self.sizes else None,
            "seconds": self.total_seconds,
            "problems": self.problems,
        }

    def details(self) -> dict[str, Any]:
        """What `summary` leaves out: parts, phases and notes."""
        memory, sizes = self.memory, self.sizes
        return {
            "processes": self.processes,
            "memory": {"moment": memory.moment, **memory.parts} if memory else None,
            "device_memory_bytes": memory.device_peak if memory else None,
            "disk_bytes": sizes.disk if sizes else None,
            "bits_per_weight": self.bits_per_weight,
            "model_bits_per_weight": self.model_bits_per_weight,
            "seconds_by_phase": self.seconds,
            "notes": self.notes,
        }


def estimate(
    model: str | Path,
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
    offload_dir: str | Path | None = None,
    processes: int = 1,
    **settings: Any,
) -> Estimate:
    """Estimate what `fewbit.quantize` would do with the same arguments. Writes nothing that stays.

    Takes a few seconds: one calibration batch runs through the first blocks, and a layer of every width is solved.

    Args:
        model: a folder, a ``.gguf`` file or a Hub id.
        config: settings, as a `QuantConfig` or a dict of its fields; the default is 4 bits, symmetric.
        dataset: calibration text. Without one the estimate takes as many tokens as `config` asks for.
        tokenizer: tokenizer for the text; by default the one beside the model.
        output: folder to write. Its disk is measured, and whether it can be used.
        device: "auto", "cpu", "cuda", "cuda:1", "xpu" or "mps".
        resume: continue an interrupted run found in `output`.
        max_shard_size: bytes, or text such as "5GB".
        trust_remote_code: run Python code that comes with the model.
        allow_pickle: read weights from .bin files.
        evaluate_on: a text on which the result is then measured.
        evaluate_tokens: tokens of that text at most.
        offload_dir: a folder for the activations of paused calibration batches.
        processes: number of processes of torchrun. Memory and time are then for each of them. All run on this machine:
            without GPUs they share its cores and its memory.
        settings: fields of `QuantConfig`, such as ``bits=3``, instead of `config`.

    Returns:
        What the run would do, need and take. `problems` has what would make it fail; nothing is raised for that.
    """
    config, found = QuantConfig.of(config, settings, estimate), Estimate(processes)
    folder, scratch = (None if path is None else Path(path) for path in (output, offload_dir))
    found.attempt(check_processes, dataset, processes)
    if found.problems:
        dataset = None
    if folder is not None:
        found.attempt(check_output, folder)
    if scratch is not None:
        found.attempt(check_offload_dir, scratch)
    found.attempt(parse_size, max_shard_size)
    where = found.attempt(resolve_device, device)
    source = found.attempt(open_source, model, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    if source is None or where is None:
        return found
    text = dataset
    if dataset is None and config.needs_calibration:
        text = [{"input_ids": torch.arange(config.seq_len) % 16}] * config.num_samples
        found.notes.append(
            f"no dataset was given: planned with {config.num_samples} sequences of {config.seq_len} tokens"
        )
    ctx = RunContext(config, where, profiler=Profiler(where), offload_dir=scratch)
    run = Preparation(ctx, source, text, tokenizer, evaluate_on, evaluate_tokens)
    if _prepare(found, run) and found.plan is not None:
        if dataset is not None and folder is not None:
            found.attempt(_check_resume, found, run, folder, resume)
        elif text is not None and run.text_tokenizer is None:
            found.notes.append("no tokenizer lies beside the model: text needs one, token ids do not")
        with _threads(processes if where.type == "cpu" else 1):
            _predict(found, run, folder, known_text=dataset is not None)
    found.notes = list(dict.fromkeys(found.notes))
    return found


def _prepare(found: Estimate, run: Preparation) -> bool:
    """Make everything that a run needs; return whether there is calibration data."""
    found.attempt(lambda: run.evaluation)
    calibration = found.attempt(lambda: run.calibration)
    if found.attempt(lambda: run.opened) is None:
        return False
    found.plan, found.parameters = found.attempt(lambda: run.plan), run.origin.parameters
    found.notes += [*(calibration.notes if calibration else ()), *run.notes]
    if found.plan is not None:
        found.notes += found.plan.notes
        found.attempt(check_budget, found.plan, run.ctx.config)
    if calibration is not None:
        found.attempt(text_of_run, run)
    return calibration is not None


def _check_resume(found: Estimate, run: Preparation, folder: Path, resume: bool) -> None:
    """Check that an interrupted run in the output folder can be resumed."""
    if not folder.exists() or not check_output(folder):
        return
    journal = Journal(folder, fingerprint_of_run(run, text_of_run(run)), resume)
    journal.close()
    found.notes.append(
        f"goes on with an interrupted run, in which {len(journal.records)} layers are done; the times are those of "
        "a new one"
    )


def _predict(found: Estimate, run: Preparation, folder: Path | None, *, known_text: bool) -> None:
    """Disk, memory and time."""
    ctx, source, plan, calibration = run.ctx, run.source, run.plan, run.calibration
    (model, weights), device = run.opened, run.weights.device
    assert isinstance(source, Source)
    load_seconds = ctx.profiler.seconds["load"]
    head = output_embedding_name(model)
    if any(layer.name == head for layer in plan.layers):
        weights.untie(f"{head}.weight")
    shards, baseline = weights.shard_sizes(), memory_in_use_bytes()
    if not isinstance(weights, StreamedWeights) and device.type == "cpu":
        baseline -= sum(shards.values())  # counted as weights
    found.sizes = sizes = found.attempt(predict.sizes_of, weights, plan, ctx.config, source)
    if folder is not None and sizes is not None:
        found.problems += limits.disk_problems(folder, sizes)
    too_large = limits.shard_problems(shards, device) if source.streams else []
    found.problems += too_large
    longest: Mapping[str, torch.Tensor] = max(calibration.batches, key=tokens_of, default={})
    batch = found.attempt(arguments_for, model, longest, device)
    if too_large or sizes is None or batch is None:
        return
    trial = found.attempt(run_trial, model, weights, plan, batch, ctx.profiler)
    if trial is None:
        return
    work, dtype = work_of(model, plan, ctx.config, calibration, trial), next(model.parameters()).dtype
    if found.processes > 1:
        work = of_one_process(work, found.processes, len(calibration.batches))
    if ctx.offload_dir is not None:
        work = offloaded(work, trial, dtype)
        found.problems += limits.offload_problems(ctx.offload_dir, work.disk * found.processes)
    file, tensor = _largest_tensor(source)
    found.memory = _memory(found, run, work, shards, (baseline, tensor.nbytes if tensor else 0))
    found.problems += limits.memory_problems(found.memory, memory_in_use_bytes(), ctx, found.processes)
    disk = found.attempt(measure_disk, existing(folder or Path()), file, tensor)
    if disk is None:
        return
    inputs = InputCost(
        calibration=ctx.profiler.seconds["calibration"] if known_text else 0.0,
        load=load_seconds,
        source_bytes=sum(path.stat().st_size for path in source.weight_files()),
        weight_bytes=sum(shards.values()),
        prefetch=source.streams and device.type != "cpu",
    )
    rates = LayerBenchmark(ctx.config, dtype, device, work.paths, work.holdout).rates(plan.layers)
    found.seconds = predict.predict_seconds(work, trial, rates, disk, sizes, inputs)
    if ctx.config.loss_aware:
        found.seconds["gradients"] = predict.gradient_seconds(model, plan, calibration, trial)
    if ctx.config.tune:
        found.seconds["tuning"] = predict.tuning_seconds(ctx.config, trial)
    if ctx.config.distill:
        found.seconds["distillation"] = predict.distillation_seconds(model, plan, ctx.config, trial)


def _memory(
    found: Estimate, run: Preparation, work: Work, shards: Mapping[str, int], process: tuple[int, int]
) -> Memory:
    """The worst moment. `process` has the bytes of this process now, and of the largest tensor that it reads."""
    model, config, device = run.model, run.ctx.config, run.weights.device
    moments = predict.run_moments(work, shards, next(model.parameters()).dtype)
    moments |= predict.option_moments(model, config, run.calibration, work, shards)
    if config.loss_aware:
        moments = predict.loss_aware_moments(moments, run, work, shards)
    evaluation = run.__dict__.get("evaluation")
    if evaluation is not None:
        moments["evaluation"] = predict.evaluation_moment(model, evaluation.windows.shape[1])
    if config.distill:
        kept = predict.distillation_kept(run.plan)
        moments["distilling"] = predict.distillation_moment(
            model, run.plan, kept if takes_at_most(SHARE, kept, device) else 0
        )
    options = {"target_bits": config.target_bits, "evaluation": evaluation is not None}
    left_out = [name for name, used in options.items() if used]
    if left_out:
        found.notes.append(f"the time of {' and '.join(left_out)} is not included")
    if device.type == "cpu":
        return predict.host_memory(moments, shards, *process)
    left = device_left(device)
    free = round((1 - DEVICE_FRAGMENTATION) * left.bytes) if left else None
    memory = predict.device_memory(moments, shards, *process, free)
    if memory.host_activations:
        found.notes.append(
            f"{size(memory.host_activations)} of activations have no room on the device and will wait in host "
            "memory; the time to move them is not included"
        )
    return memory


def _largest_tensor(source: Source) -> tuple[Path, TensorInfo | None]:
    """The file with the largest tensor of the source, and that tensor; None for files without a header."""
    files = source.weight_files()
    readable = (path for path in files if path.suffix == ".safetensors")
    found = [(path, info) for path in readable for info in read_header(path)[0].values()]
    return max(found, key=lambda item: item[1].nbytes) if found else (files[0], None)


@contextmanager
def _threads(processes: int) -> Iterator[None]:
    """While entered, torch uses as many threads as each of `processes` on this machine would."""
    before, threads = torch.get_num_threads(), threads_per_process(processes) if processes > 1 else None
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
