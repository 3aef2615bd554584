"""How large the code is: lines, files, functions and arguments of a Python package.

python benchmarks/code_size.py [FOLDER]          # src/fewbit by default
python benchmarks/code_size.py --depth           # also: calls from fewbit.quantize to the column loop
python benchmarks/code_size.py --into docs/architecture.md
"""

from __future__ import annotations

import argparse
import ast
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

PACKAGE = Path(__file__).parents[1] / "src" / "fewbit"
# The same numbers at 9c4f01a, before the code was made smaller.
BEFORE = {
    "lines": "28,589",
    "files": "180",
    "median and longest file": "134, 491 lines",
    "functions": "1,698",
    "median function": "7 lines",
    "longest function": "109 lines (cli/bench.py: bench)",
    "functions over 50 lines": "20",
    "functions with more than 7 parameters": "50",
    "calls from fewbit.quantize to the column loop": "20",
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST) -> Iterator[Function]:
    """Every function and method, nested ones included."""
    yield from (node for node in ast.walk(tree) if isinstance(node, Function))


def parameters(function: Function) -> list[str]:
    """Names of the parameters, without self and cls."""
    arguments = function.args
    given = [
        *arguments.posonlyargs,
        *arguments.args,
        *arguments.kwonlyargs,
        arguments.vararg,
        arguments.kwarg,
    ]
    return [a.arg for a in given if a is not None and a.arg not in ("self", "cls")]


def lines(node: Function) -> int:
    """Lines from `def` to the end of the body."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def measure(package: Path) -> dict[str, str]:
    """The rows of the table: what is counted -> its value."""
    sources = {path: path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py"))}
    trees = {path: ast.parse(source) for path, source in sources.items()}
    counts = [source.count("\n") for source in sources.values()]
    every = [(path, function) for path, tree in trees.items() for function in functions(tree)]
    sizes = [lines(function) for _, function in every]
    path, longest = max(every, key=lambda item: lines(item[1]))
    many = sum(len(parameters(function)) > 7 for _, function in every)
    return {
        "lines": f"{sum(counts):,}",
        "files": f"{len(counts)}",
        "median and longest file": f"{statistics.median(counts):.0f}, {max(counts)} lines",
        "functions": f"{len(every):,}",
        "median function": f"{statistics.median(sizes):.0f} lines",
        "longest function": f"{lines(longest)} lines ({path.relative_to(package)}: {longest.name})",
        "functions over 50 lines": f"{sum(size > 50 for size in sizes)}",
        "functions with more than 7 parameters": f"{many}",
    }


def frames_to_the_column_loop() -> list[str]:
    """The calls from `fewbit.quantize` to the function with the loop over columns, as file:function."""
    import fewbit
    from fewbit import demo

    package = Path(fewbit.__file__).parent  # the source tree, or what is installed
    deepest: list[str] = []

    def profile(frame: FrameType | None, event: str, _: object) -> None:
        nonlocal deepest
        if event != "call" or frame is None or not frame.f_code.co_name.endswith("round_block"):
            return
        found = []
        while frame is not None:
            code, file = frame.f_code, Path(frame.f_code.co_filename)
            if file.is_relative_to(package):
                name = getattr(code, "co_qualname", code.co_name)  # qualified from Python 3.11 on
                found.append(f"{file.relative_to(package)}: {name}")
            frame = frame.f_back
        deepest = max(deepest, found[::-1], key=len)

    config = fewbit.QuantConfig(group_size=64, seq_len=64, num_samples=2, override={r"layers\.[1-9]": "skip"})
    with tempfile.TemporaryDirectory() as folder:
        sys.setprofile(profile)
        try:
            fewbit.quantize(
                demo.model_path(), config, dataset=demo.calibration_text(), output=Path(folder) / "out"
            )
        finally:
            sys.setprofile(None)
    return deepest


def table(measured: dict[str, str]) -> str:
    """Before and after, in Markdown."""
    rows = [f"| {name} | {BEFORE[name]} | {value} |" for name, value in measured.items()]
    return "\n".join(["| src/fewbit | before | now |", "|---|---|---|", *rows])


def numbered(frames: list[str]) -> str:
    """The calls as a Markdown list."""
    return "\n".join(f"{i}. `{frame}`" for i, frame in enumerate(frames, 1))


def put(page: Path, name: str, text: str) -> None:
    """Replace what stands between the marks of `name`."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=PACKAGE)
    parser.add_argument("--depth", action="store_true")
    parser.add_argument("--into", type=Path, help="a page with marks for the table and the calls")
    arguments = parser.parse_args()
    measured = measure(arguments.folder)
    frames = frames_to_the_column_loop() if arguments.depth or arguments.into else []
    if frames:
        measured["calls from fewbit.quantize to the column loop"] = str(len(frames))
    print("\n".join(f"{name:48} {value}" for name, value in measured.items()))
    print("\n".join(f"  {i:2}  {frame}" for i, frame in enumerate(frames, 1)))
    if arguments.into:
        put(arguments.into, "size", table(measured))
        put(arguments.into, "calls", numbered(frames))


if __name__ == "__main__":
    main()
