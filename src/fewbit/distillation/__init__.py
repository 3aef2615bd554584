"""`distill`: train the scales of a finished checkpoint until its logits are nearer to the original model's.

    checkpoint ─ student (scales, norms, biases) ─┐
    original   ─ teacher (logits)                ─┴ training (KL, Adam, held-out judge) ─ the same files, other scales

The codes, zero points and group order stay as they are. So the result is the same kind of checkpoint, of the same size,
for the same engines. Layer-wise quantization sees one layer's outputs at a time; this sees the loss of the whole model.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..calibration import prepare
from ..calibration.sequences import collate
from ..checkpoint import manifest
from ..checkpoint.layout import PARTS, QWEIGHT, SCALES
from ..checkpoint.reader import open_weights, read_config
from ..checkpoint.safe_io import files_beside_weights
from ..checkpoint.writer import CONFIG, MARKER, QUANTIZE_CONFIG, CheckpointWriter
from ..context import Progress, no_progress, resolve_device
from ..errors import CalibrationError, ConfigError, ModelError, OutputError
from ..hf.load import load
from ..hf.quantized_layers import FileNames, quantized_layers
from ..modeling.source import Source, open_source
from ..pipeline.journal import check_output
from ..report.report import PAGE_NAME, REPORT_NAME, write_text
from .student import Student
from .teacher import logits_of, open_teacher
from .training import Point, Training, in_turns

STATE = Path(".fewbit") / "distillation.safetensors"
_HELD_OUT_SHARE, _MOST_HELD_OUT = 16, 16


@dataclass(frozen=True)
class DistillConfig:
    """Settings of a distillation.

    Attributes:
        tokens: tokens to train on.
        seq_len: tokens in a sequence.
        batch_size: sequences in a step.
        rate: peak learning rate, as a relative change of a scale in one step; None chooses by the bits.
        seed: chooses the sequences and their order.
        dtype: dtype of the activations; "auto" keeps the checkpoint's.

    Raises:
        ConfigError: a value is out of range.
    """

    tokens: int = 500_000
    seq_len: int = 512
    batch_size: int = 2
    rate: float | None = None
    seed: int = 0
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name in ("tokens", "seq_len", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1; got {value!r}")
        if self.rate is not None and not 0 < self.rate < 1:
            raise ConfigError(f"rate must lie between 0 and 1 (both excluded); got {self.rate!r}")


@dataclass(frozen=True)
class Distillation:
    """Result of a distillation.

    Attributes:
        output: folder of the checkpoint.
        before: mean KL of the held-out sequences before training, in nats per token.
        after: the same of the state that was kept.
        kept: whether training made it smaller; if not, the tensors are those of the source.
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
        return asdict(self)


def distill(
    checkpoint: str | Path,
    against: str | Path,
    dataset: Any,
    output: str | Path,
    config: DistillConfig | None = None,
    *,
    device: str = "auto",
    max_shard_size: int | str = "5GB",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Distillation:
    """Train the scales, norm weights and biases of a GPTQ checkpoint against the original model's logits.

    An interrupted run continues, with the same result.

    Args:
        checkpoint: folder of the checkpoint, written by any tool.
        against: the original model: a folder or Hub id.
        dataset: text to train on, in any form that `fewbit.calibration.prepare` takes. It needs no labels.
        output: folder to write; it must be new, empty, or hold an interrupted run of the same inputs.
        config: settings.
        device: "auto", "cpu", "cuda" and so on.
        max_shard_size: bytes, or text such as "5GB".
        trust_remote_code: run Python code that comes with the models.
        progress: callback, called as ``progress("distill", steps done, steps)``.

    Raises:
        FewbitError: a subclass says what is wrong, where, and what to do next.
    """
    started = time.perf_counter()
    config, folder, target = config or DistillConfig(), Path(checkpoint), Path(output)
    check_output(target)
    where = resolve_device(device)
    source = open_source(against, trust_remote_code=trust_remote_code)
    model = load(folder, where, config.dtype, "reference", trust_remote_code)
    names = _model_names(model, folder)
    student = Student(model, set(names.values()))
    data = _data(dataset, source, folder, model, config)
    facts = [
        asdict(config),
        data.fingerprint,
        Source(folder).fingerprint(),
        source.fingerprint(),
        __version__,
    ]
    with open_teacher(source, _teacher_dtype(source, where), where) as (teacher, run_teacher):
        _check_vocabularies(model, teacher)
        training = Training(
            student,
            logits_of(model),
            run_teacher,
            [_to(batch, where) for batch in data.batches],
            [_to(batch, where) for batch in data.held_out],
            config.rate or _rate(model),
            target / STATE,
            hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
            progress or no_progress,
        )
        with student.training():
            training.run()
            trained = {name: value.cpu() for name, value in student.values().items()}
    before, best = training.curve[0], training.best
    result = Distillation(
        str(target),
        before.held_out,
        best.held_out,
        best.step > 0,
        tuple(training.curve),
        training.curve[-1].tokens,
        sum(tensor.d.numel() for tensor in student.tensors),
        time.perf_counter() - started,
        (*data.notes, *_notes(student, best, training.curve)),
    )
    _write(
        folder,
        target,
        {on_disk: trained[name] for on_disk, name in names.items() if name in trained},
        max_shard_size,
    )
    _report(folder, target, result, source.name, config)
    (target / STATE).unlink(missing_ok=True)
    (target / STATE).parent.rmdir()
    return result


@dataclass(frozen=True)
class _Data:
    """Training batches, one for each step, and the batches that judge."""

    batches: list[dict[str, Tensor]]
    held_out: list[dict[str, Tensor]]
    fingerprint: str
    notes: tuple[str, ...]


def _data(dataset: Any, source: Source, folder: Path, model: nn.Module, config: DistillConfig) -> _Data:
    tokenizer = source.load_tokenizer() or Source(folder).load_tokenizer()
    settings: Any = model.config
    text = settings.get_text_config()
    wanted = -(-config.tokens // config.seq_len)
    judges = min(_MOST_HELD_OUT, max(2, wanted // _HELD_OUT_SHARE))
    found = prepare(
        dataset,
        tokenizer,
        num_samples=wanted + judges,
        seq_len=config.seq_len,
        seed=config.seed,
        max_positions=getattr(text, "max_position_embeddings", None),
        vocab_size=getattr(text, "vocab_size", None),
    )
    sequences, notes = found.batches, list(found.notes)
    if len(sequences) < 2:
        raise CalibrationError(
            "distillation needs sequences to learn from and others to judge by, but there is only one: give more text"
        )
    judges = min(judges, max(1, len(sequences) // 8))
    train, held_out = sequences[:-judges], sequences[-judges:]
    tokens = sum(batch["input_ids"].numel() for batch in train)
    steps = max(1, round(config.tokens / (tokens / len(train)) / config.batch_size))
    rounds = steps * config.batch_size / len(train)
    if rounds > 1.01:
        notes.append(
            f"the text has {tokens:,} tokens to train on: each was used {rounds:.1f} times; more text is better"
        )
    pad = getattr(tokenizer, "pad_token_id", None)
    turns = in_turns(len(train), steps, config.batch_size, config.seed)
    batches = [collate([train[i] for i in chosen], pad) for chosen in turns]
    return _Data(batches, held_out, found.fingerprint, tuple(notes))


def _to(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in batch.items()}


def _rate(model: nn.Module) -> float:
    """The peak rate: coarser grids need larger changes."""
    return 2e-3 if min(layer.bits for _, layer in quantized_layers(model)) == 2 else 1e-3


def _teacher_dtype(source: Source, device: torch.device) -> str:
    """bfloat16 where the device multiplies it fast: its rounding is far below the error of quantization."""
    from .student import product_dtype

    return (
        str(product_dtype(device, torch.float32)).removeprefix("torch.") if device.type == "cpu" else "auto"
    )


def _check_vocabularies(student: nn.Module, teacher: nn.Module) -> None:
    sizes = [getattr(model.config.get_text_config(), "vocab_size", None) for model in (student, teacher)]  # type: ignore[union-attr,operator]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"the checkpoint has a vocabulary of {sizes[0]} and the original model one of {sizes[1]}: they are not "
            "the same model"
        )


def _model_names(model: Any, folder: Path) -> dict[str, str]:
    """Name in the files → name in the model, of tensors that are the same in both: parameters, and scales of layers."""
    tensors = open_weights(folder).tensors
    layers = [name.removesuffix(f".{QWEIGHT}") for name in tensors if name.endswith(f".{QWEIGHT}")]
    names = FileNames(model, layers)
    result = {}
    for name in tensors:
        layer, _, part = name.rpartition(".")
        is_packed = layer in set(layers) and part in PARTS
        if is_packed and part != SCALES:
            continue
        renamed, merged = names.rename(f"{layer}.weight" if is_packed else name)
        if not merged:
            result[name] = f"{renamed.removesuffix('.weight')}.{SCALES}" if is_packed else renamed
    return result


def _write(folder: Path, target: Path, replaced: Mapping[str, Tensor], max_shard_size: int | str) -> None:
    """Write the checkpoint in `folder` with other values for the tensors `replaced`."""
    if (target / CONFIG).exists():  # killed between the last file and the end of the run
        manifest.require(target)
        (target / MARKER).unlink(missing_ok=True)
        return
    config, found, _, _ = read_config(folder)
    weights = open_weights(folder)
    left_out = (CONFIG, QUANTIZE_CONFIG, manifest.NAME, REPORT_NAME, PAGE_NAME)
    extra = {name: path for name, path in files_beside_weights(folder).items() if name not in left_out}
    meta: Any = found.get("meta")
    meta = {**(meta if isinstance(meta, dict) else {}), "distilled": f"fewbit:{__version__}"}
    with CheckpointWriter(target, weights.tensors, max_shard_size) as writer:
        for name in weights.tensors:
            writer.add(name, replaced[name] if name in replaced else weights.tensor(name))
        writer.finish(config, {**found, "meta": meta}, extra)


def _report(folder: Path, target: Path, result: Distillation, teacher: str, config: DistillConfig) -> None:
    """Write the report: the one of the checkpoint, where it has one, with the distillation added."""
    path = folder / REPORT_NAME
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    values["distillation"] = {"against": teacher, "config": asdict(config), **result.to_dict()}
    write_text(target / REPORT_NAME, json.dumps(values, indent=1) + "\n")


def _notes(student: Student, best: Point, curve: list[Point]) -> list[str]:
    notes = []
    if student.left_out:
        notes.append(
            f"{len(student.left_out)} convolutions keep their scales, for example {student.left_out[0]}"
        )
    if best.step == 0:
        notes.append(
            "training did not lower the KL of the held-out sequences: the scales are those of the source"
        )
    elif best.step < curve[-1].step:
        notes.append(
            f"the held-out KL was lowest after {best.step} of {curve[-1].step} steps: that state was kept"
        )
    return notes
