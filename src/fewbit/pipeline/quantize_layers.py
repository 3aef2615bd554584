"""One calibration pass: a model, its plan and the calibration batches in; finished layers in the sink.

This file connects the parts of the folder. Jobs are the model's own forward on each batch, `scheduler` runs them to the
sync points, `layer_quantizer` solves there, `statistics` knows which rows count.
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
from ..errors import CalibrationError, FewbitError, ModelError, SolverError
from ..gptq import fallback_reason
from ..modeling.layers import without_cache
from ..planning import Plan, output_embedding_name
from ..profiling import Profiler
from .block_tuning import BlockTuner
from .expert_calibration import ExpertCalibration
from .later_passes import LaterInputs, uses_per_pass
from .layer_quantizer import LayerQuantizer, ResultSink
from .memory import activation_budget
from .offload import make_offloader
from .output_hessians import OutputHessians
from .scheduler import BlockCall, Hooks, LayerInput, OnBlockEnd, Scheduler, ScheduleStats
from .statistics import BatchMasks, HessianPool, split_holdout
from .streaming import Weights


def check_weights(model: nn.Module) -> None:
    """Raise ModelError if any weight is NaN or infinite: now, instead of after hours."""
    for name, parameter in model.named_parameters():
        check_finite(name, parameter)


def quantize_layers(
    model: nn.Module,
    plan: Plan,
    calibration: Calibration,
    sink: ResultSink,
    weights: Weights,
    ctx: RunContext,
    outputs: OutputHessians | None = None,
) -> list[str]:
    """Put the quantized weight of every layer of the plan in place, and its packed tensors into the sink.

    Args:
        model: model in evaluation mode; its weights are changed.
        plan: layers to quantize, with their settings.
        calibration: calibration batches; without any, every layer is rounded to nearest.
        sink: receives finished blocks.
        weights: source of the model's weights.
        ctx: every rank of `ctx.comm` has the model and all batches, and ends with all layers quantized. Activations
            that do not fit on a CUDA device are kept in `ctx.offload_dir`, or else in host memory.
        outputs: Hessians of the layers' outputs; None counts all outputs of a layer alike.

    Returns:
        Notes for the user, as sentences.

    Raises:
        ModelError: a weight cannot be quantized.
        CalibrationError: `tune` with a single calibration sequence; or the activations fit neither on the device nor
            in host memory.
        SolverError: in strict mode, a layer needed a fallback.
        OutputError: activations cannot be written to `ctx.offload_dir`.
    """
    config, comm, profiler = ctx.config, ctx.comm, ctx.profiler
    modules = {layer.name: model.get_submodule(layer.name) for layer in plan.layers}
    _untie(model, modules, weights)
    batches = [arguments_for(model, batch, weights.device) for batch in comm.share(calibration.batches)]
    blocks = _blocks_to_tune(model, plan) if config.tune and calibration.batches else {}
    all_masks = _batch_masks(calibration.batches, config)
    masks = comm.share(all_masks)
    encoder_outputs = _EncoderOutputs(model)
    experts = ExpertCalibration(model, masks, comm)
    uses = uses_per_pass(model, modules, calibration.batches[0]) if calibration.batches else {}
    later = LaterInputs(uses, ctx.offload_dir)
    hessians = HessianPool(masks, encoder_outputs.has, comm, experts.rows, later)
    quantizer = LayerQuantizer(plan, modules, hessians, sink, ctx, keep_open=blocks, outputs=outputs)
    notes = _solver_notes(weights.device, len(plan.layers))
    # Jobs 0 ... N−1 run the quantized path; with a full-precision path, jobs N ... 2N−1 run the same batches on it.
    two_paths = needs_full_precision(config)
    references = range(len(batches), 2 * len(batches) if two_paths else len(batches))
    jobs = [forward_job(model, batch) for batch in batches] * (2 if two_paths else 1)

    unchanged = UnchangedWeights(model)

    def on_layer(name: str, inputs: list[LayerInput]) -> None:
        unchanged.check()
        if name in experts.points:
            experts.on_routing(name, inputs)
            return
        weights.load(name)  # not loaded yet if no batch of this process came here
        quantizer.quantize_layer(name, inputs)

    with torch.no_grad(), profiler.time("walk"):
        if not calibration.batches:
            _quantize_without_inputs(modules, quantizer, weights)
            return notes
        budget = activation_budget(model, plan, weights, masks, 2 if two_paths else 1)
        offloader = make_offloader(ctx.offload_dir, profiler, budget)
        tuner = BlockTuner(masks, steps=config.tune_steps, seed=config.seed, comm=comm)
        hooks = Hooks(
            on_layer,
            on_block_end=_tune_at_block_end(blocks, quantizer, tuner, profiler) if blocks else None,
            on_waiting=weights.release_except,
            min_position=comm.all_reduce_min,
            running=offloader.running,
        )
        layers = experts.with_points(modules)
        with later, encoder_outputs:
            if uses:
                _sum_later_inputs(layers, jobs[: len(batches)], hessians, later, weights, ctx)
            with weights.on_demand(quantizer.restore, offloader.paused), offloader:
                stats = Scheduler(layers, jobs, hooks, references=references, blocks=blocks).run()
        stats = _over_all_ranks(stats.without({*experts.points, *uses}), comm)
        _quantize_without_inputs(stats.unreached, quantizer, weights)
        _check_late(stats, config)
        for block in blocks:  # blocks that no batch ran as a whole
            quantizer.close(block)
    unmaskable = sum(comm.all_gather_object(hessians.unmaskable), Counter[str]())
    if two_paths:
        notes += _holdout_notes(all_masks)
    notes += [*_schedule_notes(stats, unmaskable), *tuner.notes(sink.records), *offloader.notes()]
    notes += _looped_notes(uses)
    return notes + (_pairing_notes(stats, sink.records) if two_paths else [])


def _sum_later_inputs(
    layers: Mapping[str, nn.Module],
    jobs: Sequence[Callable[[], object]],
    hessians: HessianPool,
    later: LaterInputs,
    weights: Weights,
    ctx: RunContext,
) -> None:
    """Run the unchanged model once, and sum the inputs of the second and every further use of each layer."""

    def on_later_use(name: str, inputs: list[LayerInput]) -> None:
        later.add(name, hessians.of_later_use(name, layers[name], inputs))

    offloader = make_offloader(ctx.offload_dir, ctx.profiler)
    hooks = Hooks(
        lambda name, inputs: None,
        on_later_use=on_later_use,
        on_waiting=weights.release_except,
        min_position=ctx.comm.all_reduce_min,
        running=offloader.running,
    )
    with weights.on_demand(lambda shard: None, offloader.paused), offloader:
        Scheduler(layers, jobs, hooks, uses=later.uses).run()


def _over_all_ranks(stats: ScheduleStats, comm: Communicator) -> ScheduleStats:
    """Sum the statistics of all ranks, which visited the same layers, each with its own inputs."""
    late = sum(comm.all_gather_object(stats.late_inputs), Counter[str]())
    late_references = sum(comm.all_gather_object(stats.late_reference_inputs), Counter[str]())
    return replace(stats, late_inputs=late, late_reference_inputs=late_references)


def _quantize_without_inputs(names: Iterable[str], quantizer: LayerQuantizer, weights: Weights) -> None:
    for name in names:
        weights.release_except([name])
        weights.load(name)
        quantizer.quantize_layer(name, [])


def _batch_masks(batches: Sequence[Mapping[str, Tensor]], config: QuantConfig) -> list[BatchMasks]:
    """Return the masks of all batches; with a full-precision path, some sequences are held out."""
    masks = [BatchMasks.of(batch) for batch in batches]
    if not needs_full_precision(config):
        return masks
    masks = split_holdout(masks)
    if batches and config.tune and not any(batch.held_out for batch in masks):
        raise CalibrationError(
            "tuning needs calibration sequences to learn from and others to judge by, but there is only one: give "
            "more text, or leave out tune"
        )
    return masks


def _blocks_to_tune(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """Return the modules that hold the layers of the plan, by name; layers outside of blocks have none."""
    names = [block for block, layers in plan.block_layers().items() if layers != [block]]
    return {name: model.get_submodule(name) for name in names}


def _tune_at_block_end(
    blocks: Mapping[str, nn.Module], quantizer: LayerQuantizer, tuner: BlockTuner, profiler: Profiler
) -> OnBlockEnd:
    """Return the hook that tunes the quantized layers of a block and recomputes the block's outputs."""

    def recompute(block: nn.Module, call: BlockCall) -> Any:
        with profiler.time("tune"):
            return block(*call.args, **call.kwargs)

    def on_block_end(name: str, calls: list[BlockCall]) -> dict[int, Callable[[], Any]]:
        quantizer.hessians.prune()
        solved, block, start = quantizer.solved(name), blocks[name], len(name) + 1
        codes = {layer[start:]: one.codes for layer, one in solved.items()}
        weights = {layer[start:]: one.W for layer, one in solved.items() if one.W is not None}
        result = None
        if solved:  # otherwise the block came from the journal, already tuned
            with profiler.time("tune"), torch.enable_grad():
                result = tuner.tune(name, block, codes, weights, calls)
        if result is not None:
            tuned = {f"{name}.{layer}": new for layer, new in result.codes.items()}
            quantizer.replace_tuned(name, tuned, result)
        quantizer.close(name)
        if result is None or not result.kept:
            return {}
        return {call.job: partial(recompute, block, call) for call in calls if call.job < len(tuner.batches)}

    return on_block_end


def needs_full_precision(config: QuantConfig) -> bool:
    """Whether any option needs the full-precision path."""
    return config.effective_correction != 0 or config.tune


def _solver_notes(device: torch.device, layers: int) -> list[str]:
    if device.type == "cpu":
        return (
            []
            if native.available()
            else [f"the compiled solver is not in use ({native.unsupported_reason()}): slower"]
        )
    reason = fallback_reason(device)
    if not reason:
        return []
    return [
        f"the solver's Triton kernels were not used in any of {layers} layers ({reason}): many times slower"
    ]


def _holdout_notes(masks: Sequence[BatchMasks]) -> list[str]:
    if any(batch.held_out for batch in masks):
        return []
    return [
        "a single calibration sequence leaves none to hold out: no automatic correction, and true errors "
        "were not measured. Give more text"
    ]


def _late_note(stats: ScheduleStats) -> str:
    count = sum(stats.late_inputs.values())
    return f"{count} inputs reached {len(stats.late_inputs)} layers after they were solved and did not count"


def _check_late(stats: ScheduleStats, config: QuantConfig) -> None:
    if stats.late_inputs and config.strict:
        raise SolverError(f"{_late_note(stats)}, and strict mode refuses that: leave out --strict")


def _schedule_notes(stats: ScheduleStats, unmaskable: Mapping[str, int]) -> list[str]:
    notes = [_late_note(stats)] if stats.late_inputs else []
    if stats.unreached:
        notes.append(
            f"no calibration token reached {len(stats.unreached)} layers, for example {stats.unreached[0]}: "
            "round-to-nearest was used there"
        )
    if unmaskable:
        notes.append(
            f"{len(unmaskable)} layers see other rows than the tokens, so padding could not be told apart "
            f"there, for example {next(iter(unmaskable))}: use batch_size 1 to have none"
        )
    return notes


def _looped_notes(uses: Mapping[str, int]) -> list[str]:
    if not uses:
        return []
    return [
        f"{len(uses)} layers run up to {max(uses.values())} times in one forward pass, for example {next(iter(uses))}: "
        "the inputs of the later uses count too; they come from the original model, in one more pass"
    ]


def _pairing_notes(stats: ScheduleStats, records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return notes on layers where the two paths cannot be compared, or not exactly."""
    notes = []
    if stats.late_reference_inputs:
        notes.append(
            f"{stats.late_reference_inputs.total()} inputs of the full-precision path reached layers after they "
            f"were solved, for example {next(iter(stats.late_reference_inputs))}: from there on it is not quite the "
            "original model's, nor are corrections and true errors"
        )
    uncorrected = [name for name, r in records.items() if r["tokens"] and r["correction"] is None]
    if uncorrected:
        notes.append(
            f"in {len(uncorrected)} layers, for example {uncorrected[0]}, the rows of the quantized and the "
            "full-precision path do not belong together: no correction there, and no sequence held out"
        )
    return notes


class _EncoderOutputs:
    """Remembers the outputs of the model's encoder while entered, to recognize cross-attention by its input."""

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
        """Whether `x` is an output of the encoder."""
        return any(reference() is x for reference in self._seen)

    def _remember(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._seen.append(weakref.ref(output[0]))


def arguments_for(model: nn.Module, batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move a calibration batch to the device, floating-point tensors in the model's dtype.

    Raises:
        CalibrationError: the model's forward does not take these arguments.
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


def forward_job(model: nn.Module, batch: Mapping[str, Tensor]) -> Callable[[], object]:
    """Return a function that runs `batch` through the model.

    It raises CalibrationError if the model's forward does not work with this batch.
    """
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


class UnchangedWeights:
    """Checks that a model's forward does not change its weights, which would also change the quantized ones."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._versions = {id(p): (p, p._version) for p in model.parameters()}

    def check(self) -> None:
        """Compare once, after the model has begun to run.

        Raises:
            ModelError: a weight has been changed in place.
        """
        for name, parameter in self._model.named_parameters() if self._versions else ():
            if parameter._version != self._versions.get(id(parameter), (None, parameter._version))[1]:
                raise ModelError(
                    f"{type(self._model).__name__} changes its weights while it runs, {name} first; that is not "
                    "possible with quantized weights. If a setting in config.json controls it, such as rescale_every "
                    "of RWKV models, set it to 0"
                )
        self._versions.clear()


def _untie(model: nn.Module, modules: Mapping[str, nn.Module], weights: Weights) -> None:
    """Untie an output embedding that will be quantized, so that the input embedding keeps its weight."""
    name = output_embedding_name(model)
    if name in modules:
        for tied in (f"{name}.weight", *weights.tied_vectors()):
            weights.untie(tied)
        config: Any = model.config
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
