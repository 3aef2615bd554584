"""The documentation: it builds without a network, its code runs, its links lead somewhere, its messages exist.

Pages with tests of their own, which also look at what they leave: `RUN_ELSEWHERE`.
"""

import ast
import dataclasses
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch
import typer
import yaml

import fewbit
from docs_runner import DOCS, blocks, commands, pages, prepare, run
from fewbit.cli.main import app

ROOT = DOCS.parent
RUN_ELSEWHERE = {
    "loading.md": "hf/test_loading_docs.py",
    "fine-tuning.md": "hf/test_fine_tuning.py",
    "migrating.md": "compat/test_migrating.py",
}
# Commands for several machines, and for benchmarks that take hours. Whole pages, because others are made by scripts.
NOT_RUN = {"scale.md", "accuracy.md", "performance.md", "performance-measurements.md", "compatibility.md"}
RUN = [page for page in pages() if page.name not in {*RUN_ELSEWHERE, *NOT_RUN} and blocks(page)]
LONG = {"choosing", "big-models", "mixed-precision"}  # minutes of quantization
COMMANDS = typer.main.get_command(app).commands
# How many blocks of the other pages are only shown. They cannot be kept true by a test: let them stay few.
SHOWN_ONLY = 16


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    prepare(folder)
    return folder


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in LONG else []) for p in RUN],
)
def test_the_code_of_a_page_runs(page, prepared, tmp_path, monkeypatch):
    shutil.copytree(prepared, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    state = torch.random.get_rng_state()
    run(page)
    torch.random.set_rng_state(state)


def test_every_block_has_a_known_language():
    for page in pages():
        kinds = {block.kind for block in blocks(page)}
        allowed = {"python", "bash", "text", "yaml", "diff"} | ({"", "sh"} if page.name in NOT_RUN else set())
        assert kinds <= allowed, f"{page.name}: {kinds - allowed}"
    for name, test in RUN_ELSEWHERE.items():
        assert (ROOT / "tests" / test).exists(), name


def test_blocks_that_do_not_run_say_why():
    shown = [block for page in pages() for block in blocks(page) if block.reason is not None]
    assert len(shown) == SHOWN_ONLY, "\n".join(
        f"{block.page}:{block.line}: {block.reason}" for block in shown
    )
    for block in shown:
        for test in re.findall(r"tests/\S+\.py", block.reason):
            assert (ROOT / test).exists(), block


def test_options_of_shown_commands_exist():
    """Options of fewbit's commands, and scripts of this repository."""
    known = {
        name: {o for p in command.params for o in p.opts + p.secondary_opts}
        for name, command in COMMANDS.items()
    }
    seen = 0
    everything = [block for page in (*pages(), ROOT / "README.md") for block in blocks(page)]
    for block in everything:
        if block.reason is None and block.page not in {*NOT_RUN, "README.md"}:
            continue
        for line in commands(block) if block.kind in ("bash", "sh", "") else ():
            if "fewbit" in line and (rest := line[line.index("fewbit") + 1 :]):
                options = {word.partition("=")[0] for word in rest[1:] if word.startswith("--")}
                assert options <= known[rest[0]], f"{block.page}: {' '.join(line)}"
                seen += 1
            for word in line:
                if word.startswith(("benchmarks/", "tests/")) and word.endswith(".py"):
                    assert (ROOT / word).exists(), f"{block.page}: {word}"
    assert seen > 5


def test_the_site_builds_and_fetches_nothing(tmp_path):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    built = list(tmp_path.rglob("*.html"))
    assert len(built) >= len(pages())
    for file in built:
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", file.read_text(encoding="utf-8")):
            assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag), f"{file.name}: {tag}"
    # What mkdocs generates from the source.
    commands_page, api = ((tmp_path / name / "index.html").read_text("utf-8") for name in ("cli", "api"))
    assert all(f"<code>fewbit {name}</code>" in commands_page for name in COMMANDS)
    generated = {*fewbit.__all__} - {"__version__", "FewbitError"} | {"errors.FewbitError"}
    assert not [name for name in generated if f'id="fewbit.{name}"' not in api]


def test_every_page_is_in_the_table_of_contents():
    def files(entry):
        if isinstance(entry, str):
            return [entry]
        return [
            file for value in (entry.values() if isinstance(entry, dict) else entry) for file in files(value)
        ]

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(files(nav)) == sorted(str(page.relative_to(DOCS)) for page in pages())


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *pages()], ids=lambda page: page.name
)
def test_links_work_on_github(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_pictures_are_up_to_date():
    for name, draw in runpy.run_path(str(DOCS / "draw_pipeline.py"))["PICTURES"].items():
        assert (DOCS / name).read_text(encoding="utf-8") == draw(), "run docs/draw_pipeline.py"


def test_every_setting_is_documented():
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages())
    for field in dataclasses.fields(fewbit.QuantConfig):
        option = field.name.replace("_", "-")
        assert re.search(rf"`[^`\n]*(--{option}|\b{field.name}\b)", text), field.name


def test_figures_in_choosing_are_in_the_tables():
    measured = {
        round(float(n), 3)
        for n in re.findall(r"\d+\.\d+", (DOCS / "accuracy.md").read_text(encoding="utf-8"))
    }
    table = (
        (DOCS / "choosing.md")
        .read_text(encoding="utf-8")
        .partition("| setting | KL |")[2]
        .partition("\n\n")[0]
    )
    rows = re.findall(r"\| ([\d.]+) \| ([\d.]+) \|$", table, re.M)
    assert len(rows) == 11
    for kl, perplexity in rows:
        assert {float(kl), float(perplexity)} <= measured, (kl, perplexity)


@pytest.mark.parametrize(
    "page", [ROOT / "CONTRIBUTING.md", DOCS / "architecture.md"], ids=lambda page: page.name
)
def test_named_files_and_tests_exist(page):
    names = re.findall(r"`([\w/]+(?:\.py|/|::\w+|(?<=test)_\w+))`", page.read_text(encoding="utf-8"))
    assert len(names) > 5
    tests = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py"))
    for name in names:
        found = [folder / name for folder in (ROOT, ROOT / "src" / "fewbit") if (folder / name).exists()]
        assert found or f"def {name}(" in tests, name


def templates():
    """Every string in fewbit's source, with … where a value is put in."""
    found = []
    for file in Path(fewbit.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


OTHERS = {
    "Cannot merge LORA layers when the model is gptq quantized": "peft.tuners.lora.model",
    "Loading a GPTQ quantized model requires": "transformers.quantizers.quantizer_gptq",
}


def test_every_message_in_troubleshooting_exists():
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\*\*`(.+)`\*\*$", page, re.M)
    assert len(messages) == page.count("\n**`") > 50
    known = templates()
    missing = [
        message
        for message in messages
        if message not in OTHERS and not re.search(".{0,60}?".join(map(re.escape, message.split("…"))), known)
    ]
    assert not missing


@pytest.mark.parametrize(("message", "module"), OTHERS.items())
def test_messages_of_other_packages_exist(message, module):
    import importlib.util

    assert message in Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
