"""The answer of `forecast`, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..planning import Plan
from .memory import Memory
from .sizes import Sizes


@dataclass(frozen=True)
class Forecast:
    """What a run would do and take.

    Attributes:
        plan: every weight matrix with its settings, or why it stays; None where the model cannot be opened.
        memory, sizes: bytes. seconds: by phase. None where a problem keeps them from being known.
        processes: that share the run; memory and seconds are those of each.
        notes: what a user should know. problems: why it cannot work, each with what to do; empty if it can.
    """

    plan: Plan | None
    memory: Memory | None
    sizes: Sizes | None
    seconds: dict[str, float] | None
    notes: tuple[str, ...]
    problems: tuple[str, ...]
    processes: int = 1

    @property
    def works(self) -> bool:
        """Whether nothing is known that would keep the run from its end."""
        return not self.problems

    @property
    def total_seconds(self) -> float | None:
        """All phases."""
        return None if self.seconds is None else sum(self.seconds.values())

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits of the quantized layers, scales, zero points and g_idx included."""
        if self.plan is None or self.sizes is None:
            return None
        return 8 * self.sizes.quantized / self.plan.weights

    def modules(self) -> list[dict[str, Any]]:
        """Every weight matrix: what will happen to it, or why it stays as it is."""
        if self.plan is None:
            return []
        planned = [
            {
                "name": layer.name,
                "shape": [layer.out_features, layer.in_features],
                "bits": layer.settings.bits,
                "group_size": layer.settings.group_size,
                "sym": layer.settings.sym,
                "act_order": layer.settings.act_order,
                "method": layer.settings.method,
                "bytes": self.sizes.layers[layer.name] if self.sizes else None,
                "reason": None,
            }
            for layer in self.plan.layers
        ]
        kept = [
            dict.fromkeys(planned[0]) | {"name": item.name, "shape": list(item.shape), "reason": item.reason}
            for item in self.plan.skipped
        ]
        return planned + kept

    def summary(self) -> dict[str, Any]:
        """The machine-readable result."""
        return {
            "modules": self.modules(),
            "peak_memory_bytes": self.memory.peak if self.memory else None,
            "output_bytes": self.sizes.output if self.sizes else None,
            "seconds": self.total_seconds,
            "problems": list(self.problems),
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
            "seconds_by_phase": self.seconds,
            "notes": list(self.notes),
        }
