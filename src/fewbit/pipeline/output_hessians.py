"""The Hessian G = Σ g gᵀ of every layer's outputs, of the model before it is quantized (`--loss-aware`).

Rank 0 runs some calibration batches forward and backward, and keeps the sums in blocks of outputs
(`gptq.output_feedback`): on disk beside the journal, so that a killed run continues with the same ones, or in memory
for a model in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..atomic_io import replacing
from ..calibration import Calibration
from ..context import RunContext
from ..distributed import Communicator
from ..errors import ConfigError, ModelError, OutputError
from ..formatting import plural, size
from ..gptq.hessian import usable_rows
from ..gptq.output_feedback import hessian_bytes, output_blocks
from ..planning import Plan
from ..resources import memory_left, takes_at_most
from .gradients import repeated_blocks, run_backward, some_batches
from .streaming import Weights

# Calibration tokens for the backward pass, at least, and batches.
TOKENS = 32_768
BATCHES = 8
SHARE = 0.5  # of the free memory that the whole model may take; a larger one is read block by block

Read = Callable[[str], Tensor | None]


@dataclass(frozen=True)
class OutputHessians:
    """G of the layers that were reached; only rank 0 has them.

    Attributes:
        comm: all ranks ask for the same layers in the same order.
        read: G of a layer on the CPU, float32 (blocks, size, size); None for a layer that no gradient reached.
    """

    comm: Communicator
    read: Read

    def of(self, layer: str, rows: slice, device: torch.device) -> Tensor | None:
        """G of these rows, which begin at the start of a block."""
        found = self.read(layer) if self.comm.is_leader else None
        G = self.comm.broadcast_tensors(lambda: {} if found is None else {"G": found}).get("G")
        return None if G is None else G[rows.start // G.shape[1] : -(-rows.stop // G.shape[1])].to(device)


@dataclass(frozen=True)
class OutputHessianStore:
    """The sums on disk: ``OUT/.fewbit/output_hessians.safetensors``, with the fingerprint of the run."""

    folder: Path
    fingerprint: Mapping[str, str]

    @property
    def path(self) -> Path:
        return self.folder / "output_hessians.safetensors"

    def open(self) -> Read | None:
        """What is stored; None if there is nothing that belongs to this run."""
        if not self.path.is_file():
            return None
        try:
            file: Any = safe_open(self.path, "pt")
            stored = json.loads((file.metadata() or {}).get("fingerprint", "null"))
        except (SafetensorError, OSError, ValueError):
            return None
        if stored != dict(self.fingerprint):
            return None
        names = set(file.keys())
        return lambda name: file.get_tensor(name) if name in names else None

    def write(self, sums: Mapping[str, Tensor]) -> None:
        """Store the sums.

        Raises:
            OutputError: the disk is full or cannot be written.
        """
        try:
            with replacing(self.path) as file:
                save_file(dict(sums), file.name, {"fingerprint": json.dumps(dict(self.fingerprint))})
        except (SafetensorError, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OutputError(
                f"cannot write {self.path}: {reason}. Make room and run the same command again"
            ) from error


def output_hessians(
    model: nn.Module,
    plan: Plan,
    calibration: Calibration,
    weights: Weights,
    ctx: RunContext,
    store: OutputHessianStore | None = None,
) -> tuple[OutputHessians | None, list[str]]:
    """G of every layer of the plan, and sentences for the user; None without ``loss_aware``.

    Args:
        model: model in evaluation mode, with its original weights; it is not changed.
        plan: layers to quantize.
        calibration: calibration batches.
        weights: weights of the model. Where the whole model takes more than half of the free memory, each block is read
            when it is computed, twice for a batch.
        ctx: run; progress is called with the phase "gradients".
        store: where a run that can be resumed keeps the sums.

    Raises:
        ConfigError: the sums do not fit into memory.
        ModelError: no gradients can be computed through the model.
        OutputError: the sums cannot be written.
    """
    names = list(hessian_sizes(plan))
    if not ctx.config.loss_aware or not names:
        return None, []
    read: Read | None = None
    unreached: list[str] = []
    if ctx.comm.is_leader:
        read = store.open() if store else None
        if read is None:
            with ctx.profiler.time("gradients"):
                sums = _collect(model, plan, calibration, weights, ctx)
            if store:
                store.write(sums)
            read = store.open() if store else sums.get
        if read is None:
            raise OutputError(f"{store and store.path} was written, but cannot be read: check the disk")
        unreached = [name for name in names if read(name) is None]
    notes = ctx.comm.broadcast_object(_notes(unreached))
    return OutputHessians(ctx.comm, read or (lambda name: None)), notes


def hessian_sizes(plan: Plan) -> dict[str, int]:
    """Layer → bytes of its G, for the layers that take part."""
    return {
        layer.name: hessian_bytes(layer.out_features) for layer in plan.layers if layer.settings.needs_inputs
    }


def _check_memory(plan: Plan) -> None:
    """Raise ConfigError if the sums do not fit into memory."""
    needed, left = sum(hessian_sizes(plan).values()), memory_left()
    if left is not None and needed > left.bytes:
        raise ConfigError(
            f"loss_aware needs {size(needed)} of memory for the Hessians of all outputs, {size(left.bytes)} are "
            f"{left.name}: leave it out, or use a machine with more memory"
        )


def _collect(
    model: nn.Module, plan: Plan, calibration: Calibration, weights: Weights, ctx: RunContext
) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}

    def take(name: str, x: Tensor) -> Callable[[Tensor], None]:
        return partial(add, name)

    def add(name: str, g: Tensor) -> None:
        usable = usable_rows(g)
        if not bool(usable.all()):
            raise ModelError(
                f"the gradients of {name} overflow: try dtype float32 or bfloat16, or leave loss_aware out"
            )
        G = output_blocks(g).cpu()
        sums[name] = sums[name].add_(G) if name in sums else G

    _check_memory(plan)
    names = list(hessian_sizes(plan))
    fits = takes_at_most(SHARE, sum(weights.shard_sizes().values()), weights.device)
    with weights.on_demand(lambda shard: None):
        run_backward(
            model,
            {name: partial(take, name) for name in names},
            repeated_blocks(model, plan),
            some_batches(calibration, TOKENS, BATCHES, weights.device),
            seed=ctx.config.seed,
            progress=lambda done, total: ctx.progress("gradients", done, total),
            release=(lambda: None) if fits else (lambda: weights.release_except([])),
        )
    weights.release_except([])
    return {name: G for name, G in sums.items() if bool(G.any())}


def _notes(unreached: Iterable[str]) -> list[str]:
    names = list(unreached)
    if not names:
        return []
    return [
        f"no gradient reached {plural(len(names), 'layer')}, for example {names[0]}: the outputs count alike there"
    ]
