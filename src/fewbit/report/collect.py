"""The report of a run: what was done to every layer, what was not done and why, what it cost.

Written as ``fewbit_report.json`` beside the checkpoint. Times and memory live here and nowhere else,
so that the checkpoint itself is the same bytes for the same inputs.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..calibration import Calibration
from ..config import QuantConfig
from ..errors import OutputError
from ..plan import Plan

REPORT_NAME = "fewbit_report.json"


@dataclass(frozen=True)
class Report:
    """Result of one quantization run.

    Attributes:
        output: folder of the checkpoint, or None for a model quantized in memory.
        layers: one record per quantized layer (see `walk.quantizer.LayerRecord`).
        skipped: weight matrices left as they are: name, shape, reason.
        bits_per_weight: stored bits of the quantized layers (codes, scales, zeros, g_idx) per weight.
        fallbacks: kind of fallback → number of layers that needed it; empty in the normal case.
        notes: everything a user should know, in sentences.
        seconds: total and by phase. peak_memory_bytes: of the process; None where unknown.
        evaluation: results of `--eval`, if asked for.
    """

    output: str | None
    config: dict[str, Any]
    fingerprint: dict[str, str]
    calibration: dict[str, Any]
    layers: tuple[dict[str, Any], ...]
    skipped: tuple[dict[str, Any], ...]
    bits_per_weight: float
    fallbacks: dict[str, int]
    notes: tuple[str, ...]
    seconds: float
    seconds_by_phase: dict[str, float]
    peak_memory_bytes: int | None
    resumed_layers: int
    versions: dict[str, str]
    evaluation: dict[str, Any] | None = field(default=None)

    @property
    def modules(self) -> int:
        """Number of quantized layers."""
        return len(self.layers)

    def summary(self) -> dict[str, Any]:
        """What ``fewbit quantize --json`` prints."""
        return {
            "output": self.output,
            "modules": self.modules,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "seconds": round(self.seconds, 2),
            "peak_memory_bytes": self.peak_memory_bytes,
            "fallbacks": self.fallbacks,
            "report": str(Path(self.output) / REPORT_NAME) if self.output else None,
            **({"eval": self.evaluation} if self.evaluation else {}),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def write(self, folder: Path) -> Path:
        """Write ``fewbit_report.json`` into `folder`."""
        path = folder / REPORT_NAME
        temporary = path.with_name(f".{REPORT_NAME}.tmp")
        try:
            temporary.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:
            raise OutputError(
                f"cannot write {path}: {error.strerror}. The checkpoint beside it is complete; make room and run "
                "the same command again for the report."
            ) from error
        return path


def collect(
    *,
    output: Path | None,
    config: QuantConfig,
    plan: Plan,
    records: Mapping[str, Mapping[str, Any]],
    fingerprint: Mapping[str, str],
    calibration: Calibration,
    notes: list[str],
    seconds: float,
    seconds_by_phase: Mapping[str, float],
    resumed_layers: int,
) -> Report:
    """Put a report together from the plan and the records of its layers."""
    layers = tuple(dict(records[layer.name]) for layer in plan.layers)
    stored_bits = 8 * sum(layer["stored_bytes"] for layer in layers)
    fallbacks = Counter(name for layer in layers for name in layer["fallbacks"])
    return Report(
        output=str(output) if output else None,
        config=config.to_dict(),
        fingerprint=dict(fingerprint),
        calibration={
            "source": calibration.source,
            "sequences": calibration.sequences,
            "tokens": calibration.tokens,
        },
        layers=layers,
        skipped=tuple(asdict(item) for item in plan.skipped),
        bits_per_weight=stored_bits / plan.weights,
        fallbacks=dict(fallbacks),
        notes=tuple(notes),
        seconds=seconds,
        seconds_by_phase={phase: round(value, 3) for phase, value in seconds_by_phase.items()},
        peak_memory_bytes=peak_memory_bytes(),
        resumed_layers=resumed_layers,
        versions=versions(),
    )


def peak_memory_bytes() -> int | None:
    """Largest resident size this process has had; None on Windows."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Versions that matter for a bug report."""
    import transformers

    return {
        "fewbit": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
