"""Mixed precision by budget: bits and group size for every layer, so that the model meets `target_bits`.

    groups (layers that share settings) ─ sensitivity (cost of each choice) ─ allocate (least cost that fits) ─ plan

`check_budget` refuses an impossible budget before any work; `choose_bits` returns the plan with its new settings.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..atomic_io import write_whole
from ..calibration import Calibration
from ..config import QuantConfig
from ..context import RunContext
from ..errors import ConfigError, OutputError, ResumeError
from ..pipeline.streaming import Weights
from ..planning import Plan, with_settings
from .allocate import Option, allocate
from .sensitivity import Costs, measure
from .settings_groups import Choice, make_groups, stored_bytes

__all__ = ["BudgetStore", "base_settings", "check_budget", "choose_bits"]

# vLLM and SGLang choose the Marlin kernel for a whole model if its configuration states one of these bits.
_MARLIN_BITS = (4, 8)


def check_budget(plan: Plan, config: QuantConfig) -> None:
    """Raises ConfigError if no choice meets `config.target_bits`; the message names the smallest possible."""
    if config.target_bits is None:
        return
    groups = make_groups(plan, config)
    least = sum(min(group.bytes(choice) for choice in group.choices) for group in groups)
    if least > _budget(plan, config.target_bits):
        raise ConfigError(
            f"target_bits {config.target_bits} cannot be met: with scales, zero points and overrides these layers take "
            f"at least {math.ceil(8000 * least / plan.weights) / 1000} bits per weight. Raise target_bits to that, or "
            "give fewer bits in override"
        )


def choose_bits(
    model: nn.Module,
    plan: Plan,
    calibration: Calibration,
    weights: Weights,
    ctx: RunContext,
    store: BudgetStore | None = None,
) -> tuple[Plan, list[str]]:
    """Choose bits and group sizes that meet `target_bits` at the least predicted KL divergence.

    Bits or a group size that an override gives a layer stay. Without `target_bits` the plan stays as it is. Rank 0
    chooses for all ranks.

    Args:
        model: model in evaluation mode, with its original weights; it is not changed.
        weights: weights of the model; gradients need them all at once.
        ctx: run; progress is called with the phase "measure".
        store: where a run that can be resumed keeps the choice.

    Returns:
        The plan with the chosen settings, and sentences about the choice.

    Raises:
        ConfigError: no choice meets the budget.
        ModelError: no gradients can be computed through the model.
        ResumeError: the stored choice is lost, and a new one differs from the settings of layers already solved.
    """
    chosen: tuple[Plan, list[str]] = plan, []
    if ctx.config.target_bits is not None and ctx.comm.is_leader:
        allocation = store.read() if store else None
        if allocation is None:
            weights.load_all()
            with ctx.profiler.time("measure"):
                allocation = _choose(model, plan, calibration, ctx, ctx.config.target_bits)
            if store:
                store.write(allocation)
        chosen = with_settings(plan, allocation.layers), list(allocation.notes)
    return ctx.comm.broadcast_object(chosen)


def base_settings(plan: Plan) -> Choice:
    """The bits and group size that a configuration states for the layers that no rule names.

    The most frequent ones by weights. vLLM and SGLang choose their kernels by them, once for the whole model: if
    any layer has 2 or 3 bits, the most frequent of these, so that they do not choose Marlin, which lacks them.
    """
    weights: Counter[Choice] = Counter()
    for layer in plan.layers:
        weights[Choice(layer.settings.bits, layer.settings.group_size)] += layer.weights
    kept = {choice: count for choice, count in weights.items() if choice.bits not in _MARLIN_BITS} or weights
    by_bits: Counter[int] = Counter()
    for choice, count in kept.items():
        by_bits[choice.bits] += count
    bits = by_bits.most_common(1)[0][0]
    return max((choice for choice in kept if choice.bits == bits), key=lambda choice: kept[choice])


def _choose(
    model: nn.Module, plan: Plan, calibration: Calibration, ctx: RunContext, target_bits: float
) -> Allocation:
    config, progress = ctx.config, ctx.progress
    check_budget(plan, config)
    groups = make_groups(plan, config)
    costs = measure(
        model, plan, groups, calibration, config.seed, lambda done, total: progress("measure", done, total)
    )
    options = [
        [Option(group.bytes(choice), cost) for choice, cost in zip(group.choices, of_group, strict=True)]
        for group, of_group in zip(groups, costs.by_group, strict=True)
    ]
    chosen = allocate(options, _budget(plan, target_bits))
    layers = {
        layer.name: group.choices[index]
        for group, index in zip(groups, chosen, strict=True)
        for layer in group.layers
    }
    predicted = sum(of_group[index] for of_group, index in zip(costs.by_group, chosen, strict=True))
    return Allocation(layers, tuple(_notes(plan, target_bits, layers, predicted, costs)))


def _budget(plan: Plan, target_bits: float) -> int:
    return int(target_bits * plan.weights / 8)


def _notes(
    plan: Plan, target: float, layers: Mapping[str, Choice], predicted: float, costs: Costs
) -> Sequence[str]:
    stored = sum(
        stored_bytes(layer.out_features, layer.in_features, layers[layer.name]) for layer in plan.layers
    )
    weights: Counter[int] = Counter()
    for layer in plan.layers:
        weights[layers[layer.name].bits] += layer.weights
    shares = ", ".join(f"{bits} bits {weights[bits] / plan.weights:.0%}" for bits in sorted(weights))
    notes = [
        f"bits chosen for a budget of {target:g}: {8 * stored / plan.weights:.3f} per weight ({shares} of the "
        f"weights); predicted KL divergence {predicted:.3f} nats per token, without correction"
    ]
    if costs.unreached:
        notes.append(
            f"no usable token reached {len(costs.unreached)} layers, for example {costs.unreached[0]}: their bits "
            "were chosen as if their weights mattered like the average weight"
        )
    return notes


@dataclass(frozen=True)
class Allocation:
    """A choice.

    Attributes:
        layers: layer → its bits and group size.
        notes: sentences about the choice.
    """

    layers: dict[str, Choice]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class BudgetStore:
    """The choice on disk, beside the journal, so that a resumed run uses the same one without measuring again.

    ``OUT/.fewbit/allocation.json`` holds the fingerprint of the run, the settings of every layer and the sentences
    about them, with a checksum. A file that is damaged or from other inputs counts as absent.

    Attributes:
        folder: folder of the journal.
        fingerprint: hashes of everything that decides the result.
        finished: layer that is already solved → its record, with its bits and group size.
    """

    folder: Path
    fingerprint: Mapping[str, str]
    finished: Mapping[str, Mapping[str, Any]]

    @property
    def path(self) -> Path:
        return self.folder / "allocation.json"

    def read(self) -> Allocation | None:
        """The stored choice; None if there is none that can be used."""
        if not self.path.is_file():
            return None
        checksum, _, text = self.path.read_bytes().decode(errors="replace").partition("\n")
        if checksum != _checksum(text):
            return None
        try:
            values = json.loads(text)
            if values["fingerprint"] != dict(self.fingerprint):
                return None
            layers = {name: Choice(*choice) for name, choice in values["layers"].items()}
            return Allocation(layers, tuple(values["notes"]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def write(self, allocation: Allocation) -> None:
        """Store a choice.

        Raises:
            ResumeError: it differs from what the finished layers have.
            OutputError: the disk is full or cannot be written.
        """
        for name, record in self.finished.items():
            if allocation.layers[name] != (record["bits"], record["group_size"]):
                raise ResumeError(
                    f"{self.path} was lost, and choosing again gives {name} other bits than it already has: "
                    f"delete {self.folder} to start again"
                )
        values = {
            "fingerprint": dict(self.fingerprint),
            "layers": allocation.layers,
            "notes": allocation.notes,
        }
        text = json.dumps(values, indent=1)
        try:
            write_whole(self.path, f"{_checksum(text)}\n{text}".encode())
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path}: {error.strerror}. Make room and run the same command again"
            ) from error


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
