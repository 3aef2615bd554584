"""How much memory a run will take at its worst moment, part by part.

Contract: arithmetic only, for each process where there are several. What the batches hold was counted in the trial,
the sizes of the weights' units are known; the matrices of the solver are counted here (tests compare them with what
it really holds). All parts are those of one moment and add up to the peak.

    libraries       this process before the work, with what libraries page in at their first use
    weights         what stays, and one or two blocks of the model
    activations     what all paused batches hold, in both streams
    forward         what one batch needs inside an operation
    Hessians        H, C and their factorizations, of this layer and of one before it whose input is still in use
    solver          the weight matrix in float32, its target, error and codes, several times
    probe           held-out rows of both streams
    allocator       what the C library's heap takes beyond its contents: holes

On a GPU these are in its memory, and of the activations those that it has no room for in the host's, pinned, beside the
block that is read ahead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from .. import formatting as words
from ..distributed import largest_shard
from ..pipeline.memory import (
    FACTORING_MATRICES,
    FIRST_USE_BYTES,
    HOST_FRAGMENTATION,
    KEPT_MATRICES,
    PACKING_BYTES,
    PINNED_BYTES,
    solver_bytes,
)
from ..pipeline.streaming import REST
from ..planning import Plan
from .live import HEAP_BYTES
from .work import LayerWork, Work

Parts = dict[str, int]


@dataclass(frozen=True)
class Memory:
    """Bytes of the process at its worst moment.

    Attributes:
        moment: which that is. parts: what is in memory then; they add up to `peak`.
        device_peak: of the GPU's memory, where the work runs on one. spilled: activations that it has no room for, and
            that are in the host's.
    """

    moment: str
    parts: Parts
    device_peak: int | None = None
    spilled: int = 0

    @property
    def peak(self) -> int:
        """All parts."""
        return sum(self.parts.values())


def predict_memory(
    plan: Plan,
    work: Work,
    units: Mapping[str, int],
    *,
    baseline: int,
    largest_tensor: int,
    dtype: torch.dtype,
    device: torch.device,
    extras: Mapping[str, Parts],
    device_free: int | None = None,
) -> Memory:
    """The worst moment of the run.

    Args:
        units: bytes of the weights' units. baseline: of this process before the work.
        largest_tensor: bytes of the largest one as it lies in the files.
        extras: further moments of the work, by name. device_free: of a GPU's memory; None where it does not say.
    """
    moments = dict(_walk_moments(plan, work, units, dtype)) | dict(extras)
    if device.type != "cpu":
        return _on_device(moments, units, baseline, largest_tensor, device_free)
    reading = {"weights": max(units.values(), default=0), "reading": largest_tensor}
    moments["writing the checkpoint"] = reading
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return Memory(moment, {"libraries": baseline + FIRST_USE_BYTES, **moments[moment]})


def spilled_notes(memory: Memory) -> list[str]:
    """What a user should know of activations that a GPU has no room for."""
    if not memory.spilled:
        return []
    return [
        f"{words.size(memory.spilled)} of activations have no room on the device and will wait in host memory; the "
        "time to move them is not foreseen"
    ]


def _on_device(
    moments: Mapping[str, Parts],
    units: Mapping[str, int],
    baseline: int,
    largest_tensor: int,
    free: int | None,
) -> Memory:
    """The worst moment of the host is while it reads; the device has its own."""
    needed = {name: sum(parts.values()) for name, parts in moments.items()}
    lacking = {name: 0 if free is None else max(0, size - free) for name, size in needed.items()}
    spilled = {name: min(moments[name].get("activations", 0), size) for name, size in lacking.items()}
    most = max(spilled.values())
    host = {
        "libraries": baseline,
        "reading": largest_tensor + PINNED_BYTES * max(units.values(), default=0),
        **({"activations": most} if most else {}),
    }
    peak = max(needed[name] - spilled[name] for name in moments)
    return Memory("reading weights", host, peak, most)


def _walk_moments(
    plan: Plan, work: Work, units: Mapping[str, int], dtype: torch.dtype
) -> Iterable[tuple[str, Parts]]:
    """What is in memory while each layer is solved, and while the batches go on to the next block."""
    blocks: dict[str, list[LayerWork]] = {}
    for one in work.layers:
        blocks.setdefault(one.layer.block, []).append(one)
    largest = max((units.get(block, 0) for block in blocks), default=0)
    most = max(work.layers, key=lambda one: one.held)
    rest = units.get(REST, 0)
    for block, ones in blocks.items():
        weights = rest + units.get(block, 0)
        waiting = PACKING_BYTES * sum(one.layer.weights for one in ones)
        before = 0  # the Hessian before this one, kept while its input is
        for one in ones:
            n = one.layer.in_features
            matrix, kept = 4 * n * n, KEPT_MATRICES[work.streams]
            solver = _solver_bytes(one, work, dtype)
            making = (FACTORING_MATRICES[work.streams] - kept) * matrix
            hessians = kept * matrix + before + max(0, making - solver)
            heap = most.heap + (hessians if matrix < HEAP_BYTES else 0)
            heap += solver if 4 * one.layer.weights < HEAP_BYTES else 0
            parts = {
                "weights": weights,
                "activations": one.held,
                "Hessians": hessians,
                "solver": solver + waiting,
                "probe": 8 * work.probe * n,
                "allocator": round(HOST_FRAGMENTATION * heap),
            }
            yield f"solving {one.layer.name}", parts
            if not one.shares:
                before = kept * matrix
        parts = {
            "weights": weights + largest,
            "activations": most.held,
            "forward": work.transient,
            "Hessians": before,
            "solver": waiting,
            "allocator": round(HOST_FRAGMENTATION * most.heap),
        }
        yield f"leaving {block}", parts


def _solver_bytes(one: LayerWork, work: Work, dtype: torch.dtype) -> int:
    rows = largest_shard(one.layer.out_features, work.processes)
    return solver_bytes(
        rows, one.layer.in_features, work.streams, converted=dtype != torch.float32, holdout_tokens=work.probe
    )
