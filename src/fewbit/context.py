"""What the steps of one run share: configuration, device, processes, profiler and progress."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import native
from .config import QuantConfig
from .distributed import Communicator
from .errors import ConfigError
from .profiling import Profiler
from .progress import Progress, no_progress


@dataclass(frozen=True)
class RunContext:
    """One run, as every step of it sees it.

    Attributes:
        config: settings of the run.
        device: device of the forward passes and the solver.
        comm: processes that share the run.
        profiler: time and memory of each phase.
        progress: callback that shows how far the run has come.
        offload_dir: folder for the activations of paused batches; None keeps them in memory.
    """

    config: QuantConfig
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    comm: Communicator = field(default_factory=Communicator)
    profiler: Profiler = field(default_factory=Profiler)
    progress: Progress = no_progress
    offload_dir: Path | None = None


def computing_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """`dtype`, or float32 where a CPU would multiply 16-bit numbers several times more slowly.

    Only CPUs with instructions for bfloat16 multiply it fast; float16 is slow on all that torch has kernels for.
    """
    if device.type != "cpu" or dtype.itemsize != 2:
        return dtype
    fast = dtype is torch.bfloat16 and "avx512_bf16" in native.instruction_sets()
    return dtype if fast else torch.float32


def resolve_device(name: str) -> torch.device:
    """The device called `name`; "auto" takes cuda, then xpu, then the CPU (mps lacks float64: by name only).

    Raises:
        ConfigError: the name is unknown or the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "xpu" if torch.xpu.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device
