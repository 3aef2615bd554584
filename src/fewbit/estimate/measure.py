"""How fast this machine is: the run's own code on random numbers, whose values do not matter for the time.

Layers wider than `LARGEST_WIDTH` are measured at that width and scaled by their known cost: n² for each row of a
Hessian and each row of a weight, n³ for a factorization.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..atomic_io import write_whole
from ..checkpoint.layout import pack
from ..checkpoint.safetensors_file import TensorInfo, check_finite
from ..config import LayerSettings, QuantConfig
from ..errors import ModelError, OutputError
from ..gptq import Hessian, Holdout, InputGroup, quantize_weight
from ..planning import LayerPlan
from .trial import synchronize

LARGEST_WIDTH = 4096

# Rows of the Hessian that is measured, and about the number of operations for the rows of the weight.
_HESSIAN_ROWS = 1024
_WEIGHT_OPERATIONS = 4e9
_FILE_BYTES = 1 << 24

# What decides a layer's rate: its width and its settings.
Kind = tuple[int, LayerSettings]


@dataclass(frozen=True)
class LayerRate:
    """Seconds for the layers of one width and one kind of settings.

    Attributes:
        accumulate: seconds for each row that enters a Hessian.
        factor: seconds for each Hessian.
        solve: seconds for each row of a weight.
        pack: seconds for each row of a weight.
    """

    accumulate: float
    factor: float
    solve: float
    pack: float


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
                rate.accumulate * up**2, rate.factor * up**3, rate.solve * up**2, rate.pack * up
            )
        return found

    def rate(self, n: int, m: int, settings: LayerSettings, holdout: int) -> LayerRate:
        """The rate of layers with `n` inputs, measured on at most `m` rows."""
        m = min(m, max(64, int(_WEIGHT_OPERATIONS / (6 * n * n))))
        W = self._random(m, n)
        if settings.method == "rtn":
            seconds, solution = self._timed(partial(quantize_weight, W, None, settings))
            packing, _ = self._timed(partial(self._finish, solution.codes))
            return LayerRate(0.0, 0.0, seconds / m, packing / m)
        hessian, rows = (
            Hessian(n, device=self.device),
            max(64, min(_HESSIAN_ROWS, int(_WEIGHT_OPERATIONS / n**2))),
        )
        X, full = self._random(rows, n), self._random(rows, n) if self.paths == 2 else None
        accumulating = 0.0
        for step in (hessian.observe_range, hessian.add):
            step(X, None, full)  # not timed
            accumulating += self._timed(partial(step, X, None, full))[0]
        rows_held_out = (
            Holdout(self._random(holdout, n).float(), self._random(holdout, n).float()) if holdout else None
        )
        group, correction = InputGroup(hessian, rows_held_out), self.config.effective_correction
        solve = partial(quantize_weight, W, group, settings, correction=correction)
        first, _ = self._timed(solve)
        again, solution = self._timed(solve)  # with the cached factor
        packing, _ = self._timed(partial(self._finish, solution.codes))
        return LayerRate(accumulating / rows, max(first - again, 0.0), again / m, packing / m)

    def _finish(self, codes: Any) -> None:
        """What follows a solve: the quantized weight for the model, and the tensors for the file."""
        codes.dequantize(self.dtype)
        for tensor in pack(codes, self.config.format).values():
            tensor.cpu().clone()

    def _random(self, rows: int, n: int) -> torch.Tensor:
        return torch.randn(rows, n).to(self.device, self.dtype)

    def _timed(self, step: Callable[[], Any]) -> tuple[float, Any]:
        synchronize(self.device)
        start = time.perf_counter()
        result = step()
        synchronize(self.device)
        return time.perf_counter() - start, result


def measure_disk(folder: Path, file: Path, tensor: TensorInfo | None) -> DiskRate:
    """How fast `folder` takes files, and how fast a weight file of the source is read and checked.

    Args:
        folder: folder that exists.
        file: weight file.
        tensor: tensor in `file`; None if it is no safetensors file.

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
