"""Cross-compiles a wheel for another system with the compiler of the package ziglang, which needs no container.

    python scripts/cross_wheels.py linux-x86_64 linux-aarch64 macos-arm64 --output dist

The wheel is for the Python version that runs this: from 3.12 on for all later ones. auditwheel then checks wheels for
Linux. Nothing is run here. The release workflow builds its wheels on machines of each kind instead, and tests them.
"""

from __future__ import annotations

import argparse
import os
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class System:
    """A system to build for.

    Attributes:
        zig: the target in zig's words, with the oldest version that the wheel runs on.
        cmake: name and processor in CMake's words.
        platform: the platform in Python's words.
        suffix: end of the names of extension modules, without the part of the Python version.
    """

    zig: str
    cmake: tuple[str, str]
    platform: str
    suffix: str


SYSTEMS = {
    "linux-x86_64": System(
        "x86_64-linux-gnu.2.28",
        ("Linux", "x86_64"),
        "linux-x86_64",
        "x86_64-linux-gnu.so",
    ),
    "linux-aarch64": System(
        "aarch64-linux-gnu.2.28",
        ("Linux", "aarch64"),
        "linux-aarch64",
        "aarch64-linux-gnu.so",
    ),
    "macos-arm64": System("aarch64-macos.11.0", ("Darwin", "arm64"), "macosx-11.0-arm64", "darwin.so"),
}


# zig has names of its own for processors. An argument of gcc and clang is replaced before zig sees it.
_IN_ZIGS_WORDS = """set -- "${@/#-march=armv8.2-a+dotprod/-mcpu=generic+v8_2a+dotprod}"
"""


def build(system: System, output: Path) -> Path:
    """Build the wheel for `system` into `output`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = os.environ | {
            "CMAKE_TOOLCHAIN_FILE": str(write_toolchain(system, folder)),
            "_PYTHON_HOST_PLATFORM": system.platform,
            "SETUPTOOLS_EXT_SUFFIX": f".cpython-3{sys.version_info.minor}-{system.suffix}",
            # A failed compilation must not become a wheel without compiled code.
            "SKBUILD_WHEEL_CMAKE": "true",
        }
        built = folder / "built"
        command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(built), str(ROOT)]
        subprocess.run(command, env=environment, check=True)
        (wheel,) = built.glob("*.whl")
        if "-none-any" in wheel.name:
            raise SystemExit(f"{wheel.name} has no compiled module: the compilation failed, see above")
        output.mkdir(parents=True, exist_ok=True)
        if system.cmake[0] != "Linux":
            return wheel.replace(output / wheel.name)
        before = set(output.glob("*.whl"))
        # "auto", because auditwheel knows the names of this machine's processor only. zig's target bounds the version.
        repair = [
            sys.executable,
            "-m",
            "auditwheel",
            "repair",
            "--plat",
            "auto",
            "-w",
            str(output),
            str(wheel),
        ]
        subprocess.run(repair, check=True)
        (repaired,) = set(output.glob("*manylinux*.whl")) - before
        return repaired


def write_toolchain(system: System, folder: Path) -> Path:
    """Write a toolchain file for CMake, and the programs that it names: zig under one name for each tool."""
    import ziglang

    zig = Path(ziglang.__file__).parent / "zig"
    for tool in ("c++", "cc", "ar", "ranlib"):
        program = folder / tool
        command = f'exec "{zig}" {tool} "$@"'
        if tool in ("c++", "cc"):
            command = f'exec "{zig}" {tool} -target {system.zig} "$@"'
        program.write_text(f"#!/bin/bash\n{_IN_ZIGS_WORDS}{command}\n", encoding="utf-8")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    name, processor = system.cmake
    lines = [
        f"set(CMAKE_SYSTEM_NAME {name})",
        f"set(CMAKE_SYSTEM_PROCESSOR {processor})",
        f'set(CMAKE_C_COMPILER "{folder}/cc")',
        f'set(CMAKE_CXX_COMPILER "{folder}/c++")',
        f'set(CMAKE_AR "{folder}/ar" CACHE FILEPATH "")',
        f'set(CMAKE_RANLIB "{folder}/ranlib" CACHE FILEPATH "")',
    ]
    file = folder / "toolchain.cmake"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("systems", nargs="+", choices=SYSTEMS)
    parser.add_argument("--output", type=Path, default=Path("dist"))
    arguments = parser.parse_args()
    for name in arguments.systems:
        print(f"{name}: {build(SYSTEMS[name], arguments.output)}")


if __name__ == "__main__":
    main()
