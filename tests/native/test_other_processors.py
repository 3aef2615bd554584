"""The compiled products on an instruction set that this machine emulates: needs a cross compiler and QEMU.

apt-get install g++-aarch64-linux-gnu qemu-user-static
python -m pytest -m slow tests/native
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from fewbit import native

ROOT = Path(__file__).parents[2]
SOURCES = [
    "csrc/matmul.cpp",
    "csrc/matmul_int8.cpp",
    "csrc/pack.cpp",
    "csrc/threads.cpp",
    "tests/native/products.cpp",
]
FLAGS = ["-std=c++17", "-pthread", "-Wall", "-Wextra", "-Wno-psabi", "-Icsrc", "-DFEWBIT_ISA=generic"]


def tool(*names):
    found = next(filter(None, map(shutil.which, names)), None)
    return found or pytest.skip(f"none of {', '.join(names)} is installed")


def check(compiler, flags, program, emulator=()):
    subprocess.run([compiler, *FLAGS, *SOURCES, *flags, "-o", str(program)], cwd=ROOT, check=True)
    result = subprocess.run([*emulator, str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "largest relative error" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("processor", ["armv8-a", "armv8.2-a+dotprod"])
def test_products_on_arm(processor, tmp_path):
    compiler = tool("aarch64-linux-gnu-g++", "aarch64-linux-gnu-g++-12")
    emulator = tool("qemu-aarch64-static", "qemu-aarch64")
    check(compiler, ["-O3", "-static", f"-march={processor}"], tmp_path / "products", [emulator])


@pytest.mark.slow
def test_products_as_a_program(tmp_path):
    compiler = tool("g++", "c++", "clang++")
    if "avx2" not in native.instruction_sets():
        pytest.skip("no AVX2 here")
    check(compiler, ["-O1", "-mavx2", "-mfma", "-mf16c", "-ldl"], tmp_path / "products")
