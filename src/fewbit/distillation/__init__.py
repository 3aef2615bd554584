"""`distill`: train the scales of a finished checkpoint until its logits are nearer to the original model's.

    checkpoint ─ student (scales, norms, biases) ─┐
    original   ─ teacher (logits)                ─┴ training (KL, Adam, held-out judge) ─ the same files, other scales

The codes, zero points and group order stay as they are. So the result is the same kind of checkpoint, of the same size,
for the same engines. Layer-wise quantization sees one layer's outputs at a time; this sees the loss of the whole model.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..checkpoint.writer import PAGE_NAME, REPORT_NAME, parse_size
from ..config import Dtype, QuantConfig
from ..context import RunContext, computing_dtype, resolve_device
from ..distributed import open_communicator
from ..errors import ConfigError, ModelError
from ..hf.load import load
from ..hf.quantized_layers import quantized_layers
from ..modeling.source import Source, open_source
from ..pipeline.journal import FOLDER, Journal, check_output
from ..progress import Progress, no_progress, progress_of
from ..report.page import page
from ..report.report import write_text
from ..report.reproduce import without_folders
from ..resources import takes_at_most
from .data import DistillConfig, DistillData, distill_data
from .rewrite import model_names, rewrite, vectors
from .student import Student, bytes_kept
from .teacher import logits_of, open_teacher
from .training import Point, Training

__all__ = ["DistillConfig", "Distillation", "distill", "distill_into"]

_STATE = "distillation.safetensors"  # in the journal's folder
SHARE = 0.5  # of the free memory that what makes training faster may take


@dataclass(frozen=True)
class Distillation:
    """Result of a distillation.

    Attributes:
        output: folder of the checkpoint.
        before: mean KL of the held-out sequences before training, in nats per token.
        after: the same of the state that was kept.
        kept: whether training made it smaller; if not, the tensors are the ones of the source.
        curve: loss during the training.
        tokens: tokens trained on.
        trained: number of trained values.
        seconds: time of the run since it was last started.
        notes: sentences for the user.
    """

    output: str
    before: float
    after: float
    kept: bool
    curve: tuple[Point, ...]
    tokens: int
    trained: int
    seconds: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def distill(
    checkpoint: str | Path,
    against: str | Path,
    dataset: Any,
    output: str | Path,
    config: DistillConfig | None = None,
    *,
    device: str = "auto",
    resume: bool = True,
    max_shard_size: int | str = "5GB",
    trust_remote_code: bool = False,
    progress: Progress | bool | None = True,
) -> Distillation:
    """Train the scales, norm weights and biases of a GPTQ checkpoint against the original model's logits.

    An interrupted run continues, with the same result. Several processes, as under torchrun, share each batch.

    Args:
        checkpoint: folder of the checkpoint, written by any tool.
        against: the original model: a folder or Hub id.
        dataset: text to train on, in any form that `fewbit.calibration.prepare` takes. It needs no labels.
        output: folder to write; it must be new, empty, or hold an interrupted run of the same inputs.
        config: settings.
        device: "auto", "cpu", "cuda" and so on.
        resume: continue an interrupted run found in `output`; False refuses it.
        max_shard_size: bytes, or text such as "5GB".
        trust_remote_code: run Python code that comes with the models.
        progress: as for `fewbit.quantize`; the callback is called as ``progress("distill", steps done, steps)``.

    Raises:
        FewbitError: a subclass says what is wrong, where, and what to do next.
    """
    config, folder, target = config or DistillConfig(), Path(checkpoint), Path(output)
    source = open_source(against, trust_remote_code=trust_remote_code)
    if source.gguf is not None or folder.resolve() == target.resolve():
        raise ConfigError(
            "distillation compares a checkpoint folder with a model folder, and writes to a third one; "
            f"got {folder}, {against} and {target}"
        )
    parse_size(max_shard_size)
    own = Source(folder)
    with open_communicator() as comm:
        if comm.is_leader:
            check_output(target)
        tokenizer = source.load_tokenizer() or own.load_tokenizer()
        data = distill_data(dataset, tokenizer, source.load_config(), config)
        fingerprint = {
            "fewbit version": __version__,
            "settings": json.dumps(asdict(config)),
            "text": data.fingerprint,
            "checkpoint": own.fingerprint(),
            "original model": source.fingerprint(),
        }
        comm.assert_same(**fingerprint)
        journal = Journal(target, fingerprint, resume) if comm.is_leader else None
        try:
            ctx = RunContext(
                QuantConfig(), resolve_device(device), comm, progress=progress_of(progress, "distill")
            )
            result = distill_into(target, folder, source, data, config, ctx, max_shard_size)
            if journal is not None:
                _add_to_report(folder, target, result, source.name, config)
                journal.remove()
        finally:
            if journal is not None:
                journal.close()
    return result


def distill_into(
    target: Path,
    folder: Path,
    source: Source,
    data: DistillData,
    config: DistillConfig,
    ctx: RunContext,
    max_shard_size: int | str = "5GB",
) -> Distillation:
    """Distill the checkpoint in `folder` into `target`, which holds the journal of the run."""
    started, where, comm = time.perf_counter(), ctx.device, ctx.comm
    dtype = training_dtype(where) if config.dtype == "auto" else config.dtype
    model = load(folder, where, dtype, "reference", source.trust_remote_code)
    names = model_names(model, folder)
    with open_teacher(source, dtype, where) as (teacher, run_teacher):
        _check_vocabularies(model, teacher)
        shapes = [(layer.in_features, layer.out_features) for _, layer in quantized_layers(model)]
        kept = bytes_kept(shapes, config.batch_size * config.seq_len, model.dtype)
        student = Student(model, vectors(folder, names), keep=takes_at_most(SHARE, kept, where))
        training = Training(
            student,
            logits_of(model),
            run_teacher,
            data.batches,
            data.held_out,
            rate=config.rate or _rate(model),
            device=where,
            state_file=target / FOLDER / _STATE,
            comm=comm,
            progress=ctx.progress if comm.is_leader else no_progress,
        )
        with student.training():
            training.run()
    if comm.is_leader:
        values = training.values
        replaced = {on_disk: values[name].cpu() for on_disk, name in names.items() if name in values}
        rewrite(folder, target, replaced, max_shard_size)
    before, best, last = training.curve[0], training.best, training.curve[-1]
    return Distillation(
        output=str(target),
        before=before.held_out,
        after=best.held_out,
        kept=best.step > 0,
        curve=tuple(training.curve),
        tokens=last.tokens,
        trained=sum(tensor.d.numel() for tensor in student.tensors),
        seconds=time.perf_counter() - started,
        notes=(*data.notes, *_notes(student, best, last)),
    )


def _rate(model: nn.Module) -> float:
    """The peak rate: coarser grids need larger changes."""
    return 2e-3 if min(layer.bits for _, layer in quantized_layers(model)) == 2 else 1e-3


def training_dtype(device: torch.device) -> Dtype:
    """bfloat16 where the device multiplies it fast: its rounding is far below the error of quantization."""
    fast = device.type in ("cpu", "cuda") and computing_dtype(torch.bfloat16, device) is torch.bfloat16
    return "bfloat16" if fast else "float32"


def _check_vocabularies(student: nn.Module, teacher: nn.Module) -> None:
    configs: list[Any] = [student.config, teacher.config]
    sizes = [getattr(config.get_text_config(), "vocab_size", None) for config in configs]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"the checkpoint has a vocabulary of {sizes[0]} and the original model one of {sizes[1]}: they are not "
            "the same model"
        )


def _add_to_report(
    folder: Path, target: Path, result: Distillation, teacher: str, config: DistillConfig
) -> None:
    """Write the report of the checkpoint, where it has one, with the distillation added."""
    path = folder / REPORT_NAME
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known = {"against": without_folders(teacher), "output": target.name}
    values["distillation"] = {"config": asdict(config), **result.to_dict(), **known}
    write_text(target / REPORT_NAME, json.dumps(values, indent=1) + "\n")
    if "layers" in values:
        write_text(target / PAGE_NAME, page(values))


def _notes(student: Student, best: Point, last: Point) -> list[str]:
    notes = []
    if student.left_out:
        notes.append(
            f"{len(student.left_out)} convolutions keep their scales, for example {student.left_out[0]}"
        )
    if best.step == 0:
        notes.append(
            "training did not lower the KL of the held-out sequences: the scales are those of the source"
        )
    elif best.step < last.step:
        notes.append(
            f"the held-out KL was lowest after {best.step} of {last.step} steps: that state was kept"
        )
    return notes
