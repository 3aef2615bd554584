"""What happens at a meeting point: Hessian, solve, quantized weight in place, block to the sink.

`LayerQuantizer.meet` is given to the walk. Layers found in the journal are put in place without being
solved. When all layers of a block are done, their packed tensors go to the sink.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn

from ..checkpoint.layout import pack, unpack
from ..context import RunContext
from ..errors import ModelError, RankError, SolverError
from ..gptq import Accuracy, Hessian, Solution, quantize_weight
from ..gptq.cholesky import UNDER_ROUTED
from ..gptq.hessian import usable_rows
from ..modeling.layers import input_rows, set_weight_matrix, weight_matrix
from ..planning import LayerPlan, Plan
from ..quantized_matrix import QuantizedMatrix
from .scheduler import LayerInput
from .statistics import HessianPool, SharedHessian
from .tune_block import TuneResult

ERROR_TOKENS = 128  # enough for two digits, and next to no time


@dataclass(frozen=True)
class LayerRecord:
    """What was done to one layer.

    Attributes:
        tokens: rows that entered the Hessian; `masked` were padding, `dropped` were not finite.
        added: further rows that did, of tokens that the router sent to other experts.
        held_out: rows that entered no Hessian and measured the result.
        loss: tr((T−Ŵ) H (T−Ŵ)ᵀ) / tokens, the squared output error per calibration token against the target T,
            which is W moved by the correction.
        output_error: ‖(W−Ŵ)X‖ / ‖WX‖ on the first rows (at most `ERROR_TOKENS`) of the first batch; None where
            they give no signal.
        true_error: ‖WX̃ − ŴX‖ / ‖WX̃‖ on held-out tokens, X̃ being the full-precision inputs: the error that came
            with the inputs is in it. None without the full-precision stream.
        correction: α in use; None without the full-precision stream.
        fallbacks: rungs of the ladder that were needed; empty in the normal case.
        tuned: whether tuning changed the block for the better. block_error: its relative squared output error on
            held-out batches before and after; None where it was not tuned.
        seconds: time for this layer alone; where several were solved together, its share of that.
    """

    name: str
    block: str
    out_features: int
    in_features: int
    bits: int
    group_size: int
    sym: bool
    act_order: str
    method: str
    tokens: int
    masked: int
    dropped: int
    held_out: int
    loss: float
    output_error: float | None
    true_error: float | None
    correction: float | None
    fallbacks: tuple[str, ...]
    stored_bytes: int
    seconds: float
    tuned: bool = False
    block_error: tuple[float, float] | None = None
    added: int = 0


class Sink(Protocol):
    """Where finished blocks go: the journal on disk, or a dictionary for a model in memory."""

    records: dict[str, dict[str, Any]]

    def tensors(self, layer: str) -> dict[str, Tensor]:
        """The packed tensors of a finished layer."""

    def append(
        self, block: str, tensors: Mapping[str, Mapping[str, Tensor]], records: Mapping[str, Any]
    ) -> None:
        """Take a finished block."""


class MemorySink:
    """Keeps the packed tensors of a model that is quantized in place."""

    def __init__(self) -> None:
        self.records: dict[str, dict[str, Any]] = {}
        self._tensors: dict[str, dict[str, Tensor]] = {}

    def tensors(self, layer: str) -> dict[str, Tensor]:
        """The packed tensors of a finished layer."""
        return self._tensors[layer]

    def append(
        self, block: str, tensors: Mapping[str, Mapping[str, Tensor]], records: Mapping[str, Any]
    ) -> None:
        """Take a finished block."""
        self._tensors.update({layer: dict(parts) for layer, parts in tensors.items()})
        self.records.update(records)


class Follower:
    """The stand-in for the journal in the processes that do not write it: knows the records, has no tensors."""

    def __init__(self, records: Mapping[str, dict[str, Any]]) -> None:
        self.records = dict(records)

    def tensors(self, layer: str) -> dict[str, Tensor]:
        """Raises RankError: they are not here, and who has them cannot be asked out of turn."""
        raise RankError(
            f"the model came back to {layer} after its block was finished, which works in one process only: start "
            "without torchrun; what is finished is kept"
        )

    def append(
        self, block: str, tensors: Mapping[str, Mapping[str, Tensor]], records: Mapping[str, Any]
    ) -> None:
        """Take a finished block."""
        self.records.update(records)


@dataclass
class Solved:
    """A layer that is solved and not yet handed to the sink.

    Attributes:
        W: the original weight matrix, kept only where the block will be tuned.
    """

    codes: QuantizedMatrix
    record: LayerRecord
    W: Tensor | None


class LayerQuantizer:
    """Quantizes the layers of a plan as the walk meets them.

    Args:
        modules: layer name → module, for every layer of the plan.
        hessians: accumulates, and knows the padding.
        ctx: its processes all meet the same layers; each solves some rows, and gets all codes.
        keep_open: blocks that are not handed to the sink before somebody calls `close`.
    """

    def __init__(
        self,
        plan: Plan,
        modules: Mapping[str, nn.Module],
        hessians: HessianPool,
        sink: Sink,
        ctx: RunContext,
        *,
        keep_open: Collection[str] = (),
    ) -> None:
        self.plan = plan
        self.modules = modules
        self.sink = sink
        self.fmt = ctx.config.format
        self.profiler = ctx.profiler
        self.progress = ctx.progress
        self.hessians = hessians
        self.comm = ctx.comm
        self._layers = {layer.name: layer for layer in plan.layers}
        self._accuracy = Accuracy(ctx.config.effective_correction)
        self._strict = ctx.config.strict
        self._open = {block: set(names) for block, names in plan.block_layers().items()}
        self._keep_open = set(keep_open)
        self._solved: dict[str, dict[str, Solved]] = {}
        self._met: set[str] = set()
        self._done_weights = 0

    def meet(self, name: str, arrivals: Sequence[LayerInput]) -> None:
        """Quantize the layer `name` from the inputs that arrived at it; none in any process: no calibration."""
        layer, module = self._layers[name], self.modules[name]
        if name in self.sink.records:
            with self.profiler.time("resume"):
                tensors = self.comm.broadcast_tensors(lambda: self.sink.tensors(name))
                W = weight_matrix(module)
                set_weight_matrix(module, self._unpacked(layer, tensors).dequantize(W.dtype).to(W.device))
        else:
            self._solve(layer, module, arrivals)
        self._met.add(name)
        self._done_weights += layer.weights
        self.progress("quantize", self._done_weights, self.plan.weights)

    def _solve(self, layer: LayerPlan, module: nn.Module, arrivals: Sequence[LayerInput]) -> None:
        start = time.perf_counter()
        shared: SharedHessian | None = None
        [nowhere] = self.comm.all_reduce_and(not arrivals)
        if layer.settings.method == "gptq" and not nowhere:
            with self.profiler.time("hessian"):
                shared = self.hessians.get(layer.name, module, arrivals)
        W = weight_matrix(module)
        with self.profiler.time("solve"):
            solution = self._solution(layer, W, shared)
        Wq = solution.codes.dequantize(W.dtype)
        error = None if nowhere else self._output_error(module, W, Wq, arrivals)
        set_weight_matrix(module, Wq)
        record = self._record(layer, solution, shared, error, time.perf_counter() - start)
        kept = W if layer.block in self._keep_open else None
        self._solved.setdefault(layer.block, {})[layer.name] = Solved(solution.codes, record, kept)
        self._open[layer.block].discard(layer.name)
        self._hand_over(layer.block)

    def restore(self, unit: str) -> None:
        """Put the quantized weights back into a unit whose original ones were read again."""
        for layer in self.plan.layers:
            if layer.block != unit and layer.name != unit:
                continue
            solved = self._solved.get(layer.block, {})
            if layer.name in solved:
                codes = solved[layer.name].codes
            elif layer.name in self._met:
                codes = self._unpacked(layer, self.sink.tensors(layer.name))
            else:
                continue
            module = self.modules[layer.name]
            W = weight_matrix(module)
            set_weight_matrix(module, codes.dequantize(W.dtype).to(W.device))

    def solved(self, block: str) -> dict[str, Solved]:
        """The layers of a block that are solved and not yet handed to the sink."""
        return self._solved.get(block, {})

    def tuned(self, block: str, codes: Mapping[str, QuantizedMatrix], result: TuneResult) -> None:
        """Replace the codes of a block's solved layers, in the model too."""
        for name, one in self.solved(block).items():
            module = self.modules[name]
            set_weight_matrix(module, codes[name].dequantize(weight_matrix(module).dtype))
            one.codes = codes[name]
            one.record = replace(one.record, tuned=result.kept, block_error=(result.before, result.after))

    def close(self, block: str) -> None:
        """Nobody will change this block any more: hand it to the sink as soon as all its layers are solved."""
        self._keep_open.discard(block)
        for one in self.solved(block).values():
            one.W = None
        self._hand_over(block)

    def _solution(self, layer: LayerPlan, W: Tensor, shared: SharedHessian | None) -> Solution:
        """Solve this process's rows of the layer, and gather the codes of all rows."""
        part = self.comm.row_shard(layer.out_features)
        try:
            if shared is not None:
                solution = quantize_weight(
                    W[part.rows],
                    shared.hessian,
                    layer.settings,
                    shared.cache,
                    accuracy=self._accuracy,
                    probe=shared.probe,
                    total=part.reduce,
                )
            else:  # no token came: the solver records that as a fallback
                empty = (
                    Hessian(layer.in_features, device=W.device) if layer.settings.method == "gptq" else None
                )
                solution = quantize_weight(
                    W[part.rows], empty, layer.settings, accuracy=self._accuracy, total=part.reduce
                )
        except SolverError as error:
            raise ModelError(f"layer {layer.name} cannot be quantized: {error}") from error
        codes = solution.codes
        gathered = replace(
            codes,
            codes=part.gather(codes.codes),
            scales=part.gather(codes.scales),
            zeros=part.gather(codes.zeros),
        )
        fallbacks = (UNDER_ROUTED, *solution.fallbacks) if shared and shared.added else solution.fallbacks
        if fallbacks and self._strict:
            raise SolverError(
                f"layer {layer.name} needed a fallback ({', '.join(fallbacks)}) and strict mode refuses it: "
                "give more calibration text, raise damp, or leave out --strict"
            )
        return replace(solution, codes=gathered, fallbacks=fallbacks)

    def _record(
        self,
        layer: LayerPlan,
        solution: Solution,
        shared: SharedHessian | None,
        error: float | None,
        seconds: float,
    ) -> LayerRecord:
        tokens = shared.hessian.tokens if shared else 0
        added = shared.added if shared else 0
        return LayerRecord(
            name=layer.name,
            block=layer.block,
            out_features=layer.out_features,
            in_features=layer.in_features,
            **{
                key: getattr(layer.settings, key)
                for key in ("bits", "group_size", "sym", "act_order", "method")
            },
            tokens=tokens - added,
            added=added,
            masked=shared.masked if shared else 0,
            dropped=shared.hessian.dropped if shared else 0,
            held_out=shared.probe.tokens if shared and shared.probe else 0,
            loss=solution.loss / max(tokens, 1),
            output_error=error,
            true_error=solution.true_error,
            correction=solution.alpha,
            fallbacks=tuple(solution.fallbacks),
            stored_bytes=0,
            seconds=seconds,
        )

    def _hand_over(self, block: str) -> None:
        """Pack the block and give it to the sink, if it is complete and closed."""
        if self._open[block] or block in self._keep_open or block not in self._solved:
            return
        tensors: dict[str, dict[str, Tensor]] = {}
        records: dict[str, dict[str, Any]] = {}
        with self.profiler.time("pack"):
            for name, one in self._solved.pop(block).items():
                # Layers with one input share their g_idx; in a file each has its own.
                packed = {key: tensor.cpu().clone() for key, tensor in pack(one.codes, self.fmt).items()}
                stored = sum(tensor.nbytes for tensor in packed.values())
                tensors[name], records[name] = packed, asdict(replace(one.record, stored_bytes=stored))
        with self.profiler.time("journal"):
            self.sink.append(block, tensors, records)

    def _output_error(
        self, module: nn.Module, W: Tensor, Wq: Tensor, arrivals: Sequence[LayerInput]
    ) -> float | None:
        """Of the first input that came to any process."""
        error = _output_error(module, W, Wq, arrivals[0].x) if arrivals else None
        return next(error for error, came in self.comm.all_gather_object((error, bool(arrivals))) if came)

    def _unpacked(self, layer: LayerPlan, tensors: Mapping[str, Tensor]) -> QuantizedMatrix:
        settings = layer.settings
        return unpack(
            tensors, settings.bits, settings.group_size, self.fmt, layer.in_features, layer.out_features
        )


def _output_error(module: nn.Module, W: Tensor, Wq: Tensor, x: Tensor) -> float | None:
    """‖(W−Ŵ)X‖ / ‖WX‖ on a few tokens: the layer's own error, apart from what earlier layers added."""
    X = input_rows(module, x)[:ERROR_TOKENS].to(W.dtype)
    X = X[usable_rows(X)]
    reference = (X @ W.T).float().norm()
    return float((X @ (W - Wq).T).float().norm() / reference) if reference > 0 else None
