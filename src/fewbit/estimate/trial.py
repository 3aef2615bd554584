"""The trial: one calibration batch through the first blocks, by the model's own code and the walk's own machinery.

It shows what cannot be known from shapes: how many bytes a paused batch holds at every layer, which layers get
the same input, how long a block's forward takes here, how fast weights are read. One block of every kind runs,
and what lies before it; nothing is changed.
"""

from __future__ import annotations

import re
import statistics
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling.experts import UnfusedExperts, unfused_modules
from ..modeling.layers import input_rows
from ..pipeline.expert_calibration import ExpertCalibration
from ..pipeline.quantize_layers import without_cache
from ..pipeline.scheduler import BlockCall, Hooks, LayerInput, Scheduler
from ..pipeline.statistics import CACHED_HESSIANS, BatchMasks
from ..pipeline.streaming import StreamedWeights, Weights
from ..planning import LayerPlan, Plan, block_of
from ..profiling import Profiler
from .live import HEAP_BYTES, LiveBytes

# Of a batch so many tokens are used that a block does about so many operations on them, but no fewer than that.
_OPERATIONS, _FEWEST_TOKENS = 1.5e11, 256

# A block's forward is repeated until so much time has passed, or so often.
_SECONDS, _REPEATS = 0.5, 5


@dataclass(frozen=True)
class Stop:
    """What one batch shows of a layer.

    Attributes:
        rows: of its input. held: bytes that the batch holds while it waits there; heap: those of them that come from
            the C library's heap.
        new: those of them that were made since the stop before.
        first: the layer that got the very same input first; the layer itself if it is the first.
    """

    rows: int
    held: int
    heap: int
    new: int
    first: str


@dataclass
class Trial:
    """What one batch shows of a model.

    Attributes:
        kinds: block that was tried → all blocks that are like it. Layers outside of blocks are in none.
        tokens: of the batch that ran, padding counted. stops: layers of the blocks that were tried, without experts.
        seconds: block that was tried → forward of the batch through it.
        transient: most bytes in use inside a forward, beyond those held where it pauses next.
        load_rate: seconds to read a byte of weights; None where they are all in memory.
        choices: experts that a token is sent to; 0 without experts.
    """

    kinds: dict[str, list[str]]
    tokens: int
    stops: dict[str, Stop] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    transient: int = 0
    load_rate: float | None = None
    choices: int = 0


def run_trial(
    model: nn.Module, weights: Weights, plan: Plan, batch: Mapping[str, Tensor], profiler: Profiler
) -> Trial:
    """Run `batch` (on the weights' device) through the first blocks.

    Args:
        weights: of `model`; what was read is given back at the end.
        batch: empty for a run without calibration.
        profiler: the weights' own.
    """
    kinds, whole = block_kinds(plan), tokens_of(batch)
    batch = _shortened(batch, plan, kinds)
    trial = Trial(kinds, tokens_of(batch))
    if not batch:  # a run without calibration reads its weights and nothing else
        _read_some(weights, trial, profiler)
        return trial
    experts = unfused_modules(model)
    layers = [layer for layer in plan.layers if layer.block in trial.kinds and not of_expert(layer, experts)]
    modules = {layer.name: model.get_submodule(layer.name) for layer in layers}
    routing = ExpertCalibration(model, [BatchMasks.of(batch)])
    points = routing.with_points(_with_experts(modules, plan, trial, model))
    points = {name: module for name, module in points.items() if name in modules or name in routing.points}
    blocks = {b: model.get_submodule(b) for b in trial.kinds if any(n.startswith(f"{b}.") for n in modules)}
    extra = without_cache(model)

    def job() -> object:
        return model(**batch, **extra)

    def on_block_end(name: str, calls: list[BlockCall]) -> dict[int, Any]:
        trial.seconds[name] = _median_seconds(blocks[name], calls[0], weights.device)
        return {}

    with torch.no_grad(), weights.on_demand(lambda unit: None):
        with _load_rate(weights, trial, profiler):
            Scheduler(points, [job], Hooks(lambda name, inputs: None, on_block_end), blocks=blocks).run()
        second = _first_of_second_block(trial, layers, plan)
        for name in second:
            weights.load(name)  # not to be counted
        with LiveBytes(HEAP_BYTES * trial.tokens // whole) as live:
            observer = _Observer(trial, modules, live, second)
            points |= {name: model.get_submodule(name) for name in second}
            Scheduler(points, [job], Hooks(observer.on_layer)).run()
        trial.transient = max(0, live.peak - max((stop.held for stop in trial.stops.values()), default=0))
    weights.release_except([])
    return trial


def block_kinds(plan: Plan) -> dict[str, list[str]]:
    """The first block of every kind → all blocks of that kind: layers of the same names, shapes and settings.

    Layers outside of blocks are kinds of their own only where nothing else is to be quantized.
    """
    blocks: dict[str, list[LayerPlan]] = {}
    for layer in plan.layers:
        blocks.setdefault(layer.block, []).append(layer)
    inside = {block: layers for block, layers in blocks.items() if layers[0].name != block}
    kinds: dict[Any, list[str]] = {}
    for block, layers in (inside or blocks).items():
        shapes = tuple(
            (layer.name[len(block) :], layer.out_features, layer.in_features, layer.settings)
            for layer in layers
        )
        kinds.setdefault((re.sub(r"\d+", "#", block), shapes), []).append(block)
    return {alike[0]: alike for alike in kinds.values()}


def of_expert(layer: LayerPlan, experts: Mapping[str, UnfusedExperts]) -> bool:
    """Whether a layer belongs to an expert of these modules."""
    return layer.name.rsplit(".", 2)[0] in experts


def tokens_of(batch: Mapping[str, Tensor]) -> int:
    """Tokens in a batch, padding counted; 1 where it holds none."""
    counts = [value.numel() for key, value in batch.items() if key.endswith("input_ids")]
    return max(counts, default=1)


def _shortened(
    batch: Mapping[str, Tensor], plan: Plan, kinds: Mapping[str, list[str]]
) -> Mapping[str, Tensor]:
    """The beginning of every sequence, where all of the batch are tokens and whole sequences would take long."""
    weights = max(sum(layer.weights for layer in plan.layers if layer.block == block) for block in kinds)
    shapes = {tensor.shape for tensor in batch.values()}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 2:
        return batch
    tokens = max(_FEWEST_TOKENS, int(_OPERATIONS / (2 * weights)))
    length = max(1, tokens // shape[0])
    return {key: tensor[:, :length] for key, tensor in batch.items()}


@dataclass
class _Observer:
    """Looks at what arrives at a layer.

    In the first block the model's input is that of the block as well; from the second on it is held besides. So
    what the layer named in `second` finds more than its like is added to the first block.
    """

    trial: Trial
    modules: Mapping[str, nn.Module]
    live: LiveBytes
    second: Mapping[str, str]
    last: list[tuple[str, weakref.ref[Tensor]]] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)

    def on_layer(self, name: str, inputs: Sequence[LayerInput]) -> None:
        held, heap, x = self.live.now, self.live.heap, inputs[0].x
        if name in self.second:
            self.add_to_first(self.second[name], held, heap)
            return
        if name not in self.modules:  # a routing point
            self.trial.choices = x.shape[-1]
            return
        alive = self.live.alive()
        new = sum(size for key, size in alive.items() if key not in self.seen)
        self.seen = set(alive)
        first = next((other for other, seen in self.last if seen() is x), name)
        self.last = (
            [*self.last[1 - CACHED_HESSIANS :], (name, weakref.ref(x))] if first == name else self.last
        )
        self.trial.stops[name] = Stop(input_rows(self.modules[name], x).shape[0], held, heap, new, first)

    def add_to_first(self, alike: str, held: int, heap: int) -> None:
        """Add to all stops seen so far what is held now, and was not at the stop `alike`."""
        like = self.trial.stops[alike]
        more = max(0, held - like.held), max(0, heap - like.heap)
        block = block_of(alike)
        for name, stop in self.trial.stops.items():
            if block_of(name) == block:
                self.trial.stops[name] = replace(stop, held=stop.held + more[0], heap=stop.heap + more[1])


def _first_of_second_block(trial: Trial, tried: Sequence[LayerPlan], plan: Plan) -> dict[str, str]:
    """The first layer of the second block → its like in the first; nothing if there is no second one of the kind."""
    block = tried[0].block if tried else ""
    alike = trial.kinds.get(block, [])
    name = tried[0].name.replace(block, alike[1], 1) if len(alike) > 1 else ""
    return {layer.name: tried[0].name for layer in plan.layers if layer.name == name}


def _with_experts(
    modules: Mapping[str, nn.Module], plan: Plan, trial: Trial, model: nn.Module
) -> dict[str, nn.Module]:
    """The layers of the tried blocks with their experts, in the order of the plan."""
    names = (layer.name for layer in plan.layers if layer.block in trial.kinds)
    return {name: modules.get(name) or model.get_submodule(name) for name in names}


def _median_seconds(block: nn.Module, call: BlockCall, device: torch.device) -> float:
    found: list[float] = []
    while len(found) < _REPEATS and sum(found) < _SECONDS:
        start = time.perf_counter()
        block(*call.args, **call.kwargs)
        synchronize(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type in ("cuda", "xpu"):
        getattr(torch, device.type).synchronize(device)


@contextmanager
def _load_rate(weights: Weights, trial: Trial, profiler: Profiler) -> Iterator[None]:
    """Find the seconds for each byte that is read inside."""
    before, read = profiler.seconds.get("load", 0.0), _read_bytes(weights)
    yield
    read = _read_bytes(weights) - read
    trial.load_rate = (profiler.seconds["load"] - before) / read if read else None


def _read_some(weights: Weights, trial: Trial, profiler: Profiler) -> None:
    with _load_rate(weights, trial, profiler):
        weights.load(next(iter(trial.kinds)))
    weights.release_except([])


def _read_bytes(weights: Weights) -> int:
    return weights.read_bytes if isinstance(weights, StreamedWeights) else 0
