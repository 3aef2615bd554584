"""How fast this machine does the pieces of a run: measured on pieces of it, in seconds.

Every piece is the run's own code on random numbers: their values do not matter for the time. Widths above
`LARGEST_WIDTH` are measured there and carried over by their known cost: n² for each row of a Hessian and each
row of a weight, n³ for a factorization.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..atomic_io import write_whole
from ..checkpoint.layout import pack
from ..checkpoint.safetensors_file import TensorInfo, check_finite
from ..config import LayerSettings
from ..errors import ModelError, OutputError
from ..gptq import Accuracy, FactorCache, Hessian, Holdout, quantize_weight
from .trial import synchronize
from .work import LayerWork

LARGEST_WIDTH = 4096

# Rows of the Hessian that are measured; and about so many operations for the rows of a weight.
_HESSIAN_ROWS = 1024
_WEIGHT_OPERATIONS = 4e9
_FILE_BYTES = 1 << 24


@dataclass(frozen=True)
class LayerRate:
    """Seconds for the layers of one width and one kind of settings.

    Attributes:
        accumulate: for each row that enters a Hessian. factor: once for each Hessian. solve, pack: for each row of
            a weight.
    """

    accumulate: float
    factor: float
    solve: float
    pack: float


Kind = tuple[int, LayerSettings]


@dataclass(frozen=True)
class DiskRate:
    """Seconds: for each byte written and synced, and for each file; for each byte of the source that is checked."""

    write: float
    file: float
    check: float


def kind_of(work: LayerWork) -> Kind:
    """What decides a layer's rate."""
    return work.layer.in_features, work.layer.settings


def measure_layers(
    works: Iterable[LayerWork],
    *,
    dtype: torch.dtype,
    device: torch.device,
    streams: int,
    accuracy: Accuracy,
    probe: int,
    fmt: str,
) -> dict[Kind, LayerRate]:
    """The rate of every kind of layer.

    Args:
        dtype: of activations and weights. probe: held-out rows, 0 for none.
    """
    rates: dict[Kind, LayerRate] = {}
    most_rows: dict[Kind, int] = {}
    for work in works:
        most_rows[kind_of(work)] = max(most_rows.get(kind_of(work), 0), work.layer.out_features)
    bench = _Bench(dtype, device, streams, accuracy, fmt)
    for (n, settings), m in most_rows.items():
        if not rates:  # the libraries' own preparations, once
            bench.rate(min(n, 256), min(m, 32), settings, min(probe, 64))
        width = min(n, LARGEST_WIDTH)
        rate = bench.rate(width, m, settings, probe * width // n)
        up = n / width
        rates[n, settings] = LayerRate(
            rate.accumulate * up**2, rate.factor * up**3, rate.solve * up**2, rate.pack * up
        )
    return rates


@dataclass(frozen=True)
class _Bench:
    """Times the pieces of one layer."""

    dtype: torch.dtype
    device: torch.device
    streams: int
    accuracy: Accuracy
    fmt: str

    def rate(self, n: int, m: int, settings: LayerSettings, probe: int) -> LayerRate:
        m = min(m, max(64, int(_WEIGHT_OPERATIONS / (6 * n * n))))
        W = self.random(m, n)
        if settings.method == "rtn":
            seconds, solution = self.timed(partial(quantize_weight, W, None, settings))
            packing, _ = self.timed(partial(self.finish, solution.codes))
            return LayerRate(0.0, 0.0, seconds / m, packing / m)
        hessian, accumulate = self.hessian(n)
        rows = Holdout(self.random(probe, n).float(), self.random(probe, n).float()) if probe else None
        cache = FactorCache()
        solve = partial(quantize_weight, W, hessian, settings, cache, accuracy=self.accuracy, probe=rows)
        first, _ = self.timed(solve)
        again, solution = self.timed(solve)
        packing, _ = self.timed(partial(self.finish, solution.codes))
        return LayerRate(accumulate, max(first - again, 0.0), again / m, packing / m)

    def hessian(self, n: int) -> tuple[Hessian, float]:
        """A Hessian of random rows, and the seconds that each of them took."""
        hessian = Hessian(n, device=self.device)
        rows = max(64, min(_HESSIAN_ROWS, int(_WEIGHT_OPERATIONS / (n * n))))
        X = self.random(rows, n)
        full = self.random(rows, n) if self.streams == 2 else None
        hessian.observe_range(X, None, full)
        foreseeing, _ = self.timed(partial(hessian.observe_range, X, None, full))
        hessian.add(X, None, full)
        adding, _ = self.timed(partial(hessian.add, X, None, full))
        return hessian, (foreseeing + adding) / rows

    def finish(self, codes: Any) -> None:
        """What follows a solve: the quantized weight for the model, and the tensors for the file."""
        codes.dequantize(self.dtype)
        for tensor in pack(codes, self.fmt).values():
            tensor.cpu().clone()

    def random(self, rows: int, n: int) -> torch.Tensor:
        return torch.randn(rows, n).to(self.device, self.dtype)

    def timed(self, piece: Callable[[], Any]) -> tuple[float, Any]:
        synchronize(self.device)
        start = time.perf_counter()
        result = piece()
        synchronize(self.device)
        return time.perf_counter() - start, result


def measure_disk(folder: Path, file: Path, tensor: TensorInfo | None) -> DiskRate:
    """How fast `folder` takes files, and how fast a weight file of the source is read and checked.

    Args:
        tensor: in `file`; None where it is no safetensors file.

    Raises:
        OutputError: the folder cannot be written.
        ModelError: the file cannot be read, or the tensor holds values that are not finite.
    """
    data = bytes(_FILE_BYTES)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fewbit-plan-") as temporary:
            small = _seconds(partial(write_whole, Path(temporary, "small"), data[:1000]))
            large = _seconds(partial(write_whole, Path(temporary, "large"), data))
    except OSError as error:
        raise OutputError(
            f"cannot write into {folder}: {error.strerror}; choose another output folder"
        ) from error
    write = max(large - small, 0.0) / _FILE_BYTES
    try:
        return DiskRate(write, small, _check_seconds(file, tensor))
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror}") from error


def _check_seconds(path: Path, tensor: TensorInfo | None) -> float:
    """Seconds for each byte that is read, hashed and looked at."""
    start = time.perf_counter()
    with open(path, "rb") as file:
        file.seek(tensor.start if tensor else 0)
        found = bytearray(file.read(min(tensor.nbytes if tensor else _FILE_BYTES, _FILE_BYTES)))
    hashlib.sha256(found)
    if tensor is not None and found:
        check_finite(path.name, torch.frombuffer(found, dtype=tensor.dtype))
    return (time.perf_counter() - start) / max(len(found), 1)


def _seconds(piece: Callable[[], Any]) -> float:
    start = time.perf_counter()
    piece()
    return time.perf_counter() - start
