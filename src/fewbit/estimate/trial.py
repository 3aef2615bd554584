"""The trial: one calibration batch through the first blocks, by the model's own code and the pipeline's scheduler.

It measures what shapes do not tell: the bytes that a paused batch holds at every layer, the layers with the same input,
the seconds of a block's forward pass and of reading its weights. One block of every kind runs, after everything in
front of it. The model does not change. `work` scales the result to all blocks and all batches.
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
from torch import Tensor, UntypedStorage, nn

from ..errors import ModelError
from ..hf.fuse import fast_attention
from ..modeling.experts import RoutedExperts, routed_modules
from ..modeling.layers import input_rows
from ..pipeline.expert_calibration import ExpertCalibration
from ..pipeline.quantize_layers import UnchangedWeights, forward_job
from ..pipeline.scheduler import BlockCall, Hooks, LayerInput, Scheduler
from ..pipeline.statistics import CACHED_HESSIANS, BatchMasks
from ..pipeline.streaming import StreamedWeights, Weights
from ..planning import LayerPlan, Plan, block_of
from ..profiling import Profiler
from ..torch_internals import EveryOperation

# A batch is cut so that a block does about this many operations on it, but not below this many tokens.
_OPERATIONS, _FEWEST_TOKENS = 1.5e11, 256

# A block's forward pass is repeated until this many seconds have passed, or this often.
_SECONDS, _REPEATS = 0.5, 5

# Smaller storages may stay in the C library's arena when they are freed; larger ones return to the system at once.
ARENA_BYTES = 1 << 25


class LiveBytes(EveryOperation):  # type: ignore[no-untyped-call]
    """While entered, counts the bytes of every tensor storage that an operation makes, until it is freed.

    Storages that existed before are not counted, nor what a library allocates inside one operation.

    Attributes:
        now: bytes in use.
        peak: largest value of `now` so far.
        arena: bytes in use in storages smaller than `arena_bytes`.
    """

    def __init__(self, arena_bytes: int = ARENA_BYTES) -> None:
        super().__init__(lambda func, inputs: None, self._count_new)
        self._arena_bytes = arena_bytes
        self.now = self.peak = self.arena = 0
        self._known: dict[int, weakref.ref[UntypedStorage]] = {}

    def alive(self) -> dict[int, int]:
        """Id of each counted storage that is in use → its bytes."""
        found = ((key, reference()) for key, reference in self._known.items())
        return {key: storage.nbytes() for key, storage in found if storage is not None}

    def _count_new(self, inputs: list[UntypedStorage], outputs: list[UntypedStorage]) -> None:
        given = {id(storage) for storage in inputs}
        for storage in outputs:
            if id(storage) not in given and id(storage) not in self._known:
                self._count(storage)

    def _count(self, storage: UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        in_arena = size if size < self._arena_bytes else 0

        def freed(_: object) -> None:
            self._known.pop(key, None)
            self.now -= size
            self.arena -= in_arena

        # torch keeps one Python object for a storage as long as the storage lives.
        self._known[key] = weakref.ref(storage, freed)
        self.now += size
        self.arena += in_arena
        self.peak = max(self.peak, self.now)


@dataclass(frozen=True)
class Pause:
    """What one batch shows where it pauses at a layer.

    Attributes:
        rows: rows of the layer's input.
        held: bytes that the batch holds while paused.
        arena: part of `held` in the C library's arena.
        new: part of `held` made since the pause before.
        first: layer that got the same input first; the layer itself if it is the first.
    """

    rows: int
    held: int
    arena: int
    new: int
    first: str


@dataclass
class Trial:
    """What one batch shows of a model.

    Attributes:
        kinds: block that ran → all blocks of the same kind; layers outside of blocks belong to none.
        tokens: tokens of the batch, padding included.
        pauses: layer of the blocks that ran → what was seen there; layers of experts are left out.
        seconds: block that ran → seconds of its forward pass.
        transient: largest number of bytes in use inside a forward pass, beyond those held at the next pause.
        load_rate: seconds to read one byte of weights; None if they are all in memory.
        experts_per_token: experts that each token is sent to; 0 without experts.
    """

    kinds: dict[str, list[str]]
    tokens: int
    pauses: dict[str, Pause] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    transient: int = 0
    load_rate: float | None = None
    experts_per_token: int = 0

    @property
    def forward_seconds(self) -> float:
        """Seconds of the batch's forward pass through all blocks."""
        return sum(seconds * len(self.kinds[block]) for block, seconds in self.seconds.items())


def run_trial(
    model: nn.Module, weights: Weights, plan: Plan, batch: Mapping[str, Tensor], profiler: Profiler
) -> Trial:
    """Run `batch` through the first blocks. It is on the weights' device, or empty for a run without calibration.

    Weights that are read are released again; `profiler` is the one that the weights report to.
    """
    kinds, whole = block_kinds(plan), tokens_of(batch)
    batch = _shortened(batch, plan, kinds)
    trial = Trial(kinds, tokens_of(batch))
    if not batch:  # a run without calibration only reads its weights
        with _load_rate(weights, trial, profiler):
            weights.load(next(iter(kinds)))
        weights.release_except([])
        return trial
    experts, routing = routed_modules(model), ExpertCalibration(model, [BatchMasks.of(batch)])
    tried = [layer for layer in plan.layers if layer.block in kinds]
    layers = {layer.name: layer for layer in tried if not is_expert(layer, experts)}
    points = routing.with_points({layer.name: model.get_submodule(layer.name) for layer in tried})
    points = {name: module for name, module in points.items() if name in layers or name in routing.points}
    inside = (layer.block for layer in layers.values() if layer.block != layer.name)
    blocks = {name: model.get_submodule(name) for name in inside}
    job = forward_job(model, batch)

    def on_block_end(name: str, calls: list[BlockCall]) -> dict[int, Any]:
        try:
            trial.seconds[name] = _median_seconds(blocks[name], calls[0], weights.device)
        except (RuntimeError, TypeError, ValueError, LookupError) as error:
            raise ModelError(
                f"{name} cannot be run a second time with the same inputs, which plan and --tune need: {error}"
            ) from error
        return {}

    unchanged = UnchangedWeights(model)
    with torch.no_grad(), fast_attention(model), weights.on_demand(lambda shard: None):
        with _load_rate(weights, trial, profiler):
            Scheduler(points, [job], Hooks(lambda name, inputs: None, on_block_end), blocks=blocks).run()
            unchanged.check()
        second = _first_of_second_block(kinds, list(layers.values()), plan)
        for name in second:
            weights.load(name)  # before counting begins
        with LiveBytes(ARENA_BYTES * trial.tokens // whole) as live:
            observer = _Observer(trial, {name: points[name] for name in layers}, live, second)
            points |= {name: model.get_submodule(name) for name in second}
            Scheduler(points, [job], Hooks(observer.on_layer)).run()
        trial.transient = max(0, live.peak - max((pause.held for pause in trial.pauses.values()), default=0))
    weights.release_except([])
    return trial


def block_kinds(plan: Plan) -> dict[str, list[str]]:
    """The first block of every kind → all blocks of that kind: layers of the same names, shapes and settings.

    Layers outside of blocks are kinds only if nothing else is quantized.
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
    return {same[0]: same for same in kinds.values()}


def tokens_of(batch: Mapping[str, Tensor]) -> int:
    """Tokens in a batch, padding included; 1 if it holds none."""
    return max((value.numel() for key, value in batch.items() if key.endswith("input_ids")), default=1)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type in ("cuda", "xpu"):
        getattr(torch, device.type).synchronize(device)


def is_expert(layer: LayerPlan, experts: Mapping[str, RoutedExperts]) -> bool:
    """Return whether a layer belongs to one of these mixtures of experts."""
    return layer.name.rsplit(".", 2)[0] in experts


def _shortened(
    batch: Mapping[str, Tensor], plan: Plan, kinds: Mapping[str, list[str]]
) -> Mapping[str, Tensor]:
    """The beginning of every sequence, if the batch holds nothing but tokens and whole sequences would take long."""
    weights = max(sum(layer.weights for layer in plan.layers if layer.block == block) for block in kinds)
    shapes = {tensor.shape for tensor in batch.values()}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 2:
        return batch
    tokens = max(_FEWEST_TOKENS, int(_OPERATIONS / (2 * weights)))
    length = max(1, tokens // shape[0])
    return {key: tensor[:, :length] for key, tensor in batch.items()}


@dataclass
class _Observer:
    """Records a `Pause` at every layer.

    In the first block the block's input is the model's input; in later blocks both are alive. The difference is
    measured at the first layer of the second block and added to the pauses of the first block.
    """

    trial: Trial
    modules: Mapping[str, nn.Module]
    live: LiveBytes
    second: Mapping[str, str]
    last: list[tuple[str, weakref.ref[Tensor]]] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)

    def on_layer(self, name: str, inputs: Sequence[LayerInput]) -> None:
        held, arena, x = self.live.now, self.live.arena, inputs[0].x
        if name in self.second:
            self._add_to_first_block(self.second[name], held, arena)
            return
        if name not in self.modules:  # the input of experts
            self.trial.experts_per_token = x.shape[-1]
            return
        alive = self.live.alive()
        new = sum(size for key, size in alive.items() if key not in self.seen)
        self.seen = set(alive)
        first = next((other for other, seen in self.last if seen() is x), name)
        if first == name:
            self.last = [*self.last[1 - CACHED_HESSIANS :], (name, weakref.ref(x))]
        rows = input_rows(self.modules[name], x).shape[0]
        self.trial.pauses[name] = Pause(rows, held, arena, new, first)

    def _add_to_first_block(self, counterpart: str, held: int, arena: int) -> None:
        pauses = self.trial.pauses
        more = max(0, held - pauses[counterpart].held)
        more_arena = max(0, arena - pauses[counterpart].arena)
        for name, pause in pauses.items():
            if block_of(name) == block_of(counterpart):
                pauses[name] = replace(pause, held=pause.held + more, arena=pause.arena + more_arena)


def _first_of_second_block(
    kinds: Mapping[str, list[str]], tried: Sequence[LayerPlan], plan: Plan
) -> dict[str, str]:
    """The first layer of the second block → its counterpart in the first; empty if no second block is of that kind."""
    block = tried[0].block if tried else ""
    same = kinds.get(block, [])
    name = tried[0].name.replace(block, same[1], 1) if len(same) > 1 else ""
    return {layer.name: tried[0].name for layer in plan.layers if layer.name == name}


def _median_seconds(block: nn.Module, call: BlockCall, device: torch.device) -> float:
    found: list[float] = []
    while len(found) < _REPEATS and sum(found) < _SECONDS:
        start = time.perf_counter()
        block(*call.args, **call.kwargs)
        synchronize(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


@contextmanager
def _load_rate(weights: Weights, trial: Trial, profiler: Profiler) -> Iterator[None]:
    """Measure the seconds for each byte of weights that is read while entered."""
    if not isinstance(weights, StreamedWeights):
        yield
        return
    seconds, read = profiler.seconds.get("load", 0.0), weights.read_bytes
    yield
    read = weights.read_bytes - read
    trial.load_rate = (profiler.seconds["load"] - seconds) / read if read else None
