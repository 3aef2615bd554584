"""Which code runs the solver's two loops, the grid search and the block of columns: compiled, Triton or torch.

Contract: "auto" takes the compiled module on the CPU. On a GPU it takes Triton's kernels once they have shown, on that
very device, that they give what the torch loops give: small problems are solved with both, once per process and device.
Where they cannot be used `why_no_triton` says why, and the torch loops are used.
"""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from .. import native
from ..errors import KernelError
from ..native import Backend

Path = Literal["native", "triton", "torch"]

_GPUS = ("cuda", "xpu")  # AMD's are called cuda, too
# Shapes, groups and kinds of grid that are checked: narrow groups and one that a whole warp shares.
_GRIDS = ((3, 11, 8, 2, True), (3, 11, 8, 3, False), (3, 11, 8, 4, True), (2, 270, 270, 8, False))
_NO_PACKAGE = "the package triton is not installed (pip install triton)"


def path_for(backend: Backend, W: Tensor) -> Path:
    """What runs a loop over W.

    Raises:
        KernelError: the backend that was asked for cannot run; the message says which condition fails.
    """
    if native.use(backend, W):
        return "native"
    if backend == "triton":
        if find_spec("triton") is None:
            raise KernelError(f"the solver's Triton kernels cannot run: {_NO_PACKAGE}")
        return "triton"
    return "triton" if backend == "auto" and not why_no_triton(W.device) else "torch"


def why_no_triton(device: torch.device) -> str:
    """Why "auto" does not take Triton's kernels on this device, in words; empty where it does."""
    if device.type not in _GPUS:
        return f"they are not made for {device.type}"
    if find_spec("triton") is None:
        return _NO_PACKAGE
    return _checked(device if device.index is not None else torch.empty(0, device=device).device)


@contextmanager
def full_float32() -> Iterator[None]:
    """While entered, GPUs multiply float32 matrices in float32, whatever the user allows them elsewhere.

    TF32 keeps 11 bits of every factor: targets would be off by a thousandth of a step, and codes that are near a tie
    would be others than the oracle's.
    """
    matmul = torch.backends.cuda.matmul
    # The older name of the setting may not be read where the newer one was used.
    newer = hasattr(matmul, "fp32_precision")
    key, fast, exact = ("fp32_precision", "tf32", "ieee") if newer else ("allow_tf32", True, False)
    if getattr(matmul, key) != fast:
        yield
        return
    setattr(matmul, key, exact)
    try:
        yield
    finally:
        setattr(matmul, key, fast)


@functools.cache
def _checked(device: torch.device) -> str:
    return disagreement(device)


def disagreement(device: torch.device) -> str:
    """What is wrong with Triton's kernels on this device, in words; empty where they give what torch gives."""
    try:
        from triton.errors import TritonError
    except ImportError as error:
        return _failure(device, error)
    try:
        wrong = [*_wrong_blocks(device), *_wrong_grids(device)]
    # What Triton, the compilers that it starts and the driver raise for a device that they cannot serve.
    except (TritonError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        return _failure(device, error)
    return f"on {device} they give wrong results for {', '.join(wrong)}" if wrong else ""


def _failure(device: torch.device, error: Exception) -> str:
    reason = str(error).strip().splitlines()
    return f"on {device} they do not run ({reason[0] if reason else type(error).__name__})"


def _wrong_blocks(device: torch.device) -> Iterator[str]:
    """The bits for which blocks of columns get other codes or errors than in torch.

    All numbers are small multiples of powers of two. Every sum is exact then, whatever its order, and every code has to
    be the same; quotients are not exact, and some are ties.
    """
    from . import gptq as ldlq
    from . import triton_backend as triton

    generator = torch.Generator().manual_seed(0)
    batch, k, m, G = 2, 21, 35, 3

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).float()

    for bits in (2, 3, 4, 8):
        W = integers(-64, 65, batch, k, m) / 64
        F = torch.triu(integers(-2, 3, batch, k, k) / 4, diagonal=1) + torch.eye(k)
        d = integers(1, 9, batch, k) / 4
        scales = integers(1, 8, batch, G, m) * (2 * integers(0, 2, batch, G, m) - 1) / 2 ** (bits + 1)
        zeros = integers(1, 2**bits, batch, G, m)
        groups = torch.sort(integers(0, G, batch, k)).values.int()
        W, F, d, scales, zeros, groups = (part.to(device) for part in (W, F, d, scales, zeros, groups))
        codes, E = (torch.zeros(batch, k, m, dtype=t, device=device) for t in (torch.uint8, torch.float32))
        losses = triton.round_block(W, W.clone(), F, d, scales, zeros, groups, bits, codes, E)
        for b in range(batch):
            q, e = torch.zeros_like(codes[b]), torch.zeros_like(E[b])
            fixed = W[b], W[b].clone(), F[b], d[b], scales[b], zeros[b], groups[b]
            loss = ldlq.torch_block(*fixed, bits, q, e)
            same = torch.equal(q, codes[b]) and torch.equal(e, E[b])
            if not (same and torch.allclose(loss.float(), losses[b], rtol=1e-4, atol=0)):
                yield f"columns of {bits} bits"
                break


def _wrong_grids(device: torch.device) -> Iterator[str]:
    """The kinds of grid whose error is larger than that of the grid found in torch.

    Errors are sums in float32: of two scales with nearly the same error either may be found.
    """
    from .grid import SEARCHES, Candidates, candidates

    generator = torch.Generator().manual_seed(0)
    for m, n, group_size, bits, sym in _GRIDS:
        W = torch.randn(2, m, n, generator=generator).to(device)
        D = torch.rand(2, n, generator=generator).add_(0.1).to(device)
        starts = torch.tensor([*range(0, n, group_size), n])
        every = candidates(bits, sym)
        some = Candidates(every.coarse[::8], every.fine[::4], every.offsets[::5])
        batch = SEARCHES["triton"](W, D, starts, some, bits, sym)
        right = True
        for w, d, scales, zeros in zip(W, D, *batch, strict=True):
            alone = SEARCHES["torch"](w, d, starts, some, bits, sym)
            truth = _grid_errors(w, d, starts, *alone, bits)
            error = _grid_errors(w, d, starts, scales, zeros, bits)
            right = right and bool((error <= 1.001 * truth).all())
        if not right:
            yield f"{'symmetric' if sym else 'asymmetric'} grids of {bits} bits"


def _grid_errors(W: Tensor, D: Tensor, starts: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Σ D (ŵ − w)² of every row and group, (m, G)."""
    from .grid import Grid, nearest

    groups = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff()).to(W.device)
    q = nearest(W, Grid(scales.half(), zeros.short(), groups.int()), bits).float()
    left = (q - zeros[:, groups]) * scales[:, groups] - W
    return torch.zeros_like(scales).index_add_(1, groups, left.square() * D)
