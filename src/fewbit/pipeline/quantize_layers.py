"""One whole walk: a model, its plan and the calibration batches in; finished layers in the sink.

This is where the parts of this folder meet: jobs are the model's own forward on each batch, `lockstep`
brings them to the meeting points, `quantizer` solves there, `hessians` knows the padding.
"""

from __future__ import annotations

import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import native
from ..calibration import Calibration
from ..checkpoint.safetensors_file import check_finite
from ..config import QuantConfig
from ..context import RunContext
from ..distributed import Communicator
from ..errors import CalibrationError, FewbitError
from ..gptq import why_no_triton
from ..planning import Plan, output_embedding_name
from ..profiling import Profiler
from .block_tuning import BlockTuner
from .expert_calibration import Routing
from .layer_quantizer import LayerQuantizer, Sink
from .memory import activation_budget
from .offload import make_offloader
from .scheduler import BlockCall, LayerInput, OnBlockEnd, OnLayer, ScheduleStats, walk
from .statistics import HessianPool, Rows, hold_out
from .streaming import Weights


def check_weights(model: nn.Module) -> None:
    """Raises ModelError if any weight is NaN or infinite: found now, not after hours."""
    for name, parameter in model.named_parameters():
        check_finite(name, parameter)


def quantize_layers(
    model: nn.Module,
    plan: Plan,
    calibration: Calibration,
    sink: Sink,
    weights: Weights,
    ctx: RunContext,
) -> list[str]:
    """Put the quantized weight of every layer of the plan in place, and its tensors into the sink.

    Args:
        model: in evaluation mode; its weights are changed.
        calibration: without batches, every layer is rounded to nearest on its own.
        weights: where the weights come from.
        ctx: every process of `ctx.comm` has the model and all batches, and ends with all layers quantized. On a CUDA
            device the activations that it has no room for are kept in `ctx.offload_dir`, or else in host memory.

    Returns:
        Sentences about anything a user should know.

    Raises:
        ModelError: a weight cannot be quantized.
        CalibrationError: `tune`, and a single calibration sequence; or the activations fit neither on the device nor in
            host memory.
        SolverError: in strict mode, a layer needed a fallback.
        OutputError: activations cannot be written to `offload_dir`.
    """
    modules = {layer.name: model.get_submodule(layer.name) for layer in plan.layers}
    config, comm, profiler = ctx.config, ctx.comm, ctx.profiler
    _untie(model, modules, weights)
    batches = [arguments_for(model, batch, weights.device) for batch in comm.share(calibration.batches)]
    blocks = _blocks_to_tune(model, plan) if config.tune and calibration.batches else {}
    encoder_outputs = _EncoderOutputs(model)
    paired = needs_full_precision(config)
    all_rows = _rows(calibration.batches, config)
    rows = comm.share(all_rows)
    streams = 2 if paired else 1
    routing = Routing(model, rows, comm)
    hessians = HessianPool(rows, encoder_outputs.has, comm, routing.rows)
    quantizer = LayerQuantizer(
        plan,
        modules,
        hessians,
        sink,
        ctx,
        keep_open=blocks,
    )
    notes = _solver_notes(weights.device, len(plan.layers))
    with torch.no_grad(), profiler.time("walk"):
        if not calibration.batches:
            _meet_without_inputs(modules, quantizer, weights)
            return notes
        room = activation_budget(model, plan, weights, rows, streams)
        spill = make_offloader(ctx.offload_dir, profiler, room)
        on_demand = weights.on_demand(quantizer.restore, spill.paused)
        with encoder_outputs, on_demand, spill:
            jobs = [_job(model, batch) for batch in batches]
            references = range(len(batches), 2 * len(batches) if paired else len(batches))
            jobs += [jobs[reference - len(batches)] for reference in references]
            tuner = BlockTuner(rows, steps=config.tune_steps, seed=config.seed, comm=comm)
            leave = _leaving(blocks, quantizer, tuner, profiler) if blocks else None
            traffic = walk(
                routing.meeting_points(modules),
                jobs,
                _meeting(routing, quantizer, weights),
                references=references,
                blocks=blocks,
                leave=leave,
                gathered=weights.release_except,
                earliest=comm.all_reduce_min,
                running=spill.running,
            )
        traffic.forget(routing.points)
        traffic = _of_all(traffic, comm)
        _meet_without_inputs(traffic.unreached, quantizer, weights)
        for block in blocks:  # those that no batch went through as a whole
            quantizer.close(block)
    unmaskable = sum(comm.all_gather_object(hessians.unmaskable), Counter[str]())
    if paired:
        notes += _held_out_notes(all_rows)
    notes += [*_traffic_notes(traffic, unmaskable), *tuner.notes(sink.records), *spill.notes()]
    return notes + (_pairing_notes(traffic, sink.records) if paired else [])


def _meeting(routing: Routing, quantizer: LayerQuantizer, weights: Weights) -> OnLayer:
    """What happens where batches wait: tokens are given to experts, or a layer is quantized."""

    def meet(name: str, arrivals: list[LayerInput]) -> None:
        if name in routing.points:
            routing.meet(name, arrivals)
            return
        weights.load(name)  # where no batch of this process came, nothing was read yet
        quantizer.meet(name, arrivals)

    return meet


def _of_all(traffic: ScheduleStats, comm: Communicator) -> ScheduleStats:
    """The traffic of all processes: they met the same layers, each with its own inputs."""
    late = sum(comm.all_gather_object(traffic.late), Counter[str]())
    late_references = sum(comm.all_gather_object(traffic.late_references), Counter[str]())
    return replace(traffic, late=late, late_references=late_references)


def _meet_without_inputs(names: Iterable[str], quantizer: LayerQuantizer, weights: Weights) -> None:
    for name in names:
        weights.release_except([name])
        weights.load(name)
        quantizer.meet(name, [])


def _rows(batches: Sequence[Mapping[str, Tensor]], config: QuantConfig) -> list[Rows]:
    """What is known of the batches' rows; with a second stream some sequences are held out."""
    rows = [Rows.of(batch) for batch in batches]
    if not needs_full_precision(config):
        return rows
    rows = hold_out(rows)
    if batches and config.tune and not any(batch.held_out for batch in rows):
        raise CalibrationError(
            "tuning needs calibration sequences to learn from and others to judge by, but there is only one: give "
            "more text, or leave out tune"
        )
    return rows


def _blocks_to_tune(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """The modules that hold the layers of the plan, by name; layers outside of blocks have none."""
    names = [block for block, layers in plan.block_layers().items() if layers != [block]]
    return {name: model.get_submodule(name) for name in names}


def _leaving(
    blocks: Mapping[str, nn.Module], quantizer: LayerQuantizer, tuner: BlockTuner, profiler: Profiler
) -> OnBlockEnd:
    """What happens at the end of a block: its solved layers are tuned, its outputs computed anew."""

    def again(block: nn.Module, passage: BlockCall) -> Any:
        with profiler.time("tune"):
            return block(*passage.args, **passage.kwargs)

    def leave(name: str, passages: list[BlockCall]) -> dict[int, Callable[[], Any]]:
        quantizer.hessians.prune()
        solved, block, start = quantizer.solved(name), blocks[name], len(name) + 1
        codes = {layer[start:]: one.codes for layer, one in solved.items()}
        weights = {layer[start:]: one.W for layer, one in solved.items() if one.W is not None}
        result = None
        if solved:  # otherwise the block came from the journal, tuned already
            with profiler.time("tune"), torch.enable_grad():
                result = tuner.tune(name, block, codes, weights, passages)
        if result is not None:
            quantizer.tuned(name, {f"{name}.{layer}": new for layer, new in result.codes.items()}, result)
        quantizer.close(name)
        if result is None or not result.kept:
            return {}
        return {p.job: partial(again, block, p) for p in passages if p.job < len(tuner.batches)}

    return leave


def needs_full_precision(config: QuantConfig) -> bool:
    """Whether anything asks for the second stream."""
    return config.effective_correction != 0 or config.tune


def _solver_notes(device: torch.device, layers: int) -> list[str]:
    if device.type == "cpu":
        return (
            []
            if native.available()
            else [f"the compiled solver is not in use ({native.unsupported_reason()}): slower"]
        )
    reason = why_no_triton(device)
    if not reason:
        return []
    return [
        f"the solver's Triton kernels were not used in any of {layers} layers ({reason}): many times slower"
    ]


def _held_out_notes(rows: Sequence[Rows]) -> list[str]:
    if any(batch.held_out for batch in rows):
        return []
    return [
        "a single calibration sequence leaves none to hold out: no automatic correction, and true errors "
        "were not measured. Give more text"
    ]


def _traffic_notes(traffic: ScheduleStats, unmaskable: Mapping[str, int]) -> list[str]:
    notes = []
    if traffic.late:
        count = sum(traffic.late.values())
        notes.append(
            f"{count} inputs reached {len(traffic.late)} layers after they were solved and did not count"
        )
    if traffic.unreached:
        notes.append(
            f"no calibration token reached {len(traffic.unreached)} layers, for example {traffic.unreached[0]}: "
            "round-to-nearest was used there"
        )
    if unmaskable:
        notes.append(
            f"{len(unmaskable)} layers see other rows than the tokens, so padding could not be told apart "
            f"there, for example {next(iter(unmaskable))}: use batch_size 1 to have none"
        )
    return notes


def _pairing_notes(traffic: ScheduleStats, records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where the two streams could not be compared, or not exactly."""
    notes = []
    if traffic.late_references:
        notes.append(
            f"{sum(traffic.late_references.values())} inputs of the full-precision stream reached layers after they "
            f"were solved, for example {next(iter(traffic.late_references))}: from there on it is not quite the "
            "original model's, nor are corrections and true errors"
        )
    uncorrected = [name for name, r in records.items() if r["tokens"] and r["correction"] is None]
    if uncorrected:
        notes.append(
            f"in {len(uncorrected)} layers, for example {uncorrected[0]}, the rows of the quantized and the "
            "full-precision stream do not belong together: no correction there, and no sequence held out"
        )
    return notes


class _EncoderOutputs:
    """While entered, remembers the output of the model's encoder, to know cross-attention by its input."""

    def __init__(self, model: nn.Module) -> None:
        config = getattr(model, "config", None)
        is_pair = bool(getattr(config, "is_encoder_decoder", False)) and hasattr(model, "get_encoder")
        self._encoder: nn.Module | None = model.get_encoder() if is_pair else None  # type: ignore[operator]
        self._seen: list[weakref.ref[Tensor]] = []
        self._handle: Any = None

    def __enter__(self) -> None:
        if self._encoder is not None:
            self._handle = self._encoder.register_forward_hook(self._remember)

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.remove()

    def has(self, x: Tensor) -> bool:
        """Whether `x` is such an output."""
        return any(reference() is x for reference in self._seen)

    def _remember(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._seen.append(weakref.ref(output[0]))


def arguments_for(model: nn.Module, batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A calibration batch as arguments of the model's forward: on the device, real numbers in the model's dtype.

    Raises:
        CalibrationError: the forward takes no such arguments.
    """
    accepted = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    unknown = [key for key in batch if key not in accepted and not takes_any]
    if unknown:
        raise CalibrationError(
            f"the calibration data has {', '.join(map(repr, unknown))}, which {type(model).__name__}.forward does "
            f"not take; leave it out. It takes {', '.join(accepted)}"
        )
    dtype = getattr(model, "dtype", None)
    return {
        key: value.to(device, dtype if value.is_floating_point() else None) for key, value in batch.items()
    }


def _job(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], object]:
    extra = without_cache(model)

    def forward() -> object:
        try:
            return model(**batch, **extra)
        except (FewbitError, torch.OutOfMemoryError):
            raise
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in batch.items())
            raise CalibrationError(
                f"{type(model).__name__}.forward cannot work with the calibration batch {shapes}: {error}. Calibration "
                "data must be made by this model's own processor or tokenizer"
            ) from error

    return forward


def without_cache(model: nn.Module) -> dict[str, bool]:
    """The arguments that keep a model's forward from filling a cache of keys and values."""
    accepted = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    takes_it = "use_cache" in accepted or (takes_any and hasattr(model, "config"))
    return {"use_cache": False} if takes_it else {}


def _untie(model: nn.Module, modules: Mapping[str, nn.Module], weights: Weights) -> None:
    """Give a tied output embedding that will be quantized its own weight, so that the input one stays."""
    name = output_embedding_name(model)
    if name in modules:
        weights.untie(f"{name}.weight")
        config: Any = model.config
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
