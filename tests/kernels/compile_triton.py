"""Compiles fewbit's Triton kernels for a GPU that need not be there: python compile_triton.py cuda:90."""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fewbit.gptq.backends import triton as triton_solver
from fewbit.kernels.triton import kernels


def build(kernel, types, constants, target, **options):
    names = dict(zip(kernel.arg_names, types, strict=False))
    signature = names | dict.fromkeys(constants, "constexpr")
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=target, options=options)
    binary = compiled.asm["cubin" if target.backend == "cuda" else "hsaco"]
    print(kernel.__name__, constants, len(binary), "bytes", flush=True)


def products(target):
    """Every kernel of kernels/triton/kernels.py at every bit width, and every dtype at least once."""
    weight = ["*i32", "*u8", "*fp16"]
    for bits, group, dtype in (
        (2, 128, "fp16"),
        (3, 64, "bf16"),
        (4, 128, "fp16"),
        (4, 32, "bf16"),
        (8, 0, "bf16"),
    ):
        at_once, blocks = kernels._depth(bits, group, 64)
        shared = {"BITS": bits, "GROUP": group, "BF16": dtype == "bf16", "AT_ONCE": at_once}
        cut = {"WIDEN": False, "BLOCKS": blocks, "STAGES": 3, "EVEN": group != 32, "ORDERED": group == 64}
        for kernel, tile in (
            (kernels.gemv_kernel, {"TOKENS": 16, "TILES": 1, "SLICES": 4, "SPLIT": 4}),
            (kernels.gemm_kernel, {"TOKENS": 64, "TILES": 4, "SPLIT": 1}),
        ):
            types = [
                f"*{dtype}",
                *weight,
                "*i32",
                "*fp32" if tile["SPLIT"] > 1 else f"*{dtype}",
                *["i32"] * 6,
            ]
            build(kernel, types, shared | cut | tile, target)
        build(kernels.dequantize_kernel, [*weight, f"*{dtype}", *["i32"] * 4], shared | {"TILES": 4}, target)
    build(kernels.sum_splits_kernel, ["*fp32", "*fp16", "i32"], {"SPLIT": 4, "BLOCK": 1024}, target)


def solver(target):
    """The solver's kernels: a block of columns, and grids of narrow and of wide groups."""
    types = [*["*fp32"] * 6, "*i32", "*u8", "*fp32", "*fp32", *["i32"] * 3]
    tile = {"INNER": triton_solver._INNER, "UNROLLED": triton_solver._UNROLLED, "ROWS": triton_solver._ROWS}
    build(triton_solver._round_block, types, {"BITS": 4, **tile}, target, num_warps=1)
    types = ["*fp32", "*fp32", "*i32", "*fp32", "*fp32", "*i32", "*fp32", "*fp32", *["i32"] * 6]
    for sym, depth, lanes, rows in ((True, 32, 4, 8), (False, 128, 32, 1)):
        tile = {"BITS": 4, "SYM": sym, "DEPTH": depth, "LANES": lanes, "ROWS": rows}
        build(triton_solver._search, types, tile, target, num_warps=1)


def main(name):
    backend, arch = name.split(":")
    target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, 32 if backend == "cuda" else 64)
    products(target)
    solver(target)


main(sys.argv[1])
