"""How long a run will take, phase by phase: measured rates times counts.

Contract: arithmetic only. The phases do not overlap and add up; reading the text is what it took this time. Where the
next block is read while this one is in use, only what that cannot hide counts as reading.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..distributed import largest_shard
from ..planning import Plan
from .rates import DiskRate, Kind, LayerRate, kind_of
from .sizes import Sizes
from .trial import Trial
from .work import Work

# Bytes of a shard are written once; hashing and copying count like a check of the source.
_SHARD_COPIES = 1

# What is put away is written once, and read twice for the Hessian and once for the forward.
_PASSES_OVER_SCRATCH = 4

# Bytes per second that each process exchanges with the others, by gloo on one machine. Measured with idle cores.
_EXCHANGED = 1e9


def predict_seconds(
    plan: Plan,
    work: Work,
    trial: Trial,
    layers: Mapping[Kind, LayerRate],
    disk: DiskRate,
    sizes: Sizes,
    *,
    calibration: float,
    load: float,
    source_bytes: int,
    weight_bytes: int,
    ahead: bool = False,
) -> dict[str, float]:
    """Seconds by phase.

    Args:
        calibration: seconds that the text took. load: seconds that opening the model took.
        source_bytes: of the weight files. weight_bytes: of the model in memory.
        ahead: whether blocks are read ahead.
    """
    rates = [(one, layers[kind_of(one)]) for one in work.layers]
    calibrated = [(one, rate) for one, rate in rates if one.layer.settings.method != "rtn"]
    own = [(one, rate) for one, rate in calibrated if not one.shares]
    per_byte = trial.load_rate or 0.0
    blocks = len(plan.block_layers())
    writing = (sizes.quantized + sizes.plain) * (_SHARD_COPIES * disk.check + disk.write)
    solving = sum(rate.factor for _, rate in own)
    solving += sum(largest_shard(one.layer.out_features, work.processes) * rate.solve for one, rate in rates)
    busy = {
        "forward passes": forward_seconds(trial) * work.batches * work.streams,
        "Hessians": sum(one.rows * rate.accumulate for one, rate in own),
        "solving": solving,
    }
    reading = weight_bytes * per_byte
    if ahead:
        reading = max(reading / max(blocks, 1), reading - sum(busy.values()))
    return {
        "calibration text": calibration,
        "checking the source": source_bytes * disk.check,
        "reading weights": load + reading,
        **busy,
        "exchanging": _exchanged(work) / _EXCHANGED,
        "offloading": _PASSES_OVER_SCRATCH * work.spilled * disk.write,
        "packing": sum(one.layer.out_features * rate.pack for one, rate in rates),
        "journal": 2 * blocks * disk.file + sizes.journal * (disk.write + disk.check),
        "writing": writing + sizes.plain * per_byte + 8 * disk.file,
    }


def _exchanged(work: Work) -> float:
    """Bytes that each process sends: its share of the sums H and C, and of the codes."""
    sums = sum(
        4 * work.streams * one.layer.in_features**2
        for one in work.layers
        if one.layer.settings.method != "rtn" and not one.shares
    )
    codes = sum(one.layer.weights for one in work.layers)
    return (2 * sums + codes) * (work.processes - 1) / work.processes


def forward_seconds(trial: Trial) -> float:
    """The trial's batch through all blocks once."""
    return sum(seconds * len(trial.kinds[block]) for block, seconds in trial.seconds.items())
