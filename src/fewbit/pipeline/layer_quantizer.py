"""What happens at the sync point of a layer: Hessian, solve, quantized weight in place, record, block to the sink.

Layers that an earlier, interrupted run finished are read from the journal instead of being solved. Once all layers of a
block are quantized, their packed tensors go to the sink.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn

from ..checkpoint.layout import pack, unpack
from ..context import RunContext
from ..distributed import ROW_MULTIPLE
from ..errors import ModelError, RankError, SolverError
from ..gptq import Hessian, InputGroup, Solution, quantize_weight
from ..gptq.cholesky import UNDER_ROUTED
from ..gptq.hessian import usable_rows
from ..gptq.output_feedback import block_size
from ..modeling.layers import input_rows, set_weight_matrix, weight_matrix
from ..planning import LayerPlan, Plan
from ..quantized_matrix import QuantizedMatrix
from .output_hessians import OutputHessians
from .scheduler import LayerInput
from .statistics import HessianPool, SharedHessian
from .tune_block import TuneResult

ERROR_TOKENS = 128  # enough for two digits, at a negligible cost


@dataclass(frozen=True)
class LayerRecord:
    """What was done to one layer. The fields are the keys of the JSON report.

    Attributes:
        tokens: number of rows in the Hessian, without `added`.
        masked: number of padding rows, which are not in the Hessian.
        dropped: number of rows that are not finite.
        held_out: number of rows that entered no Hessian and judged the result.
        loss: tr((T−Ŵ) H (T−Ŵ)ᵀ) / tokens, the squared output error per calibration token against the target T, which
            is W moved by the correction.
        output_error: ‖(W−Ŵ)X‖ / ‖WX‖ on the first rows (at most `ERROR_TOKENS`) of the first batch; None if WX is 0.
        true_error: ‖WX̃ − ŴX‖ / ‖WX̃‖ on held-out tokens, with the full-precision inputs X̃, so that it includes the
            error of the inputs; None without the full-precision path.
        correction: α in use; None without the full-precision path.
        fallbacks: names of the solver's fallbacks that were needed; normally empty.
        stored_bytes: size of the packed tensors.
        seconds: time spent on this layer.
        tuned: whether tuning improved the block.
        block_error: relative squared output error of the block on held-out batches, before and after tuning; None if
            the block was not tuned.
        added: number of further rows in the Hessian, borrowed from tokens that the router sent to other experts.
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


class ResultSink(Protocol):
    """Receives finished blocks: the journal on disk, or a dictionary for a model in memory."""

    records: dict[str, dict[str, Any]]

    def tensors(self, layer: str) -> dict[str, Tensor]:
        """Return the packed tensors of a finished layer."""

    def append(
        self, block: str, tensors: Mapping[str, Mapping[str, Tensor]], records: Mapping[str, Any]
    ) -> None:
        """Store a finished block."""


class MemorySink:
    """Keeps the packed tensors of a model that is quantized in place."""

    def __init__(self) -> None:
        self.records: dict[str, dict[str, Any]] = {}
        self._tensors: dict[str, dict[str, Tensor]] = {}

    def tensors(self, layer: str) -> dict[str, Tensor]:
        return self._tensors[layer]

    def append(
        self, block: str, tensors: Mapping[str, Mapping[str, Tensor]], records: Mapping[str, Any]
    ) -> None:
        self._tensors.update({layer: dict(parts) for layer, parts in tensors.items()})
        self.records.update(records)


class NonLeaderSink:
    """Stands in for the journal on ranks that do not write it: knows the records, has no tensors."""

    def __init__(self, records: Mapping[str, dict[str, Any]]) -> None:
        self.records = dict(records)

    def tensors(self, layer: str) -> dict[str, Tensor]:
        """Raise RankError: only the leader has them, and it can only be asked in a collective."""
        raise RankError(
            f"the model came back to {layer} after its block was finished, which works in one process only: start "
            "without torchrun; what is finished is kept"
        )

    def append(
        self, block: str, tensors: Mapping[str, Mapping[str, Tensor]], records: Mapping[str, Any]
    ) -> None:
        self.records.update(records)


@dataclass
class Solved:
    """A quantized layer whose block has not been flushed to the sink.

    Attributes:
        codes: quantized weight.
        record: what was done to the layer.
        W: original weight matrix, kept only if the block will be tuned.
    """

    codes: QuantizedMatrix
    record: LayerRecord
    W: Tensor | None


class LayerQuantizer:
    """Quantizes the layers of a plan as the scheduler reaches them.

    Args:
        plan: layers to quantize.
        modules: layer name → module, for every layer of the plan.
        hessians: accumulates the Hessians of layer inputs.
        sink: receives finished blocks.
        ctx: all ranks visit the same layers; each solves some rows of a layer, and gets all codes.
        keep_open: blocks that are not flushed to the sink before `close`.
        outputs: Hessians of the layers' outputs; None counts all outputs of a layer alike.
    """

    def __init__(
        self,
        plan: Plan,
        modules: Mapping[str, nn.Module],
        hessians: HessianPool,
        sink: ResultSink,
        ctx: RunContext,
        *,
        keep_open: Collection[str] = (),
        outputs: OutputHessians | None = None,
    ) -> None:
        self.plan = plan
        self.modules = modules
        self.hessians = hessians
        self.sink = sink
        self.outputs = outputs
        self.ctx, self.comm, self.profiler = ctx, ctx.comm, ctx.profiler
        self._layers = {layer.name: layer for layer in plan.layers}
        self._open = {block: set(names) for block, names in plan.block_layers().items()}
        self._keep_open = set(keep_open)
        self._solved: dict[str, dict[str, Solved]] = {}  # block → layers that were not flushed
        self._done: set[str] = set()
        self._done_weights = 0

    def quantize_layer(self, name: str, inputs: Sequence[LayerInput]) -> None:
        """Quantize one layer, given the inputs that reached it in this process.

        If no rank has inputs, the weight is rounded to nearest.

        Raises:
            ModelError: the weight cannot be quantized.
            SolverError: in strict mode, the layer needed a fallback.
        """
        layer, module = self._layers[name], self.modules[name]
        if name in self.sink.records:
            self._restore_finished(layer, module)
            self._count_done(layer)
            return
        start = time.perf_counter()
        W, settings = weight_matrix(module), layer.settings

        # 1. The Hessian H = X Xᵀ of the inputs of all ranks, or the one of an earlier layer with the same inputs.
        [has_no_inputs] = self.comm.all_reduce_and(not inputs)
        shared: SharedHessian | None = None
        group: InputGroup | None = None  # None: round to nearest
        if settings.needs_inputs and has_no_inputs:
            group = InputGroup(Hessian(layer.in_features, device=W.device))
        elif settings.needs_inputs:
            with self.profiler.time("hessian"):
                shared = self.hessians.get(name, module, inputs)
                group = shared.group

        # 2. Solve this rank's rows, and gather the codes of all rows. Given H, rows are independent; with the Hessian
        #    of the outputs, blocks of rows are.
        with self.profiler.time("solve"):
            outputs = self.outputs if settings.needs_inputs else None
            multiple = block_size(layer.out_features) if outputs else ROW_MULTIPLE
            shard = self.comm.row_shard(layer.out_features, multiple)
            correction = self.ctx.config.effective_correction
            G = outputs.of(name, shard.rows, W.device) if outputs else None
            try:
                solution = quantize_weight(
                    W[shard.rows], group, settings, correction=correction, reduce=shard.reduce, G=G
                )
            except SolverError as error:
                raise ModelError(f"layer {name} cannot be quantized: {error}") from error
            mine = solution.codes
            codes = replace(
                mine,
                codes=shard.gather(mine.codes),
                scales=shard.gather(mine.scales),
                zeros=shard.gather(mine.zeros),
            )
            fallbacks = (UNDER_ROUTED,) * bool(shared and shared.borrowed) + tuple(solution.fallbacks)
        if fallbacks and self.ctx.config.strict:
            raise SolverError(
                f"layer {name} needed a fallback ({', '.join(fallbacks)}) and strict mode refuses it: "
                "give more calibration text, raise damp, or leave out --strict"
            )

        # 3. Put the quantized weight in place: every later layer sees inputs that went through it.
        W_hat = codes.dequantize(W.dtype)
        output_error = None if has_no_inputs else self._output_error(module, W, W_hat, inputs)
        set_weight_matrix(module, W_hat)

        # 4. Record what was done, and flush the block if it is complete.
        record = self._record(layer, replace(solution, fallbacks=fallbacks), shared)
        record = replace(record, output_error=output_error, seconds=time.perf_counter() - start)
        kept = W if layer.block in self._keep_open else None
        self._solved.setdefault(layer.block, {})[name] = Solved(codes, record, kept)
        self._open[layer.block].discard(name)
        self._flush_block(layer.block)
        self._count_done(layer)

    def restore(self, shard: str) -> None:
        """Put the quantized weights back into a weight shard that was read from the files again."""
        for layer in self.plan.layers:
            if layer.block != shard and layer.name != shard:
                continue
            solved = self._solved.get(layer.block, {})
            if layer.name in solved:
                codes = solved[layer.name].codes
            elif layer.name in self._done:
                codes = self._unpacked(layer, self.sink.tensors(layer.name))
            else:
                continue
            _set_quantized(self.modules[layer.name], codes)

    def solved(self, block: str) -> dict[str, Solved]:
        """Return the quantized layers of a block that were not flushed to the sink."""
        return self._solved.get(block, {})

    def replace_tuned(self, block: str, codes: Mapping[str, QuantizedMatrix], result: TuneResult) -> None:
        """Replace the codes of a block's quantized layers, and their weights in the model, by tuned ones."""
        for name, one in self.solved(block).items():
            _set_quantized(self.modules[name], codes[name])
            one.codes = codes[name]
            one.record = replace(one.record, tuned=result.kept, block_error=(result.before, result.after))

    def close(self, block: str) -> None:
        """Mark the block as final; it is packed and written once all its layers are quantized."""
        self._keep_open.discard(block)
        for one in self.solved(block).values():
            one.W = None
        self._flush_block(block)

    def _restore_finished(self, layer: LayerPlan, module: nn.Module) -> None:
        """Put a layer in place that an interrupted run finished."""
        with self.profiler.time("resume"):
            tensors = self.comm.broadcast_tensors(lambda: self.sink.tensors(layer.name))
            _set_quantized(module, self._unpacked(layer, tensors))

    def _count_done(self, layer: LayerPlan) -> None:
        self._done.add(layer.name)
        self._done_weights += layer.weights
        self.ctx.progress("quantize", self._done_weights, self.plan.weights)

    def _record(self, layer: LayerPlan, solution: Solution, shared: SharedHessian | None) -> LayerRecord:
        """Return the layer's record, without what `quantize_layer` measures itself."""
        rows = shared.hessian.tokens if shared else 0
        borrowed = shared.borrowed if shared else 0
        settings = ("bits", "group_size", "sym", "act_order", "method")
        return LayerRecord(
            name=layer.name,
            block=layer.block,
            out_features=layer.out_features,
            in_features=layer.in_features,
            **{key: getattr(layer.settings, key) for key in settings},
            tokens=rows - borrowed,
            added=borrowed,
            masked=shared.masked if shared else 0,
            dropped=shared.hessian.dropped if shared else 0,
            held_out=shared.holdout.tokens if shared and shared.holdout else 0,
            loss=solution.loss / max(rows, 1),
            output_error=None,
            true_error=solution.true_error,
            correction=solution.alpha,
            fallbacks=tuple(solution.fallbacks),
            stored_bytes=0,
            seconds=0.0,
        )

    def _flush_block(self, block: str) -> None:
        """Pack the block and append it to the sink, if all its layers are quantized and it is not kept open."""
        if self._open[block] or block in self._keep_open or block not in self._solved:
            return
        tensors: dict[str, dict[str, Tensor]] = {}
        records: dict[str, dict[str, Any]] = {}
        with self.profiler.time("pack"):
            for name, one in self._solved.pop(block).items():
                # Layers with the same input share one g_idx tensor; in a file each has its own.
                packed = {key: tensor.cpu().clone() for key, tensor in pack(one.codes, self._format).items()}
                stored = sum(tensor.nbytes for tensor in packed.values())
                tensors[name], records[name] = packed, asdict(replace(one.record, stored_bytes=stored))
        with self.profiler.time("journal"):
            self.sink.append(block, tensors, records)

    def _output_error(
        self, module: nn.Module, W: Tensor, W_hat: Tensor, inputs: Sequence[LayerInput]
    ) -> float | None:
        """Return the output error on the first input of the lowest rank that received one."""
        error = _output_error(module, W, W_hat, inputs[0].x) if inputs else None
        return next(error for error, known in self.comm.all_gather_object((error, bool(inputs))) if known)

    @property
    def _format(self) -> str:
        return self.ctx.config.format

    def _unpacked(self, layer: LayerPlan, tensors: Mapping[str, Tensor]) -> QuantizedMatrix:
        settings = layer.settings
        return unpack(
            tensors, settings.bits, settings.group_size, self._format, layer.in_features, layer.out_features
        )


def _set_quantized(module: nn.Module, codes: QuantizedMatrix) -> None:
    """Put the dequantized weight in place, in the dtype and on the device of the old one."""
    W = weight_matrix(module)
    set_weight_matrix(module, codes.dequantize(W.dtype).to(W.device))


def _output_error(module: nn.Module, W: Tensor, W_hat: Tensor, x: Tensor) -> float | None:
    """Return ‖(W−Ŵ)X‖ / ‖WX‖ on a few tokens: the layer's own error, without the errors of earlier layers."""
    X = input_rows(module, x)[:ERROR_TOKENS].to(W.dtype)
    X = X[usable_rows(X)]
    reference = (X @ W.T).float().norm()
    return float((X @ (W - W_hat).T).float().norm() / reference) if reference > 0 else None
