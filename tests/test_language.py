"""Names and prose use the terms of docs/glossary.md, and plain American English.

    python tests/test_language.py [PATH ...]      # lists every finding, in all files or in those below PATH

Names are those that src/fewbit defines. Prose is docstrings, comments, the pages of docs/ and README.md, without code.
Error messages are not looked at.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("examples/**/*.py")])
PAGES = sorted([*ROOT.glob("docs/**/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])

# Parts of names: `input_family` and `InputFamily` are both found by "family".
NAME_PARTS = re.compile(
    "company|companies|kin|family|families|siblings?|party|parties|room|heap|places?|spill|ahead|together|meets?|"
    "meeting|towers?|readers|delivery|ladder|rungs?|drift|sweeps?|walk|foresee|foreseen|whoever|nobody|misfits"
)
IN_PLACE = re.compile("in_?place", re.IGNORECASE)  # the usual term, in names as in prose

WORDS = [
    r"compan(?:y|ies)",
    r"kin",
    r"(?<!model )famil(?:y|ies)",
    r"siblings?",
    r"(?<!third-)(?<!third )part(?:y|ies)",
    r"rooms?",
    r"heaps?",
    r"(?<!in )(?<!in-)(?<!decimal )places?",
    r"spill(?:s|ed|ing)?",
    r"ahead(?! of time)",
    r"meetings?|meets? (?:a|each|every|all|the) (?:layer|point)s?",
    r"towers?",
    r"readers",
    r"delivery",
    r"ladders?",
    r"rungs?",
    r"drift(?:s|ed)?",
    r"sweeps?",
    r"walk(?:s|ed|ing)?",
    r"fore(?:see|sees|seen|saw)",
    r"(?:quantized|full-precision|second|two|both|one|other) streams?",
    # Mannered English.
    r"nobody|whoever",
    r"those of|that of|(?<!all )(?<!each )of which|of whom",
    r"at hand|beforehand|besides|thereby|therein",
    r"but for|so many|of (?:its|their) own|by (?:itself|themselves)",
    r"goes? on|gone on|for want of",
]
PROSE = re.compile(r"\b(?:" + "|".join(WORDS) + r")\b", re.IGNORECASE)
# Where a word above is the technical term: file -> words.
PROSE_ALLOWED = {
    "src/fewbit/pipeline/malloc.py": {"heap"},
    "src/fewbit/pipeline/streaming.py": {"heap"},
    "docs/glossary.md": {"sweep"},
}


def parts_of(name: str) -> set[str]:
    return {part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def defined_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Names that a module gives to functions, classes, arguments, variables and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno


def prose_of_code(source: str) -> Iterator[tuple[str, int]]:
    """Comments and docstrings."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string, token.start[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            text = node.body[0]
            for i, line in enumerate(source.splitlines()[text.lineno - 1 : text.end_lineno]):
                yield line, text.lineno + i


def prose_of_page(source: str) -> Iterator[tuple[str, int]]:
    """Lines outside of fenced code."""
    fenced = False
    for number, line in enumerate(source.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith(("    ", "**`")):
            yield line, number


def findings(path: Path) -> list[str]:
    """`file:line: word` for each finding."""
    file, source = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    lines = prose_of_code(source) if path.suffix == ".py" else prose_of_page(source)
    found = [
        (number, match[0])
        for line, number in lines
        # Links, and code in backquotes, are no prose.
        for match in PROSE.finditer(re.sub(r"`[^`]*`|\]\([^)]*\)|https?://\S+", "", line))
        if match[0].lower() not in PROSE_ALLOWED.get(file, ())
    ]
    if path.suffix == ".py" and "src" in path.parts:
        found += [
            (number, f"{name} (name)")
            for name, number in defined_names(ast.parse(source))
            if any(map(NAME_PARTS.fullmatch, parts_of(IN_PLACE.sub("", name))))
        ]
    return [f"{file}:{number}: {word}" for number, word in sorted(set(found))]


def test_names_and_prose_use_the_terms_of_the_field():
    found = [finding for path in (*CODE, *PAGES) for finding in findings(path)]
    assert not found, "\n".join(found)


if __name__ == "__main__":
    chosen = [Path(argument).resolve() for argument in sys.argv[1:]] or [ROOT]
    files = [path for path in (*CODE, *PAGES) if any(path.is_relative_to(folder) for folder in chosen)]
    print("\n".join(finding for path in files for finding in findings(path)))
