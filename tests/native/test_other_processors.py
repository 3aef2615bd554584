"""The compiled products on an instruction set that this machine emulates: needs a cross compiler and QEMU.

apt-get install g++-aarch64-linux-gnu qemu-user-static
python -m pytest -m slow tests/native
"""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ["csrc/matmul.cpp", "csrc/tiles.cpp", "csrc/threads.cpp", "tests/native/products.cpp"]


def tool(*names):
    found = next(filter(None, map(shutil.which, names)), None)
    return found or pytest.skip(f"none of {', '.join(names)} is installed")


@pytest.mark.slow
def test_products_on_arm(tmp_path):
    compiler = tool("aarch64-linux-gnu-g++", "aarch64-linux-gnu-g++-12")
    emulator = tool("qemu-aarch64-static", "qemu-aarch64")
    flags = [
        "-O3",
        "-std=c++17",
        "-static",
        "-pthread",
        "-Wall",
        "-Wextra",
        "-Wno-psabi",
        "-Icsrc",
        "-DFEWBIT_ISA=generic",
    ]
    subprocess.run([compiler, *flags, *SOURCES, "-o", str(tmp_path / "products")], cwd=ROOT, check=True)
    result = subprocess.run([emulator, str(tmp_path / "products")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "largest relative error" in result.stdout


def test_products_as_a_program(tmp_path):
    compiler = tool("g++", "c++", "clang++")
    flags = ["-O1", "-std=c++17", "-pthread", "-Wno-psabi", "-Icsrc", "-DFEWBIT_ISA=generic", "-ldl"]
    subprocess.run([compiler, *SOURCES, *flags, "-o", str(tmp_path / "products")], cwd=ROOT, check=True)
    result = subprocess.run([str(tmp_path / "products")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
