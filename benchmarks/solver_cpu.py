"""What the compiled solver gains over torch on this CPU, in ratios measured side by side.

    python benchmarks/solver_cpu.py [--threads 2] [--features 2048]

Prints, for one layer: the Hessian of bfloat16 activations (useful arithmetic counted: the upper triangle),
the grid search, the block loop, and the whole solve. Peaks are those of torch's own matrix products.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable

import torch

from fewbit import native
from fewbit.config import LayerSettings
from fewbit.gptq import Hessian, InputGroup, quantize_weight
from fewbit.gptq.backends import NATIVE, TORCH
from fewbit.gptq.gptq import factor, order, round_columns
from fewbit.gptq.grid import Grid, fit_grid


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """The fastest of several runs, after one to warm up."""
    work()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def hessian(n: int, tokens: int) -> None:
    """The compiled SYRK against the block-triangular float32 product and the full products of torch."""
    X = torch.randn(tokens, n).bfloat16()
    X32 = X.float()
    full = 2 * tokens * n * n
    useful = full / 2
    peak32 = full / seconds(lambda: X32.T @ X32)
    peak16 = full / seconds(lambda: X.T @ X)
    times = {}
    for path, batch in (("torch", X32), ("native", X)):  # float32 activations take the torch path
        times[path] = seconds(lambda batch=batch: Hessian(n).add(batch))
    with native.instruction_set("avx512_vnni" if native.has_amx() else "best"):  # without the tile unit
        dots = seconds(lambda: Hessian(n).add(X))
    print(f"Hessian, {tokens} x {n} bfloat16 tokens")
    print(f"  torch float32 matmul {peak32 / 1e9:.0f} GF/s, bfloat16 matmul {peak16 / 1e9:.0f} GF/s")
    print(f"  torch path  {useful / times['torch'] / 1e9:7.0f} useful GF/s")
    print(
        f"  native      {useful / times['native'] / 1e9:7.0f} useful GF/s, {times['torch'] / times['native']:.1f}x"
        f" the torch path, {useful / times['native'] / peak16:.2f} of the bfloat16 matmul rate,"
        f" {full / times['native'] / peak32:.1f}x a full float32 product,"
        f" {dots / times['native']:.1f}x its own dot products"
    )


def grids(m: int, n: int) -> None:
    """The grid search, and what it means for a model of a billion weights."""
    W, D = torch.randn(m, n) * 0.02, torch.rand(n) ** 3 + 0.01
    some = W[: max(1, m // 16)]  # the torch path is measured on fewer rows
    g_idx = torch.arange(n, dtype=torch.int32) // 128
    print(f"Grid search, {m} x {n}, groups of 128")
    for bits in (2, 3, 4, 8):
        for sym in (True, False):
            fit = functools.partial(fit_grid, D=D, g_idx=g_idx, bits=bits, sym=sym)
            native_rate = W.numel() / seconds(functools.partial(fit, W, search=NATIVE.search), 2)
            torch_rate = some.numel() / seconds(functools.partial(fit, some, search=TORCH.search), 1)
            print(
                f"  {bits} bits {'sym ' if sym else 'asym'}  native {1e9 / native_rate:6.1f} s per 10^9 weights,"
                f" {native_rate / torch_rate:5.1f}x torch"
            )


def loops(m: int, n: int) -> None:
    """The rounding of the columns: block loop and the products between blocks."""
    X = torch.randn(2 * n, n)
    H = Hessian(n)
    H.add(X)
    perm, g_idx = order(H.diagonal(), 128, "group")
    found = factor(H.matrix(), perm, 0.01)
    assert found is not None
    W = torch.randn(m, n) * 0.02
    grid = fit_grid(W, H.diagonal(), g_idx, 4, sym=True, search=NATIVE.search)
    grids = Grid(grid.scales[None], grid.zeros[None], g_idx)
    fast = seconds(lambda: round_columns(W, found, grids, 4, NATIVE.round_block), 3)
    slow = seconds(lambda: round_columns(W, found, grids, 4, TORCH.round_block), 1)
    E, F = torch.randn(n, m), found.F
    products = seconds(lambda: [F[:a, a : a + 128].T @ E[:a] for a in range(128, n, 128)], 3)
    cholesky = seconds(lambda: factor(H.matrix(), perm, 0.01), 3)
    settings = LayerSettings(bits=4, group_size=128, sym=True, act_order="group", damp=0.01, method="gptq")
    group = InputGroup(H)
    whole = seconds(lambda: quantize_weight(W, group, settings), 3)
    print(f"Rounding, {m} x {n}, 4 bits")
    print(
        f"  native {fast:.3f} s, {slow / fast:.1f}x torch; {products / fast:.2f} of it is the products between blocks"
    )
    print(
        f"  factorization {cholesky / fast:.2f} of a rounding; a layer with a shared factor {whole / fast:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--features", type=int, default=2048)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if not native.available():
        raise SystemExit(native.unsupported_reason())
    print(f"{arguments.threads} threads, {', '.join(native.instruction_sets())}")
    n = arguments.features
    hessian(n, 8192)
    hessian(576, 16384)
    hessian(n, 512)
    hessian(576, 512)
    grids(1024, n)
    loops(n, n)


if __name__ == "__main__":
    main()
