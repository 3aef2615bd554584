"""What a run takes: sizes, memory and time, computed from its `Work` and from measured rates. Arithmetic only.

The memory of a run is its worst moment: each layer's solve, the end of each block, and what options add. The parts of a
moment are:

    libraries       this process before the work, and what libraries load at their first use
    weights         what stays in memory, and one or two blocks of the model
    activations     what all paused batches hold, on both paths
    forward         what one batch needs inside an operation
    Hessians        H, C and their factorizations, of this layer and of the one before it if its input is still in use
    solver          the weight matrix in float32, its target, error and codes
    holdout         holdout rows of both paths
    allocator       what the C library's arena takes beyond its contents

On a GPU the parts are in its memory. Activations for which it has no space are in pinned host memory, beside the block
that is prefetched.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..calibration import Calibration
from ..checkpoint.assemble import checkpoint_tensors
from ..checkpoint.layout import Shaped
from ..checkpoint.safetensors_file import encode_header
from ..config import QuantConfig
from ..distillation.student import bytes_kept
from ..distributed import largest_shard
from ..gptq.output_feedback import feedback_bytes
from ..mixed_precision.sensitivity import BATCHES, ROWS, TOKENS
from ..modeling.source import Source
from ..pipeline import output_hessians
from ..pipeline.gradients import some_batches
from ..pipeline.memory import (
    FIRST_USE_BYTES,
    HOST_FRAGMENTATION,
    MATRICES,
    PACKING_BYTES,
    PINNED_BYTES,
    solver_bytes,
)
from ..pipeline.streaming import REST, Weights
from ..pipeline.tune_block import TOKENS_PER_STEP
from ..planning import Plan, output_embedding_name, plan_copied
from ..preparation import Preparation
from ..resources import takes_at_most
from .trial import ARENA_BYTES, Trial, tokens_of
from .work import DiskRate, Kind, LayerRate, LayerWork, Work

Parts = dict[str, int]

# Bytes for every weight of a block that is tuned: v, its gradient, two moments of Adam, the original, the best codes
# so far, and the matrices of one step.
TUNE_BYTES = 28
# Passes through a block for each token of a tuning step, measured: forward, backward, and the step itself.
_TUNE_PASSES = 3.7
# Passes through a block for each token whose gradients are computed: forward, forward again, backward to the inputs.
_GRADIENT_PASSES = 3.0
# Tensors that a block saves for the backward pass, as a multiple of what it holds where it pauses.
_SAVED = 4
# Distillation, for the default batch: its tokens; passes through the model for each token, measured (teacher, student,
# student again in the backward pass, two products of the backward pass, unpacking); bytes for every trained scale (d,
# its gradient, two moments, the best state); values of the widest layer's input that one block saves for each token;
# bytes for every token and word of the vocabulary.
_DISTILLED_TOKENS, _DISTILL_PASSES, _TRAINED_BYTES, _DISTILLED_WIDTHS, _DISTILLED_LOGITS = (
    1024,
    6.0,
    20,
    60,
    16,
)
# Bytes for every token of a window and word of the vocabulary, while two models are compared.
_SCORE_BYTES = 24

# Activations on disk are written once, and read twice for the Hessian and once for the forward pass.
_OFFLOAD_PASSES = 4


@dataclass(frozen=True)
class Sizes:
    """Bytes on disk, exact where tensors are concerned.

    Attributes:
        quantized: bytes of the packed tensors.
        plain: bytes of the tensors that are not quantized.
        output: bytes of the finished folder.
        journal: bytes of the journal, which exists until the folder is complete.
        output_hessians: bytes that `loss_aware` keeps beside it.
        layers: layer → bytes of its packed tensors.
    """

    quantized: int
    plain: int
    output: int
    journal: int
    output_hessians: int
    layers: dict[str, int]

    @property
    def disk(self) -> int:
        """Free space that a new run needs: result, journal and what lies beside it, at the same time."""
        return self.output + self.journal + self.output_hessians


def sizes_of(weights: Weights, plan: Plan, config: QuantConfig, source: Source) -> Sizes:
    """Sizes of the result; weights may be on the meta device. With `target_bits` the budget counts as quantized."""
    model = weights.model
    packed = {layer.name: layer.packed() for layer in plan.layers}
    states = weights.state_by_shard()
    tensors: dict[str, Shaped] = {name: tensor.info for name, tensor in weights.unused.items()}
    for layer in plan_copied({name: tensor.shape for name, tensor in tensors.items()}, config):
        del tensors[f"{layer.name}.weight"]
        tensors |= {f"{layer.name}.{short}": tensor for short, tensor in layer.packed().items()}
    dtypes = weights.stored_dtypes
    tensors |= checkpoint_tensors(
        model, list(packed), packed.__getitem__, states, values=False, dtypes=dtypes
    )
    entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    layers = {name: sum(tensor.nbytes for tensor in parts.values()) for name, parts in packed.items()}
    quantized = sum(layers.values())
    plain = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in entries) - quantized
    if config.target_bits is not None:
        quantized = int(config.target_bits * plan.weights / 8)
    copied = sum(path.stat().st_size for path in source.files_to_copy().values())
    # Report, model card and manifest; lines of the journal: as seen with models of every size.
    texts = 2 * len(json.dumps(source.config_dict(model))) + 46_000 + 1_400 * len(plan.layers)
    output = quantized + plain + len(encode_header(entries)) + copied + texts
    hessians = sum(output_hessians.hessian_sizes(plan).values()) if config.loss_aware else 0
    return Sizes(quantized, plain, output, quantized + 600 * len(plan.layers), hessians, layers)


@dataclass(frozen=True)
class Memory:
    """Memory of the process at its worst moment.

    Attributes:
        moment: what happens at that moment.
        parts: bytes of each part; they add up to `peak`.
        device_peak: bytes of the GPU's memory; None if the work runs on the CPU.
        host_activations: bytes of activations in host memory because the GPU has no space for them.
    """

    moment: str
    parts: Parts
    device_peak: int | None = None
    host_activations: int = 0

    @property
    def peak(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


def host_memory(
    moments: Mapping[str, Parts], shards: Mapping[str, int], baseline: int, tensor: int
) -> Memory:
    """The worst moment of a run on the CPU.

    The process has `baseline` bytes before the work; the largest tensor in the files has `tensor` bytes.
    """
    writing = {"weights": max(shards.values(), default=0), "reading": tensor}
    moments = {**moments, "writing the checkpoint": writing}
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return Memory(moment, {"libraries": baseline + FIRST_USE_BYTES, **moments[moment]})


def device_memory(
    moments: Mapping[str, Parts], shards: Mapping[str, int], baseline: int, tensor: int, free: int | None
) -> Memory:
    """The worst moment of a run on a GPU with `free` bytes, None if unknown; the host's is while it reads weights."""
    device_peak = on_host = 0
    for parts in moments.values():
        needed = sum(parts.values())
        excess = 0 if free is None else max(0, needed - free)
        moved = min(parts.get("activations", 0), excess)
        device_peak, on_host = max(device_peak, needed - moved), max(on_host, moved)
    reading = tensor + PINNED_BYTES * max(shards.values(), default=0)
    host = {"libraries": baseline, "reading": reading, **({"activations": on_host} if on_host else {})}
    return Memory("reading weights", host, device_peak, on_host)


def run_moments(work: Work, shards: Mapping[str, int], dtype: torch.dtype) -> dict[str, Parts]:
    """What is in memory while each layer is solved, and while the batches continue to the next block."""
    blocks: dict[str, list[LayerWork]] = {}
    for one in work.layers:
        blocks.setdefault(one.layer.block, []).append(one)
    moments: dict[str, Parts] = {}
    for block, ones in blocks.items():
        moments.update(_block_moments(block, ones, work, shards, dtype))
    largest = max((shards.get(block, 0) for block in blocks), default=0)
    for block in blocks:
        moments[f"leaving {block}"]["weights"] += largest
    return moments


def _block_moments(
    block: str, ones: list[LayerWork], work: Work, shards: Mapping[str, int], dtype: torch.dtype
) -> Iterator[tuple[str, Parts]]:
    most = work.held()
    weights = shards.get(REST, 0) + shards.get(block, 0)
    waiting = PACKING_BYTES * sum(one.layer.weights for one in ones)
    before = 0  # the Hessian of the layer before, which is kept while its input is
    for one in ones:
        n = one.layer.in_features
        matrix = 4 * n * n
        kept = MATRICES[work.paths] * matrix
        rows = largest_shard(one.layer.out_features, work.processes)
        solver = solver_bytes(
            rows, n, work.paths, converted=dtype != torch.float32, holdout_tokens=work.holdout
        )
        hessians = kept + before
        arena = most.arena + (hessians if matrix < ARENA_BYTES else 0)
        arena += solver if 4 * one.layer.weights < ARENA_BYTES else 0
        yield (
            f"solving {one.layer.name}",
            {
                "weights": weights,
                "activations": one.held,
                "Hessians": hessians,
                "solver": solver + waiting,
                "holdout": 8 * work.holdout * n,
                "allocator": round(HOST_FRAGMENTATION * arena),
            },
        )
        before = before if one.shares else kept
    yield (
        f"leaving {block}",
        {
            "weights": weights,
            "activations": most.held,
            "forward": work.transient,
            "Hessians": before,
            "solver": waiting,
            "allocator": round(HOST_FRAGMENTATION * most.arena),
        },
    )


def option_moments(
    model: nn.Module, config: QuantConfig, calibration: Calibration, work: Work, shards: Mapping[str, int]
) -> dict[str, Parts]:
    """What is in memory while a bit budget is measured, and while a block is tuned."""
    dtype, moments = next(model.parameters()).dtype, {}
    layers = [one.layer for one in work.layers]
    held = _held_by_a_batch(work)
    blocks: dict[str, int] = {}
    for layer in layers:
        blocks[layer.block] = blocks.get(layer.block, 0) + layer.weights
    if config.target_bits is not None:
        batches = some_batches(calibration, TOKENS, BATCHES, torch.device("cpu"))
        longest = max(tokens_of(batch) for batch in batches)
        rows = min(ROWS, sum(tokens_of(batch) for batch in batches))
        moments["measuring the cost of bits"] = {
            "weights": sum(shards.values()),
            "activations": len(blocks) * longest * layers[0].in_features * dtype.itemsize + _SAVED * held,
            "logits": 3 * longest * vocabulary_size(model) * dtype.itemsize,
            "kept rows": rows
            * sum(layer.in_features + layer.out_features for layer in layers)
            * dtype.itemsize,
        }
    if config.tune:
        moments["tuning"] = {
            "weights": shards.get(REST, 0) + 2 * max(shards.get(name, 0) for name in blocks),
            "activations": work.held().held + _SAVED * held,
            "tuning": TUNE_BYTES * max(blocks.values()),
        }
    return moments


def loss_aware_moments(
    moments: Mapping[str, Parts], run: Preparation, work: Work, shards: Mapping[str, int]
) -> dict[str, Parts]:
    """The moments with `loss_aware`: one more for the backward passes, and more to hold while layers are solved."""
    model, plan = run.model, run.plan
    parameter = next(model.parameters())
    longest = max(map(tokens_of, _gradient_batches(run.calibration)))
    whole, rest = sum(shards.values()), shards.get(REST, 0)
    fits = takes_at_most(output_hessians.SHARE, whole, parameter.device)
    size = parameter.dtype.itemsize
    kept = len(plan.block_layers()) * longest * plan.layers[0].in_features * size
    found = {name: dict(parts) for name, parts in moments.items()}
    for layer in plan.layers:
        parts = found.get(f"solving {layer.name}")
        if parts is not None:
            parts["feedback"] = feedback_bytes(layer.out_features, layer.in_features, parts["solver"])
    return {
        **found,
        "gradients": {
            "weights": whole if fits else rest + 2 * max(shards.values()),
            "activations": kept + _SAVED * _held_by_a_batch(work),
            "logits": 3 * longest * vocabulary_size(model) * size,
            "output Hessians": sum(output_hessians.hessian_sizes(plan).values()),
        },
    }


def _held_by_a_batch(work: Work) -> int:
    """Bytes that pause in one block for one batch."""
    return round(work.held().held / max(work.batches * work.paths, 1))


def _gradient_batches(calibration: Calibration) -> list[dict[str, Tensor]]:
    return some_batches(calibration, output_hessians.TOKENS, output_hessians.BATCHES, torch.device("cpu"))


def gradient_seconds(model: nn.Module, plan: Plan, calibration: Calibration, trial: Trial) -> float:
    """Seconds of the backward passes of `loss_aware`: through all blocks and the output embedding."""
    head = vocabulary_size(model) * min(layer.in_features for layer in plan.layers)
    tokens = sum(map(tokens_of, _gradient_batches(calibration)))
    share = 1 + head / max(1, plan.weights)
    return _GRADIENT_PASSES * share * trial.forward_seconds / trial.tokens * tokens


def tuning_seconds(config: QuantConfig, trial: Trial) -> float:
    """Seconds of the steps that tune all blocks."""
    return _TUNE_PASSES * trial.forward_seconds / trial.tokens * TOKENS_PER_STEP * config.tune_steps


def distillation_kept(plan: Plan) -> int:
    """Bytes that make the training faster, if there is memory for them."""
    shapes = [(layer.in_features, layer.out_features) for layer in plan.layers]
    return bytes_kept(shapes, _DISTILLED_TOKENS, torch.bfloat16)


def distillation_moment(model: nn.Module, plan: Plan, kept: int) -> Parts:
    """What is in memory while the result is trained against the original, which is in memory too if it fits."""
    quantized = {f"{layer.name}.weight" for layer in plan.layers}
    dense = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name not in quantized)
    packed = sum(tensor.nbytes for layer in plan.layers for tensor in layer.packed().values())
    scales = sum(tensor.numel() for layer in plan.layers for tensor in [layer.packed()["scales"]])
    original = 2 * sum(p.numel() for p in model.parameters())
    blocks, width = len(plan.block_layers()), max(layer.in_features for layer in plan.layers)
    return {
        "weights": dense + packed + original,
        "kept to be faster": kept,
        "activations": _DISTILLED_TOKENS * width * (2 * blocks + _DISTILLED_WIDTHS),
        "logits": _DISTILLED_LOGITS * _DISTILLED_TOKENS * vocabulary_size(model),
        "training": _TRAINED_BYTES * scales,
    }


def distillation_seconds(model: nn.Module, plan: Plan, config: QuantConfig, trial: Trial) -> float:
    """Seconds of the training: passes through all blocks and the output embedding, for each token."""
    head = vocabulary_size(model) * min(layer.in_features for layer in plan.layers)
    share = 1 + head / max(1, plan.weights)
    return _DISTILL_PASSES * share * trial.forward_seconds / trial.tokens * config.distill_tokens


def evaluation_moment(model: nn.Module, window: int) -> Parts:
    """What is in memory while two models are compared on windows of `window` tokens."""
    both = 2 * sum(p.numel() * p.element_size() for p in model.parameters())
    return {"weights": both, "logits": _SCORE_BYTES * window * vocabulary_size(model)}


def vocabulary_size(model: nn.Module) -> int:
    """Rows of the output embedding; 0 without one."""
    name = output_embedding_name(model)
    return model.get_submodule(name).get_parameter("weight").shape[0] if name else 0


@dataclass(frozen=True)
class InputCost:
    """What the inputs of a run take.

    Attributes:
        calibration: seconds that the text took.
        load: seconds that opening the model took.
        source_bytes: bytes of the weight files.
        weight_bytes: bytes of the weights in memory.
        prefetch: True if the next block is read while this one is in use.
    """

    calibration: float
    load: float
    source_bytes: int
    weight_bytes: int
    prefetch: bool = False


def predict_seconds(
    work: Work,
    trial: Trial,
    rates: Mapping[Kind, LayerRate],
    disk: DiskRate,
    sizes: Sizes,
    inputs: InputCost,
) -> dict[str, float]:
    """Seconds by phase: measured rates times counts. Phases do not overlap and add up.

    The exchange between processes, `target_bits`, `tune`, `distill` and an evaluation are not included.
    """
    rated = [(one, rates[one.layer.in_features, one.layer.settings]) for one in work.layers]
    own = [(one, rate) for one, rate in rated if one.layer.settings.needs_inputs and not one.shares]
    blocks = len({one.layer.block for one in work.layers})
    per_byte = trial.load_rate or 0.0
    rows = [largest_shard(one.layer.out_features, work.processes) for one in work.layers]
    busy = {
        "forward passes": trial.forward_seconds * work.batches * work.paths,
        "Hessians": sum(one.rows * rate.accumulate for one, rate in own),
        "solving": sum(rate.factor for _, rate in own)
        + sum(rate.layer + count * rate.solve for count, (_, rate) in zip(rows, rated, strict=True)),
    }
    reading = inputs.weight_bytes * per_byte
    if inputs.prefetch:  # only the first block is waited for, or what takes longer than the work
        reading = max(reading / max(blocks, 1), reading - sum(busy.values()))
    written = sizes.quantized + sizes.plain
    return {
        "calibration text": inputs.calibration,
        "checking the source": inputs.source_bytes * disk.check,
        "reading weights": inputs.load + reading,
        **busy,
        "offloading": _OFFLOAD_PASSES * work.offloaded * disk.write,
        "packing": sum(one.layer.out_features * rate.pack for one, rate in rated),
        "journal": 2 * blocks * disk.file + sizes.journal * (disk.write + disk.check),
        "writing": written * (disk.check + disk.write) + sizes.plain * per_byte + 8 * disk.file,
    }
