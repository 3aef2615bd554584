"""The report of a run: the result of every layer, the skipped weights and the reasons, time and memory.

`Report.write` writes ``fewbit_report.json`` and the page ``fewbit_report.html`` beside the checkpoint. Only these two
files contain times, memory and paths, so the checkpoint has the same bytes for the same inputs.
"""

from __future__ import annotations

import html
import json
import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import __version__, formatting
from ..atomic_io import write_whole
from ..checkpoint.writer import PAGE_NAME, REPORT_NAME
from ..engines import ENGINES, of_plan, unsupported_reasons
from ..errors import OutputError
from ..planning import Plan
from ..preparation import Origin, Preparation
from .page import page


@dataclass(frozen=True, repr=False)
class Report:
    """Result of one quantization run.

    Attributes:
        output: folder of the checkpoint; None for a model quantized in memory.
        model: the model before the run, see `Origin`.
        config: settings, see `QuantConfig`.
        fingerprint: hashes of the inputs of the run.
        calibration: source, number of sequences and number of tokens.
        layers: one `pipeline.layer_quantizer.LayerRecord` per quantized layer.
        skipped: name, shape and reason of each weight matrix that was not quantized.
        bits_per_weight: stored bits per quantized weight, with scales, zero points and g_idx.
        quantized_bytes: size of the quantized layers.
        result_bytes: size of all weights of the result.
        fallbacks: kind of fallback → number of layers that needed it.
        notes: sentences for the user.
        plan_notes: the notes that depend on the model and the settings only.
        seconds: time of the quantization.
        seconds_by_phase: time of each phase, with the phases inside it.
        phases: time and memory of each phase, see `profiling.Phase`.
        peak_memory_bytes: peak memory of the largest process until the checkpoint was written; None where unknown.
        resumed_layers: number of layers from an interrupted run, whose records describe that run.
        versions: versions of fewbit, its dependencies and the platform.
        command: command that repeats the run.
        published_command: the same without the folders of paths.
        ranks: number of processes; times are from rank 0.
        evaluation: results of `--eval`: ``dataset``, ``base`` and ``quantized``; None without it.
        distillation: result of `--distill` with its curve, see `distillation.Distillation`; None without it.
        engines: name of an engine → reasons why it cannot load the result; empty where it can.
    """

    output: str | None
    model: dict[str, Any]
    config: dict[str, Any]
    fingerprint: dict[str, str]
    calibration: dict[str, Any]
    layers: tuple[dict[str, Any], ...]
    skipped: tuple[dict[str, Any], ...]
    bits_per_weight: float
    quantized_bytes: int
    result_bytes: int
    fallbacks: dict[str, int]
    notes: tuple[str, ...]
    plan_notes: tuple[str, ...]
    seconds: float
    seconds_by_phase: dict[str, float]
    phases: tuple[dict[str, Any], ...]
    peak_memory_bytes: int | None
    resumed_layers: int
    versions: dict[str, str]
    command: str
    published_command: str
    ranks: int = 1
    evaluation: dict[str, Any] | None = None
    distillation: dict[str, Any] | None = None
    engines: dict[str, list[str]] = field(default_factory=dict)

    @property
    def model_bits_per_weight(self) -> float:
        """Stored bits per parameter of the whole model: embeddings and everything else that was left, included."""
        parameters: int = self.model["parameters"]
        return 8 * self.result_bytes / parameters

    @property
    def modules(self) -> int:
        """Number of quantized layers."""
        return len(self.layers)

    def __repr__(self) -> str:
        kl = self.evaluation["quantized"]["kl"] if self.evaluation else None
        before, after = self.model["bytes"], self.result_bytes
        facts = [
            formatting.plural(self.modules, "layer"),
            f"{self.bits_per_weight:.2f} bits per weight",
            f"{formatting.size(before)} → {formatting.size(after)}",
            "KL not measured" if kl is None else f"KL {kl:.4f} ({formatting.verdict(kl)})",
            *(f"{count} × {name}" for name, count in self.fallbacks.items()),
        ]
        where = f" → {self.output}" if self.output else ""
        return f"<Report {self.model['name']}{where}: {', '.join(facts)}>"

    def _repr_html_(self) -> str:
        """The page, in a frame: what notebooks show."""
        return f'<iframe srcdoc="{html.escape(page(self.published()))}" width="100%" height="640"></iframe>'

    def summary(self) -> dict[str, Any]:
        """The JSON that ``fewbit quantize --json`` prints."""
        return {
            "output": self.output,
            "modules": self.modules,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "model_bits_per_weight": round(self.model_bits_per_weight, 4),
            "seconds": round(self.seconds, 2),
            "peak_memory_bytes": self.peak_memory_bytes,
            "fallbacks": self.fallbacks,
            "report": str(Path(self.output) / REPORT_NAME) if self.output else None,
            **({"eval": self.evaluation} if self.evaluation else {}),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as in ``fewbit_report.json``."""
        return asdict(self)

    def published(self) -> dict[str, Any]:
        """What the files hold: `to_dict` without folders, because people upload it."""
        values = self.to_dict()
        values["command"] = values.pop("published_command")
        return values | {"output": Path(self.output).name if self.output else None}

    def write(self, folder: Path) -> Path:
        """Write ``fewbit_report.json`` and ``fewbit_report.html`` into `folder`; returns the first.

        Raises:
            OutputError: the disk is full or cannot be written.
        """
        values = self.published()
        write_text(folder / PAGE_NAME, page(values))
        return write_text(folder / REPORT_NAME, json.dumps(values, indent=1) + "\n")


@dataclass(frozen=True)
class RunResult:
    """Outcome of a run.

    Attributes:
        plan: the plan with the settings that were used.
        records: layer name → `pipeline.layer_quantizer.LayerRecord`.
        notes: sentences for the user.
        command: command that repeats the run.
        published_command: the same without the folders of paths.
        output: folder of the checkpoint; None for a model quantized in memory.
        resumed_layers: number of layers taken from an interrupted run.
        peak_memory_bytes: peak memory of the largest process; None where unknown.
        distillation: a `distillation.Distillation` in plain JSON types; None without it.
    """

    plan: Plan
    records: Mapping[str, Mapping[str, Any]]
    notes: list[str]
    command: str
    published_command: str
    output: Path | None
    resumed_layers: int
    peak_memory_bytes: int | None
    distillation: dict[str, Any] | None = None


def collect(run: Preparation, result: RunResult) -> Report:
    """Build the report from the inputs and the outcome of a run."""
    plan, calibration, profiler = result.plan, run.calibration, run.ctx.profiler
    layers = tuple(dict(result.records[layer.name]) for layer in plan.layers)
    stored_bytes = sum(layer["stored_bytes"] for layer in layers)
    fallbacks = Counter(name for layer in layers for name in layer["fallbacks"])
    contents = of_plan(plan, run.ctx.config)
    return Report(
        output=str(result.output) if result.output else None,
        model=asdict(run.origin),
        config=run.ctx.config.to_dict(),
        fingerprint=run.fingerprint if result.output else {},
        calibration={
            "source": calibration.source,
            "sequences": calibration.sequences,
            "tokens": calibration.tokens,
        },
        layers=layers,
        skipped=tuple(asdict(item) for item in (*plan.skipped, *plan.others)),
        bits_per_weight=8 * stored_bytes / plan.weights,
        quantized_bytes=stored_bytes,
        result_bytes=_result_bytes(result.output, run.origin, plan, stored_bytes),
        fallbacks=dict(fallbacks),
        notes=tuple(result.notes),
        plan_notes=plan.notes,
        seconds=profiler.elapsed,
        seconds_by_phase={phase: round(value, 3) for phase, value in profiler.seconds.items()},
        phases=tuple(profiler.to_list()),
        peak_memory_bytes=result.peak_memory_bytes,
        resumed_layers=result.resumed_layers,
        versions=versions(),
        command=result.command,
        published_command=result.published_command,
        ranks=run.ctx.comm.world_size,
        distillation=result.distillation,
        engines={entry.name: unsupported_reasons(entry, contents) for entry in ENGINES},
    )


def write_text(path: Path, text: str) -> Path:
    """Replace the file at `path` in one step.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror}. The checkpoint beside it is complete; make room and run "
            "the same command again for the report."
        ) from error
    return path


def versions() -> dict[str, str]:
    """Versions for a bug report."""
    import transformers

    return {
        "fewbit": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _result_bytes(output: Path | None, origin: Origin, plan: Plan, stored_bytes: int) -> int:
    """Size of the weight files; in memory, of the quantized layers and the other parameters."""
    if output is not None:
        return sum(path.stat().st_size for path in output.glob("*.safetensors"))
    width: int = getattr(torch, origin.dtype).itemsize
    return origin.bytes - plan.weights * width + stored_bytes
