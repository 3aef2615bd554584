"""What a run has to do, layer by layer, and how long this machine takes for it.

`work_of` scales the trial of a few blocks to all layers and all batches. `LayerBenchmark` and `measure_disk` time the
run's own code on random numbers, whose values do not matter for the time. `predict` multiplies the two.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..atomic_io import write_whole
from ..calibration import Calibration
from ..checkpoint.layout import pack
from ..checkpoint.safetensors_file import TensorInfo, check_finite
from ..config import LayerSettings, QuantConfig
from ..errors import ModelError, OutputError
from ..gptq import Hessian, Holdout, InputGroup, quantize_weight
from ..gptq.hessian import SMALL_BATCH
from ..gptq.output_feedback import output_blocks
from ..modeling.experts import RoutedExperts, routed_modules
from ..pipeline.expert_calibration import TOKENS_PER_FEATURE
from ..pipeline.memory import RESIDENT_STORAGES
from ..pipeline.quantize_layers import needs_full_precision
from ..pipeline.statistics import HOLDOUT_TOKENS, BatchMasks, split_holdout
from ..planning import LayerPlan, Plan, block_of
from .trial import Trial, is_expert, synchronize, tokens_of

# Wider layers are measured at this width and scaled by their known cost: n² for each row of a Hessian and each row of a
# weight, n³ for a factorization.
LARGEST_WIDTH = 4096

# Rows of the Hessian that is measured (small batches would wait for each other), and about the number of operations for
# the rows of the weight. A few rows are measured too: what they take beyond their share is the layer's own.
_HESSIAN_ROWS = 1024
_WEIGHT_OPERATIONS = 2e10
_FEW_ROWS = 64
_FILE_BYTES = 1 << 24

# What decides a layer's rate: its width and its settings.
Kind = tuple[int, LayerSettings]


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
        processes: processes that share the run; rows, batches and bytes are for the process with the most batches.
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
    """Scale what one batch showed to all layers and all batches."""
    tokens = sum(tokens_of(batch) for batch in calibration.batches)
    batches, paths = tokens / trial.tokens, 2 if needs_full_precision(config) else 1
    held_out = _holdout_share(calibration) if paths == 2 else 0.0
    experts = routed_modules(model)
    tried = {block: first for first, blocks in trial.kinds.items() for block in blocks}
    most = max(((pause.held, pause.arena) for pause in trial.pauses.values()), default=(0, 0))
    layers = []
    for layer in plan.layers:
        block, own = tried.get(layer.block, ""), layer.name[len(layer.block) :]
        pause = trial.pauses.get(block + own)
        rows, (held, arena), shares = tokens, most, False  # outside of blocks, or not reached by the trial
        if pause is not None:
            rows, held, arena = round(pause.rows * batches), pause.held, pause.arena
            shares = pause.first[len(block) :] != own
        elif is_expert(layer, experts):
            module, number, projection = layer.name.rsplit(".", 2)
            rows = _expert_rows(experts[module], tokens, trial.experts_per_token)
            gated = hasattr(experts[module].get_submodule(number), "gate_proj")
            shares = projection == "up_proj" and gated
        rows, passes = round(rows * (1 - held_out)), batches * paths
        layers.append(LayerWork(layer, rows, shares, round(held * passes), round(arena * passes)))
    holdout = min(HOLDOUT_TOKENS, round(tokens * held_out))
    return Work(layers, batches, paths, holdout, trial.transient)


def of_one_process(work: Work, processes: int, batches: int) -> Work:
    """The work of the process with the largest share of the `batches`."""
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

    The running batch stays in memory, and so do the inputs that a Hessian accumulates.
    """
    passes = work.batches * work.paths
    layers = []
    for one in work.layers:
        inputs = RESIDENT_STORAGES * trial.tokens * one.layer.in_features * dtype.itemsize
        layers.append(replace(one, held=round(one.held / passes) + inputs, arena=0))
    new = sum(pause.new * len(trial.kinds.get(block_of(name), ())) for name, pause in trial.pauses.items())
    disk = max((one.held for one in work.layers), default=0)
    return replace(work, layers=layers, disk=disk, offloaded=round(new * passes))


def _expert_rows(experts: RoutedExperts, tokens: int, choices: int) -> int:
    """Tokens that reach an expert under balanced routing; an under-routed expert also sees tokens of others."""
    sent = tokens * choices // experts.num_experts
    return max(sent, min(tokens, TOKENS_PER_FEATURE * experts.hidden_size))


def _holdout_share(calibration: Calibration) -> float:
    masks = split_holdout([BatchMasks.of(batch) for batch in calibration.batches])
    sequences = sum(one.sequences for one in masks)
    return sum(one.held_out for one in masks) / sequences if sequences else 0.0


@dataclass(frozen=True)
class LayerRate:
    """Seconds for the layers of one width and one kind of settings.

    Attributes:
        accumulate: seconds for each row that enters a Hessian.
        factor: seconds for each Hessian.
        layer: seconds for each weight, however many rows it has.
        solve: seconds for each row of a weight.
        pack: seconds for each row of a weight.
    """

    accumulate: float
    factor: float
    layer: float
    solve: float
    pack: float


@dataclass(frozen=True)
class LayerBenchmark:
    """Times the steps of one layer.

    Attributes:
        config: settings of the run.
        dtype: dtype of activations and weights.
        device: device that solves.
        paths: forward passes of every batch, 1 or 2.
        holdout: holdout tokens that judge each layer, 0 for none.
    """

    config: QuantConfig
    dtype: torch.dtype
    device: torch.device
    paths: int
    holdout: int

    def rates(self, layers: Sequence[LayerPlan]) -> dict[Kind, LayerRate]:
        """The rate of every kind of layer."""
        rows: dict[Kind, int] = {}
        for layer in layers:
            kind = layer.in_features, layer.settings
            rows[kind] = max(rows.get(kind, 0), layer.out_features)
        found: dict[Kind, LayerRate] = {}
        for (n, settings), m in rows.items():
            if not found:  # the libraries prepare themselves at their first use
                self.rate(min(n, 256), min(m, 32), settings, min(self.holdout, 64))
            width = min(n, LARGEST_WIDTH)
            rate = self.rate(width, m, settings, self.holdout * width // n)
            up = n / width
            found[n, settings] = LayerRate(
                rate.accumulate * up**2,
                rate.factor * up**3,
                rate.layer * up**2,
                rate.solve * up**2,
                rate.pack * up,
            )
        return found

    def rate(self, n: int, m: int, settings: LayerSettings, holdout: int) -> LayerRate:
        """The rate of layers with `n` inputs, measured on at most `m` rows."""
        m = min(m, max(4 * _FEW_ROWS, int(_WEIGHT_OPERATIONS / (6 * n * n))))
        W = self._random(m, n)
        if not settings.needs_inputs:
            seconds, solution = self._timed(partial(quantize_weight, W, None, settings))
            packing, _ = self._timed(partial(self._finish, solution.codes))
            return LayerRate(0.0, 0.0, 0.0, seconds / m, packing / m)
        rows = max(SMALL_BATCH, min(_HESSIAN_ROWS, int(_WEIGHT_OPERATIONS / (5 * n**2))))
        hessian = Hessian(n, device=self.device)
        X, full = self._random(rows, n), self._random(rows, n) if self.paths == 2 else None
        accumulating = 0.0
        for step in (hessian.observe_range, hessian.add):
            step(X, None, full)  # not timed
            accumulating += self._timed(partial(step, X, None, full))[0]
        judge = Holdout(*(self._random(holdout, n).float() for _ in range(2))) if holdout else None
        group, correction = InputGroup(hessian, judge), self.config.effective_correction
        solve = partial(quantize_weight, W, group, settings, correction=correction, G=self._outputs(m))
        first, _ = self._timed(solve)
        again, solution = self._timed(solve)  # with the cached factor
        packing, _ = self._timed(partial(self._finish, solution.codes))
        each = again / m
        if m > _FEW_ROWS:
            few = partial(
                quantize_weight,
                W[:_FEW_ROWS],
                group,
                settings,
                correction=correction,
                G=self._outputs(_FEW_ROWS),
            )
            few()  # not timed
            each = max(again - self._timed(few)[0], 0.0) / (m - _FEW_ROWS)
        factoring, own = max(first - again, 0.0), max(again - m * each, 0.0)
        return LayerRate(accumulating / rows, factoring, own, each, packing / m)

    def _finish(self, codes: Any) -> None:
        """What follows a solve: the quantized weight for the model, and the tensors for the file."""
        codes.dequantize(self.dtype)
        for tensor in pack(codes, self.config.format).values():
            tensor.cpu().clone()

    def _outputs(self, m: int) -> torch.Tensor | None:
        """Some Hessian of m outputs, with `loss_aware`."""
        return output_blocks(torch.randn(64, m, device=self.device)) if self.config.loss_aware else None

    def _random(self, rows: int, n: int) -> torch.Tensor:
        return torch.randn(rows, n).to(self.device, self.dtype)

    def _timed(self, step: Callable[[], Any]) -> tuple[float, Any]:
        synchronize(self.device)
        start = time.perf_counter()
        result = step()
        synchronize(self.device)
        return time.perf_counter() - start, result


@dataclass(frozen=True)
class DiskRate:
    """Speed of the disks.

    Attributes:
        write: seconds for each byte that is written and synced.
        file: seconds for each file.
        check: seconds for each byte of the source that is read, hashed and checked.
    """

    write: float
    file: float
    check: float


def measure_disk(folder: Path, file: Path, tensor: TensorInfo | None) -> DiskRate:
    """How fast `folder` takes files, and how fast a weight file of the source is read and checked.

    `tensor` is in `file`; None if it is no safetensors file.

    Raises:
        OutputError: the folder cannot be written.
        ModelError: the file cannot be read, or the tensor holds values that are not finite.
    """
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fewbit-plan-") as temporary:
            small = _seconds(partial(write_whole, Path(temporary, "small"), bytes(1000)))
            large = _seconds(partial(write_whole, Path(temporary, "large"), bytes(_FILE_BYTES)))
    except OSError as error:
        raise OutputError(
            f"cannot write into {folder}: {error.strerror}; choose another output folder"
        ) from error
    size = min(tensor.nbytes if tensor else file.stat().st_size, _FILE_BYTES)
    try:
        seconds = _seconds(partial(_check, file, tensor, size))
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror}") from error
    return DiskRate(max(large - small, 0.0) / _FILE_BYTES, small, seconds / max(size, 1))


def _check(path: Path, tensor: TensorInfo | None, size: int) -> None:
    with open(path, "rb") as file:
        file.seek(tensor.start if tensor else 0)
        found = bytearray(file.read(size))
    hashlib.sha256(found)
    if tensor is not None and found:
        check_finite(path.name, torch.frombuffer(found, dtype=tensor.dtype))


def _seconds(step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
