"""How long a run will take, phase by phase: measured rates times counts.

Contract: arithmetic only. The phases do not overlap and add up; reading the text is what it took this time.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..plan import Plan
from .rates import DiskRate, Kind, LayerRate, kind_of
from .sizes import Sizes
from .trial import Trial
from .work import Work

# Bytes of a shard are written to the spool, read from it, hashed, written and synced; hashing and copying count
# like a check of the source.
_SHARD_COPIES = 2

# What is put away is written once, and read for the Hessian and for the forward.
_PASSES_OVER_SCRATCH = 2


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
) -> dict[str, float]:
    """Seconds by phase.

    Args:
        calibration: seconds that the text took. load: seconds that opening the model took.
        source_bytes: of the weight files. weight_bytes: of the model in memory.
    """
    rates = [(one, layers[kind_of(one)]) for one in work.layers]
    calibrated = [(one, rate) for one, rate in rates if one.layer.settings.method != "rtn"]
    own = [(one, rate) for one, rate in calibrated if not one.shares]
    per_byte = trial.load_rate or 0.0
    blocks = len(plan.block_layers())
    writing = (sizes.quantized + sizes.plain) * (_SHARD_COPIES * disk.check + disk.write)
    return {
        "calibration text": calibration,
        "checking the source": source_bytes * disk.check,
        "reading weights": load + weight_bytes * per_byte,
        "forward passes": forward_seconds(trial) * work.batches * work.streams,
        "Hessians": sum(one.rows * rate.accumulate for one, rate in own),
        "solving": sum(rate.factor for _, rate in own)
        + sum(one.layer.out_features * rate.solve for one, rate in rates),
        "offloading": _PASSES_OVER_SCRATCH * work.spilled * disk.write,
        "packing": sum(one.layer.out_features * rate.pack for one, rate in rates),
        "journal": 2 * blocks * disk.file + sizes.journal * (disk.write + disk.check),
        "writing": writing + sizes.plain * per_byte + 8 * disk.file,
    }


def forward_seconds(trial: Trial) -> float:
    """The trial's batch through all blocks once."""
    return sum(seconds * len(trial.kinds[block]) for block, seconds in trial.seconds.items())
