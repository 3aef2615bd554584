"""What a run has to do, layer by layer: what the trial saw of a few blocks, carried over to all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..calibration import Calibration
from ..config import QuantConfig
from ..modeling.experts import UnfusedExperts, unfused_modules
from ..pipeline.expert_calibration import TOKENS_PER_FEATURE
from ..pipeline.memory import RESIDENT_STORAGES
from ..pipeline.quantize_layers import needs_full_precision
from ..pipeline.statistics import HOLDOUT_TOKENS, BatchMasks, split_holdout
from ..planning import LayerPlan, Plan, block_of
from .trial import Trial, is_expert, tokens_of


@dataclass(frozen=True)
class LayerWork:
    """What one layer takes.

    Attributes:
        layer: the layer.
        rows: rows that enter its Hessian.
        shares: True if an earlier layer of its block gets the same input.
        held: bytes that all batches together hold while paused here.
        arena: part of `held` in the C library's arena.
    """

    layer: LayerPlan
    rows: int
    shares: bool
    held: int
    arena: int


@dataclass(frozen=True)
class Work:
    """What a whole run takes.

    Attributes:
        layers: layers in the order of the plan.
        batches: tokens of all batches, as a multiple of the trial's tokens.
        paths: forward passes of every batch, 1 or 2.
        holdout: holdout rows that judge every layer.
        transient: largest number of bytes in use inside the forward pass of one batch, beyond those held.
        disk: largest number of bytes of activations on disk; 0 if they stay in memory.
        offloaded: bytes of activations written to disk over the whole run.
        processes: processes that share the run; rows, batches and bytes are those of the one that has most.
    """

    layers: list[LayerWork]
    batches: float
    paths: int
    holdout: int
    transient: int
    disk: int = 0
    offloaded: int = 0
    processes: int = 1

    def held(self) -> LayerWork:
        """The layer at which the batches hold most."""
        return max(self.layers, key=lambda one: one.held)


def work_of(
    model: nn.Module, plan: Plan, config: QuantConfig, calibration: Calibration, trial: Trial
) -> Work:
    """Carry what one batch showed over to all layers and all batches."""
    tokens = sum(tokens_of(batch) for batch in calibration.batches)
    batches, paths = tokens / trial.tokens, 2 if needs_full_precision(config) else 1
    held_out = _holdout_share(calibration) if paths == 2 else 0.0
    experts = unfused_modules(model)
    tried = {block: first for first, blocks in trial.kinds.items() for block in blocks}
    most = max(((pause.held, pause.arena) for pause in trial.pauses.values()), default=(0, 0))
    layers = []
    for layer in plan.layers:
        block = tried.get(layer.block, "")
        own = layer.name[len(layer.block) :]
        pause = trial.pauses.get(block + own)
        rows, (held, arena), shares = tokens, most, False  # outside of blocks, or not reached by the trial
        if pause is not None:
            rows, held, arena = round(pause.rows * batches), pause.held, pause.arena
            shares = pause.first[len(block) :] != own
        elif is_expert(layer, experts):
            rows = _expert_rows(layer, experts, tokens, trial.experts_per_token)
            shares = own.endswith(".up_proj") and _has_gate(layer, experts)
        passes = batches * paths
        layers.append(
            LayerWork(
                layer, round(rows * (1 - held_out)), shares, round(held * passes), round(arena * passes)
            )
        )
    holdout = min(HOLDOUT_TOKENS, round(tokens * held_out))
    return Work(layers, batches, paths, holdout, trial.transient)


def of_one_process(work: Work, processes: int, batches: int) -> Work:
    """The work of the process that has most of the `batches`."""
    share = -(-batches // processes) / batches if batches else 0.0
    layers = [
        replace(
            one, rows=round(share * one.rows), held=round(share * one.held), arena=round(share * one.arena)
        )
        for one in work.layers
    ]
    return replace(work, layers=layers, batches=share * work.batches, processes=processes)


def offloaded(work: Work, trial: Trial, dtype: torch.dtype) -> Work:
    """The same work with the activations of paused batches on disk.

    In memory remain those of the batch that runs, and the inputs that a Hessian accumulates.
    """
    passes = work.batches * work.paths
    layers = []
    for one in work.layers:
        inputs = RESIDENT_STORAGES * trial.tokens * one.layer.in_features * dtype.itemsize
        layers.append(replace(one, held=round(one.held / passes) + inputs, arena=0))
    new = sum(
        pause.new * len(blocks)
        for block, blocks in trial.kinds.items()
        for name, pause in trial.pauses.items()
        if block_of(name) == block
    )
    disk = max((one.held for one in work.layers), default=0)
    return replace(work, layers=layers, disk=disk, offloaded=round(new * passes))


def _has_gate(layer: LayerPlan, experts: Mapping[str, UnfusedExperts]) -> bool:
    """Whether the expert of `layer` has a gate, which gets the same input as its up projection."""
    module, number, _ = layer.name.rsplit(".", 2)
    return hasattr(experts[module].get_submodule(number), "gate_proj")


def _expert_rows(layer: LayerPlan, experts: Mapping[str, UnfusedExperts], tokens: int, choices: int) -> int:
    """Tokens that reach an expert under balanced routing; an under-routed expert also sees tokens of others."""
    module = experts[layer.name.rsplit(".", 2)[0]]
    sent = tokens * choices // module.num_experts
    return max(sent, min(tokens, TOKENS_PER_FEATURE * module.hidden_size))


def _holdout_share(calibration: Calibration) -> float:
    masks = split_holdout([BatchMasks.of(batch) for batch in calibration.batches])
    sequences = sum(one.sequences for one in masks)
    return sum(one.held_out for one in masks) / sequences if sequences else 0.0
