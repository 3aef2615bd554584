"""The solver on a GPU: Triton's kernels against the eager torch loops, and the time of a model's layers by phase.

    python benchmarks/solver_gpu.py [--bits 4] [--asym]
    python benchmarks/solver_gpu.py --device cpu --shapes small      # the compiled solver, to try the script itself

Everything is measured in one run, on random weights. Limits are measured too, with a large float32 product: a weight
that is fitted or rounded counts as the multiply-adds that its formula has.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.config import LayerSettings
from fewbit.gptq import WIDER_GRIDS, Hessian, InputGroup, fallback_reason, quantize_weight
from fewbit.gptq.backends import TORCH, Backend, select
from fewbit.gptq.cholesky import factor_hessian
from fewbit.gptq.gptq import BLOCK
from fewbit.gptq.grid import Grid, candidates, fit_grid
from fewbit.gptq.solve import full_float32

TORCH_ROWS = 4096  # the torch grid search is measured on so many rows at most
STEPS_OF_AN_ATTEMPT = 8  # multiply, clamp twice, round twice, subtract the weight, square, weigh and sum


@dataclass(frozen=True)
class Layers:
    """Layers that share an input: the rows of their weights, and how often a model has them."""

    name: str
    rows: tuple[int, ...]
    inputs: int
    count: int


SHAPES = {
    "llama-3-8b": [
        Layers("q, k, v", (4096, 1024, 1024), 4096, 32),
        Layers("o", (4096,), 4096, 32),
        Layers("gate, up", (14336, 14336), 4096, 32),
        Layers("down", (4096,), 14336, 32),
    ],
    "small": [Layers("q, k, v", (96, 32, 32), 192, 2), Layers("down", (64,), 320, 2)],
}


@dataclass(frozen=True)
class Measured:
    """Seconds of one group of layers. The torch loops are scaled to all rows and columns."""

    prepare: float
    grid: float
    grid_torch: float
    rounding: float
    products: float
    blocks: float
    blocks_torch: float
    whole: float


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """The fastest of several runs, after one to warm up."""
    best = float("inf")
    for run in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        best = min(best, time.perf_counter() - start) if run else best
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(device: torch.device, n: int) -> float:
    """Multiply-adds per second of a float32 product."""
    A = torch.randn(n, n, device=device)
    with full_float32():
        return n**3 / seconds(lambda: A @ A, device)


def random_hessian(n: int, device: torch.device) -> Hessian:
    H = Hessian(n, device=device)
    H.add(torch.randn(2 * n, n, device=device) * (torch.rand(n, device=device) + 0.1))
    H.matrix()
    return H


def measure(layers: Layers, settings: LayerSettings, device: torch.device) -> Measured:
    n, m, bits = layers.inputs, sum(layers.rows), settings.bits
    H = random_hessian(n, device)
    weights = [torch.randn(rows, n, device=device) * 0.02 for rows in layers.rows]
    W = torch.cat(weights)
    shared = factor_hessian(H, settings.group_size, settings.act_order, settings.damp)
    assert shared.factor is not None

    def fit(W: Tensor, backend: Backend) -> object:
        return fit_grid(W, shared.D, shared.g_idx, bits, sym=settings.sym, search=backend.search)

    fast, some = select(device), W[:TORCH_ROWS]
    grids = 1 + len(WIDER_GRIDS) if bits < 8 else 1
    blocks, blocks_torch = (
        seconds(block(m, grids, bits, backend, device), device) * n / BLOCK for backend in (fast, TORCH)
    )
    E, F = torch.randn(grids, n, m, device=device), shared.factor.F
    T = torch.zeros(BLOCK, m, device=device)
    sizes = range(BLOCK, n, BLOCK)

    def products() -> None:
        for a in sizes:
            torch.baddbmm(T[: min(BLOCK, n - a)], F[:a, a : a + BLOCK].T.expand(grids, -1, -1), E[:, :a])

    def everything() -> None:
        group = InputGroup(H)
        for one in weights:
            quantize_weight(one, group, settings)

    with full_float32():
        between = seconds(products, device)
    preparing = seconds(
        lambda: factor_hessian(H, settings.group_size, settings.act_order, settings.damp), device
    )
    fitting, total = seconds(lambda: fit(W, fast), device), seconds(everything, device)
    return Measured(
        preparing,
        fitting,
        seconds(lambda: fit(some, TORCH), device, 1) * m / len(some),
        total - preparing - fitting,
        between,
        blocks,
        blocks_torch,
        total,
    )


def block(m: int, grids: int, bits: int, backend: Backend, device: torch.device) -> Callable[[], object]:
    """The work on one block of columns of m rows."""
    W = torch.randn(BLOCK, m, device=device) * 0.02
    T = torch.empty(grids, BLOCK, m, device=device)
    F = torch.randn(BLOCK, BLOCK, device=device).mul_(0.05).triu_(1) + torch.eye(BLOCK, device=device)
    d, groups = torch.ones(BLOCK, device=device), torch.zeros(BLOCK, dtype=torch.int32, device=device)
    scales = torch.full((grids, 1, m), 0.04 / 2 ** (bits - 2), device=device).half().float()
    grid = Grid(scales, torch.full_like(scales, 2 ** (bits - 1)), groups)
    return lambda: backend.round_block(W, T.copy_(W), F, d, grid, bits)


def attempts(settings: LayerSettings) -> int:
    """How many grids are measured for every group."""
    tried = candidates(settings.bits, settings.sym)
    coarse, fine = tried.coarse.numel(), tried.fine.numel()
    return 3 + (2 * coarse + fine if settings.sym else coarse * tried.offsets.numel() + 3 * fine)


def table(shapes: Sequence[Layers], found: Sequence[Measured], settings: LayerSettings, limit: float) -> str:
    """The figures as Markdown."""
    lines = [
        "| layers | rows × inputs | Cholesky | grid, × torch, of limit | blocks, × torch, of limit "
        "| products, of limit | rounding | all |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for layers, one in zip(shapes, found, strict=True):
        n, m = layers.inputs, sum(layers.rows)
        grids = 1 + len(WIDER_GRIDS) if settings.bits < 8 else 1
        fitting = m * n * attempts(settings) * STEPS_OF_AN_ATTEMPT / limit / one.grid
        inside = m * grids * n * (BLOCK - 1) / 2 / limit / one.blocks
        between = m * grids * n * max(n - BLOCK, 0) / 2 / limit / one.products
        lines.append(
            f"| {layers.name} | {m} × {n} | {_ms(one.prepare)} "
            f"| {_ms(one.grid)}, {one.grid_torch / one.grid:.0f}×, {fitting:.0%} "
            f"| {_ms(one.blocks)}, {one.blocks_torch / one.blocks:.0f}×, {inside:.0%} "
            f"| {_ms(one.products)}, {between:.0%} | {_ms(one.rounding)} | {_ms(one.whole)} |"
        )
    total = sum(layers.count * one.whole for layers, one in zip(shapes, found, strict=True))
    torch_total = sum(
        layers.count * (one.whole + one.grid_torch - one.grid + one.blocks_torch - one.blocks)
        for layers, one in zip(shapes, found, strict=True)
    )
    lines.append(f"\nAll {sum(one.count for one in shapes)} groups of layers: {total:.2f} s; with torch's loops "
                 f"{torch_total:.1f} s.")  # fmt: skip
    return "\n".join(lines)


def _ms(time_taken: float) -> str:
    return f"{1e3 * time_taken:.2f} ms"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 8), default=4)
    parser.add_argument("--asym", action="store_true")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"{parser.prog} measures a CUDA device, and there is none here", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    torch.manual_seed(0)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    limit = rate(device, 8192 if device.type == "cuda" else 512)
    path = select(device).name
    print(f"{name}, torch {torch.__version__}; float32 products {2e-12 * limit:.2f} TFLOP/s; kernels: {path}")
    if device.type == "cuda" and path != "triton":
        print(f"Triton's kernels are not used: {fallback_reason(device)}")
    settings = LayerSettings(options.bits, 128, not options.asym, "group", 0.01, "gptq")
    shapes = SHAPES[options.shapes]
    print(table(shapes, [measure(layers, settings, device) for layers in shapes], settings, limit))
    return 0


if __name__ == "__main__":
    sys.exit(main())
