"""Compiles fewbit's Triton kernels for a GPU that need not be there: python compile_triton.py cuda:90."""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fewbit.runtime import triton_products
from fewbit.solver import triton as triton_solver


def build(kernel, types, constants, target, **options):
    names = dict(zip(kernel.arg_names, types, strict=False))
    signature = names | dict.fromkeys(constants, "constexpr")
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=target, options=options)
    binary = compiled.asm["cubin" if target.backend == "cuda" else "hsaco"]
    print(kernel.__name__, constants, len(binary), "bytes", flush=True)


def main(name):
    backend, arch = name.split(":")
    target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, 32 if backend == "cuda" else 64)
    for bits in (2, 3, 4, 8):
        for group in (0, 128):
            units = 16 if bits < 4 else 32
            tile = {"TOKENS": 16, "OUTPUTS": 64, "UNITS": units, "SPLIT": 4}
            constants = {"BITS": bits, "V1": 1, "ADDED": 0x11111111, "GROUP": group, "WIDEN": False, **tile}
            types = ["*fp16", "*i32", "*i32", "*fp16", "*i32", "*fp32", *["i32"] * 5]
            build(triton_products._product, types, constants, target)
    types = [*["*fp32"] * 6, "*i32", "*u8", "*fp32", "*fp32", "i32", "i32"]
    build(
        triton_solver._sweep, types, {"BITS": 4, "COLUMNS": 128, "ROWS": 16}, target, enable_fp_fusion=False
    )


main(sys.argv[1])
