"""Which tiles a product takes: by rule, or the fastest of a few, measured where they are used first.

A choice is made per number of tokens (rounded up to a power of two), shape, bits, group, dtype, device and version
of fewbit and Triton. It is kept in a file of the user's cache folder, for later processes; what is there and cannot
be read is counted, said once, and chosen again. Under `torch.use_deterministic_algorithms(True)`, and for what is not
known yet while a CUDA graph is recorded or where nothing can be timed, the rule decides: it looks at sizes alone, so
results are the same bytes on every run, and on every machine that computes alike.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from . import layout as fragments
from .kernels import Tiles

_LOG = logging.getLogger(__name__)
_FILE = "triton.json"
_MOST_TOKENS = 4096  # more are tuned as this many
DENSE_FROM = 256  # tokens; by then unpacking to memory takes less than half of the product
_SAME = 2e-2  # relative; twice what two roundings to bfloat16 can differ by
_SHARED = 80 << 10  # bytes; consumer GPUs give a program 99 KB, of which the products' own needs come off
_PROGRAMS = 264  # that fill a large GPU; the same everywhere, so that results are


@dataclass(frozen=True)
class Job:
    """What a choice depends on, besides the machine.

    Attributes:
        tokens: rounded up to a power of two (`job`).
        group: positions of a group, 0: one group.
        dtype: of the activations, as "float16".
    """

    tokens: int
    outputs: int
    inputs: int
    bits: int
    group: int
    dtype: str


def job(tokens: int, outputs: int, inputs: int, bits: int, group: int, dtype: torch.dtype) -> Job:
    """The job of a product with `tokens` rows."""
    bucket = min(_MOST_TOKENS, 1 << (tokens - 1).bit_length())
    return Job(bucket, outputs, inputs, bits, group, str(dtype).removeprefix("torch."))


def rule(job: Job) -> Tiles:
    """The tiles by sizes alone, and such as fit into the shared memory of any recent GPU.

    Few tokens are bound by memory: there must be some 25 KB on their way to each multiprocessor, and for more than a
    few tokens x must not be read so often that it outweighs the weight. Many are bound by arithmetic.
    """
    tiles = _by_sizes(job)
    while shared_bytes(tiles, job.bits) > _SHARED:
        tiles = _smaller(tiles)
    return tiles


def shared_bytes(tiles: Tiles, bits: int) -> int:
    """About what a program keeps in shared memory: the words and the activations of the steps under way."""
    if tiles.path == "dense":
        return 0
    unit = 16 * fragments.pairs_in_unit(bits)  # inputs of a block
    depth = max(tiles.depth, unit)
    words = depth // unit * fragments.words_in_unit(bits) * 1024 * tiles.tiles
    slices = tiles.warps if tiles.path == "few" else 1
    return (tiles.stages - 1) * slices * (words + 2 * depth * tiles.tokens)


def _smaller(tiles: Tiles) -> Tiles:
    if tiles.tiles > 1 and tiles.path == "few":
        return replace(tiles, tiles=tiles.tiles // 2)
    if tiles.stages > 2:
        return replace(tiles, stages=tiles.stages - 1)
    if tiles.warps > 1 and tiles.path == "few":
        return replace(tiles, warps=tiles.warps // 2)
    return replace(tiles, tokens=tiles.tokens // 2)


def _by_sizes(job: Job) -> Tiles:
    tiles = -(-job.outputs // 32)
    if job.tokens <= 2:
        warps = 16 if tiles <= 160 else 8 if tiles <= 320 else 4
        return Tiles(
            "few", tokens=2, tiles=1, depth=128, warps=warps, split=_power(_PROGRAMS // 2 // tiles, 4)
        )
    if job.dtype == "float32":
        return Tiles("few", tokens=16, tiles=1, depth=32, warps=4, split=_power(_PROGRAMS // tiles, 8))
    if job.tokens <= 16:
        tokens, widest = (8, 2) if job.tokens <= 8 else (16, 4)
        wide = min(widest, 4 if tiles >= 128 else 2 if tiles >= 64 else 1)
        split = _power(wide * _PROGRAMS // tiles, 8)
        return Tiles("few", tokens, tiles=wide, depth=64, warps=4, split=split)
    if job.tokens >= DENSE_FROM:
        return Tiles("dense")
    tokens, warps = (32, 4) if job.tokens <= 32 else (64, 4) if job.tokens == 64 else (128, 8)
    programs = -(-tiles // 4) * -(-job.tokens // tokens)
    return Tiles("many", tokens, tiles=4, depth=64, warps=warps, split=_power(_PROGRAMS // programs, 8))


def _power(wanted: int, most: int) -> int:
    """The power of two at or below `wanted`, from 1 to `most`."""
    return min(most, 1 << max(0, wanted.bit_length() - 1))


def candidates(job: Job) -> tuple[Tiles, ...]:
    """What is worth measuring; the rule's own choice first, and none of another kind of rounding for float32."""
    first = rule(job)
    others: tuple[Tiles, ...] = ()
    if job.dtype == "float32":
        pass
    elif job.tokens <= 2:
        others = (
            replace(first, warps=8, split=2 * first.split),
            replace(first, warps=8, depth=256),
            replace(first, warps=4, split=4 * first.split),
            Tiles("few", tokens=8, tiles=2, depth=128, warps=8, split=2),
        )
    elif job.tokens <= 16:
        others = (
            replace(first, tiles=2, depth=128),
            replace(first, tiles=2, depth=128, split=1, warps=8),
            replace(first, split=max(1, first.split // 2)),
        )
    elif job.tokens < 2 * DENSE_FROM:
        others = (
            Tiles("dense"),
            replace(first, split=1),
            Tiles("many", tokens=128, tiles=4, depth=64, warps=8, stages=4),
            Tiles("many", tokens=64, tiles=4, depth=64, warps=4),
        )
    else:
        others = (Tiles("many", tokens=256, tiles=4, depth=64, warps=8),)
    return tuple(dict.fromkeys((first, *others)))


class Tuner:
    """Choices of one process, read from and written to a file.

    Args:
        folder: of the file; None: keep choices in memory only.
        machine: what else a choice depends on: device and versions.
        usable: whether something can be measured now.
    """

    def __init__(self, folder: Path | None, machine: Callable[[], str], usable: Callable[[], bool]) -> None:
        self.folder = folder
        self.unreadable = 0  # files or entries that were ignored
        self.refused: dict[Tiles, str] = {}  # candidates that could not run, with the reason
        self._machine, self._usable = machine, usable
        self._known: dict[tuple[str, Job], Tiles] = {}
        self._read: set[str] = set()

    def choose(self, job: Job, seconds: Callable[[Tiles], float]) -> Tiles:
        """The tiles for a job; measured now, if they are not known and it can be done.

        Args:
            seconds: measures a candidate; raises one of `failures()` where it cannot run.
        """
        if torch.are_deterministic_algorithms_enabled():
            return rule(job)
        key = (self._machine(), job)
        if key not in self._known and key[0] not in self._read:
            self._read.add(key[0])
            self._known |= {(key[0], found): tiles for found, tiles in self._entries(key[0])}
        if key not in self._known:
            if not self._usable():
                return rule(job)
            self._known[key] = self._measure(job, seconds)
            self._write(*key)
        return self._known[key]

    def forget(self) -> None:
        """Delete the file and what this process knows of it."""
        self._known.clear()
        self._read.clear()
        if self.folder is not None:
            (self.folder / _FILE).unlink(missing_ok=True)

    def _measure(self, job: Job, seconds: Callable[[Tiles], float]) -> Tiles:
        times: dict[Tiles, float] = {}
        for tiles in candidates(job):
            try:
                times[tiles] = seconds(tiles)
            except failures() as error:
                self.refused[tiles] = (str(error).strip() or type(error).__name__).splitlines()[0]
        best = min(times, key=times.__getitem__, default=rule(job))
        _LOG.info(
            "triton: %s takes %s (%d candidates, %d could not run)", job, best, len(times), len(self.refused)
        )
        return best

    def _entries(self, machine: str) -> Iterable[tuple[Job, Tiles]]:
        content = self._content()
        entries = content.get(machine, [])
        for entry in entries if isinstance(entries, list) else [None]:
            found = _entry(entry)
            if found is None:
                self._ignore("an entry")
            else:
                yield found

    def _content(self) -> dict[str, Any]:
        if self.folder is None or not (self.folder / _FILE).exists():
            return {}
        try:
            content = json.loads((self.folder / _FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            self._ignore(f"the file ({error})")
            return {}
        if isinstance(content, dict):
            return content
        self._ignore("the file (not a table)")
        return {}

    def _ignore(self, what: str) -> None:
        self.unreadable += 1
        if self.unreadable == 1:
            _LOG.warning(
                "%s of %s cannot be read, chosen anew; fewbit.kernels.triton.autotune.tuner().forget() deletes it",
                what, self.folder and self.folder / _FILE,
            )  # fmt: skip

    def _write(self, machine: str, job: Job) -> None:
        """Add one choice to the file, beside those that other processes have added meanwhile."""
        if self.folder is None:
            return
        tiles = self._known[machine, job]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / f"{_FILE}.lock", timeout=10):
                content = self._content()
                old = content.get(machine)
                kept = (
                    [e for e in old if (found := _entry(e)) and found[0] != job]
                    if isinstance(old, list)
                    else []
                )
                content[machine] = [*kept, {"job": asdict(job), "tiles": asdict(tiles)}]
                _replace(self.folder / _FILE, json.dumps(content, indent=1))
        except OSError as error:  # a full or read-only disk; a lock's timeout is one too
            _LOG.warning("a choice of tiles is not kept for later: %s", error)


def _entry(entry: Any) -> tuple[Job, Tiles] | None:
    """What an entry of the file says; None where it says nothing that fits."""
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), dict) for key in ("job", "tiles")):
        return None
    try:
        job, tiles = Job(**entry["job"]), Tiles(**entry["tiles"])
    except TypeError:  # other fields
        return None
    sizes = (job.tokens, job.outputs, job.inputs)
    sound = all(type(size) is int and size > 0 for size in sizes)
    return (job, tiles) if sound and tiles in candidates(job) else None


def _replace(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(name, path)


def failures() -> tuple[type[Exception], ...]:
    """What a kernel that does not fit this machine may raise: Triton's own, the driver's, a missing compiler."""
    from subprocess import SubprocessError

    from triton.errors import TritonError

    return (TritonError, RuntimeError, ValueError, TypeError, AssertionError, OSError, SubprocessError)


def cache_folder() -> Path:
    """Where the choices are kept: fewbit's folder among the user's caches."""
    if sys.platform == "win32":
        return Path.home() / "AppData" / "Local" / "fewbit" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fewbit"
    return Path.home() / ".cache" / "fewbit"


@functools.cache
def tuner() -> Tuner:
    """The process's own. `tuner().folder` may be set to another folder, or to None."""
    return Tuner(cache_folder(), machine=machine, usable=can_measure)


def machine() -> str:
    """The current device and the versions that a choice is good for."""
    return _versions(torch.cuda.get_device_name() if torch.cuda.is_available() else "none")


@functools.cache
def _versions(device_name: str) -> str:
    import triton

    from ... import __version__

    return f"{device_name}, fewbit {__version__}, triton {triton.__version__}"


def can_measure() -> bool:
    """Whether time can be measured here and now: on a CUDA device, and not while a graph of it is recorded."""
    return torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing()


def check_same(found: Tensor, expected: Tensor) -> None:
    """Whether a candidate's product is the rule's, but for rounding: no choice may change the result.

    Raises:
        ValueError: it is not.
    """
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    if bool(error > _SAME) or bool(error.isnan() & expected.isfinite().all() & expected.any()):
        raise ValueError(f"it computes other numbers: they differ by {float(error):.1e}")


def event_seconds(work: Callable[[], object], calls: int = 10) -> float:
    """Seconds of one call on the current CUDA device, the median of several, with a cold cache before each."""
    work()
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")  # 256 MB, several times any L2
    found: list[float] = []
    for _ in range(calls):
        flush.zero_()
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        work()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return statistics.median(found)
