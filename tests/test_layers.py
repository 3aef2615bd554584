"""The architecture of src/fewbit: imports point down, names are unique, files and functions stay small.

Imports inside functions count too; those under `if TYPE_CHECKING:` do not.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from code_size import frames_to_the_column_loop, functions, parameters

import fewbit

PACKAGE = Path(fewbit.__file__).parent
SOURCES = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {path: ast.parse(source) for path, source in SOURCES.items()}

# A unit (a folder or a file of src/fewbit) imports units of its own layer and of the layers above it in this list.
LAYERS = [
    "__init__ errors config",
    "native atomic_io formatting profiling resources distributed quantized_matrix input_groups context progress "
    "torch_internals transformers_internals",
    "modeling calibration gptq checkpoint",
    "kernels planning mixed_precision pipeline",
    "hf engines evaluation inspection verification",
    "preparation report output estimate distillation quantization exports",
    "gptq_arguments integration vllm_plugin",
    "compat cli bench demo __main__",
]
RANK = {unit: rank for rank, layer in enumerate(LAYERS) for unit in layer.split()}

# A file here is named after a command, or after a module of an older tool, whatever other folders contain.
NAMED_BY_OTHERS = {"cli", "compat"}
SAME_NAME = {"__init__.py", "kernel.py", "layout.py"}  # one concept, told apart by the folder
# Arguments of kernels are tensors and strides; options of commands and arguments of older tools and of vLLM are given.
EXEMPT = (
    "kernels/",
    "cli/",
    "compat/",
    "vllm_plugin/",
    "native.py",
    "gptq/triton_backend.py",
    "gptq/backends/",
)
# The public interface, and signatures that other packages define, take more than 7 parameters.
PUBLIC = {
    "quantization.py:quantize",
    "hf/load.py:load",
    "hf/prompts.py:generate",
    "estimate/__init__.py:estimate",
    "gptq_arguments.py:__init__",
    "hf/fuse.py:attention_forward",
    "hf/fuse.py:packed_attention_forward",
    "calibration/__init__.py:prepare",
    "distillation/__init__.py:distill",
}
# What existed when the size was last cut down, and what each feature since may add: files, lines.
LIMITS = {"files": 145, "lines": 25_600, "lines of a file": 500}
ADDED = {
    "layers that run several times in one pass": (1, 200),
    "parts of tensors that transformers splits, --mtp, other findings of the sweep": (0, 300),
    "distillation": (9, 1_300),
    "exports to other engines": (11, 1_250),
    "presets, fast loading by default": (0, 150),
    "verdicts, reports without folders, engines on the card, faster calibration": (0, 210),
    "serving": (2, 430),
    "inspect, generate and plan in Python": (2, 240),
    "plugin for vLLM": (5, 680),
    "group sizes that fit, settings as keywords, conversations, the original in inspect, progress": (2, 340),
    "float32 where a CPU multiplies 16 bits slowly": (0, 60),
    "settings for engines, more model types in GGUF, reading compressed-tensors": (3, 700),
    "AMX, a table of layers that sorts, --eval-tokens, factorizations in place": (0, 90),
    "rotation": (3, 715),
    "loss-aware rounding": (3, 520),
}


def name_of(path: Path) -> str:
    """`pipeline.scheduler` for pipeline/scheduler.py, `gptq` for gptq/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


NAMES = {name_of(path): path for path in TREES}


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    """Import statements, except those that only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        else:
            yield from _statements(child)


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Modules of fewbit that `path` imports, and the lines where it does."""
    parts = ["fewbit", *path.relative_to(PACKAGE).parts]
    for statement in _statements(TREES[path]):
        if isinstance(statement, ast.Import):
            targets = [(alias.name, None) for alias in statement.names]
        else:
            base = parts[: len(parts) - statement.level] if statement.level else []
            module = ".".join([*base, *([statement.module] if statement.module else [])])
            targets = [(module, alias.name) for alias in statement.names]
        for module, member in targets:
            if module != "fewbit" and not module.startswith("fewbit."):
                continue
            inner = module.removeprefix("fewbit").removeprefix(".")
            longer = ".".join(part for part in (inner, member) if part)
            yield (longer if longer in NAMES else inner if inner in NAMES else "__init__"), statement.lineno


GRAPH = {name: {target for target, _ in imports(path)} - {name} for name, path in NAMES.items()}


def unit_of(name: str) -> str:
    return name.partition(".")[0]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one node."""
    reached = {node: _reached(graph, node) for node in graph}
    found = {frozenset(m for m in reached[n] if n in reached[m]) for n in graph if n in reached[n]}
    return sorted(sorted(component) for component in found)


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    stack = list(graph[start])
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(graph[node])
    return seen


def test_every_unit_has_a_layer():
    assert {unit_of(name) for name in NAMES} == set(RANK)


def test_imports_point_down():
    up = [
        f"{path.relative_to(PACKAGE)}:{line} ({unit_of(name)}) imports {target}"
        for name, path in NAMES.items()
        for target, line in imports(path)
        if RANK.get(unit_of(target), 0) > RANK.get(unit_of(name), 99)
    ]
    assert not up, "\n".join(up)


def test_no_import_circles_between_modules():
    assert not circles(GRAPH)


def test_no_import_circles_between_folders():
    units: dict[str, set[str]] = {unit_of(name): set() for name in GRAPH}
    for name, targets in GRAPH.items():
        units[unit_of(name)] |= {unit_of(target) for target in targets} - {unit_of(name)}
    assert not circles(units)


def test_basenames_are_unique():
    counted = Counter(path.name for name, path in NAMES.items() if unit_of(name) not in NAMED_BY_OTHERS)
    assert {name for name, count in counted.items() if count > 1} <= SAME_NAME


def test_functions_take_few_parameters():
    many = {
        f"{path.relative_to(PACKAGE).as_posix()}:{function.name}"
        for path, tree in TREES.items()
        for function in functions(tree)
        if len(parameters(function)) > 7
    }
    assert not sorted(name for name in many - PUBLIC if not name.startswith(EXEMPT))


def test_the_package_stays_small():
    sizes = {path.relative_to(PACKAGE).as_posix(): text.count("\n") for path, text in SOURCES.items()}
    assert len(sizes) <= LIMITS["files"] + sum(files for files, _ in ADDED.values())
    assert sum(sizes.values()) <= LIMITS["lines"] + sum(lines for _, lines in ADDED.values())
    assert max(sizes.values()) <= LIMITS["lines of a file"]


def test_few_calls_from_quantize_to_the_column_loop():
    frames = frames_to_the_column_loop()
    assert frames[0].endswith("quantize")
    assert len(frames) <= 10, "\n".join(frames)
