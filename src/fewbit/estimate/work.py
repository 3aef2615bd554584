"""What a run will have to do, layer by layer: the trial's sight of a few blocks, carried over to all of them."""

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
from .trial import Trial, of_expert, tokens_of


@dataclass(frozen=True)
class LayerWork:
    """What one layer will take.

    Attributes:
        rows: that enter its Hessian. shares: whether an earlier layer of its block got the same input.
        held: bytes that all batches together hold while they wait here. heap: those of them from the C library's heap.
    """

    layer: LayerPlan
    rows: int
    shares: bool
    held: int
    heap: int


@dataclass(frozen=True)
class Work:
    """What a whole run will take.

    Attributes:
        layers: those that are calibrated, and those of method rtn, in the order of the plan.
        tokens: of all batches, padding counted. batches: how many times the trial's batch they are.
        streams: forward passes of every batch, 1 or 2.
        probe: held-out rows that judge every layer. held_out: share of the rows that enter no Hessian.
        transient: most bytes in use inside the forward of one batch, beyond those held.
        scratch: bytes of activations that lie on disk at most, and `spilled`, that are written there in all; 0 where
            they stay in memory.
        processes: that share the run. BatchMasks, batches and bytes are those of the one that has most.
    """

    layers: list[LayerWork]
    tokens: int
    batches: float
    streams: int
    probe: int
    held_out: float
    transient: int
    scratch: int = 0
    spilled: int = 0
    processes: int = 1


def work_of(
    model: nn.Module, plan: Plan, config: QuantConfig, calibration: Calibration, trial: Trial
) -> Work:
    """Carry what one batch showed over to all layers and all batches."""
    tokens = sum(tokens_of(batch) for batch in calibration.batches)
    batches = tokens / trial.tokens
    streams = 2 if needs_full_precision(config) else 1
    share = _held_out_share(calibration) if streams == 2 else 0.0
    experts = unfused_modules(model)
    like = {block: tried for tried, blocks in trial.kinds.items() for block in blocks}
    most = max(((stop.held, stop.heap) for stop in trial.stops.values()), default=(0, 0))
    layers = []
    for layer in plan.layers:
        tried = like.get(layer.block, "")
        stop = trial.stops.get(tried + layer.name[len(layer.block) :])
        if stop is not None:
            rows, held, shares = (
                round(stop.rows * batches),
                (stop.held, stop.heap),
                not _is_first(stop.first, tried, layer),
            )
        elif of_expert(layer, experts):
            rows, held, shares = _expert_rows(layer, experts, tokens, trial.choices), most, False
            shares = layer.name.endswith(".up_proj") and experts_are_gated(layer, experts)
        else:  # outside of blocks, or reached by no token of the trial
            rows, held, shares = tokens, most, False
        rows = round(rows * (1 - share))
        of_all = [round(size * batches * streams) for size in held]
        layers.append(LayerWork(layer, rows, shares, *of_all))
    probe = min(HOLDOUT_TOKENS, round(tokens * share))
    return Work(layers, tokens, batches, streams, probe, share, trial.transient)


def of_one_process(work: Work, processes: int, batches: int) -> Work:
    """What one of so many processes will have to do, the one with most of the `batches` of calibration text."""
    share = -(-batches // processes) / batches if batches else 0.0
    layers = [
        replace(one, rows=round(share * one.rows), held=round(share * one.held), heap=round(share * one.heap))
        for one in work.layers
    ]
    return replace(work, layers=layers, batches=share * work.batches, processes=processes)


def offloaded(work: Work, trial: Trial, dtype: torch.dtype) -> Work:
    """The same work with the activations of paused batches on disk: in memory are those of the one that runs, and
    the inputs that a Hessian goes through.
    """
    passes = work.batches * work.streams
    layers = []
    for one in work.layers:
        inputs = RESIDENT_STORAGES * trial.tokens * one.layer.in_features * dtype.itemsize
        layers.append(replace(one, held=round(one.held / passes) + inputs, heap=0))
    new = sum(
        stop.new * len(trial.kinds[block])
        for block in trial.kinds
        for name, stop in trial.stops.items()
        if block_of(name) == block
    )
    scratch = max((one.held for one in work.layers), default=0)
    return replace(work, layers=layers, scratch=scratch, spilled=round(new * passes))


def experts_are_gated(layer: LayerPlan, experts: Mapping[str, UnfusedExperts]) -> bool:
    """Whether the expert of `layer` has a gate, which gets the same input as its up projection."""
    module, number, _ = layer.name.rsplit(".", 2)
    return hasattr(experts[module].get_submodule(number), "gate_proj")


def _is_first(first: str, tried: str, layer: LayerPlan) -> bool:
    return first[len(tried) :] == layer.name[len(layer.block) :]


def _expert_rows(layer: LayerPlan, experts: Mapping[str, UnfusedExperts], tokens: int, choices: int) -> int:
    """Tokens that reach an expert if all get as many; a starved one also sees others."""
    module = experts[layer.name.rsplit(".", 2)[0]]
    sent = tokens * choices // module.num_experts
    return max(sent, min(tokens, TOKENS_PER_FEATURE * module.hidden_size))


def _held_out_share(calibration: Calibration) -> float:
    rows = split_holdout([BatchMasks.of(batch) for batch in calibration.batches])
    sequences = sum(one.sequences for one in rows)
    return sum(one.held_out for one in rows) / sequences if sequences else 0.0
