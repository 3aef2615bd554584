"""Every block of docs/migrating.md runs, as it is after the migration, and leaves what it says."""

import re
from pathlib import Path

import pytest

import fewbit
from fewbit.verification import verify
from models import TEXT, save_tiny, tiny_tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text()
SECTIONS = {text.partition("\n")[0]: text for text in PAGE.split("\n## ")[1:]}


def blocks(text):
    """The Python blocks of a section; of a diff, what is there afterwards."""
    for kind, code in re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL):
        assert kind in ("python", "diff")
        lines = code.splitlines(keepends=True)
        if kind == "diff":
            assert all(line[0] in " +-\n" for line in lines)
            lines = [line[1:] if line != "\n" else line for line in lines if not line.startswith("-")]
        yield "".join(lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the page takes for granted: a model and a text."""
    folder = tmp_path_factory.mktemp("docs")
    save_tiny(folder / "my-model", max_position_embeddings=512)
    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder / "my-model")
    (folder / "notes.txt").write_text("\n\n".join(TEXT[start : start + 100] for start in range(0, 240, 60)))
    return folder


@pytest.mark.parametrize(
    ("section", "written"),
    [
        ("AutoGPTQ", ["autogptq-4bit", "my-model-4bit"]),
        ("optimum", ["optimum-4bit", "my-model-4bit", "in-memory-4bit"]),
        ("GPTQModel", ["my-model-4bit"]),
    ],
)
def test_a_section_runs(section, written, folder, tmp_path, monkeypatch):
    for name in ("my-model", "notes.txt"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in blocks(SECTIONS[section]):
        exec(compile(code, f"docs/migrating.md, {section}", "exec"), names)
    for name in written:
        assert not verify(tmp_path / name).problems


def test_transformers_loads_what_was_written(folder, monkeypatch):
    monkeypatch.chdir(folder)
    fewbit.quantize("my-model", fewbit.QuantConfig(method="rtn"), output="my-model-4bit")
    for code in blocks(SECTIONS["transformers"]):
        exec(compile(code, "docs/migrating.md, transformers", "exec"), {})


def test_no_section_is_left_out():
    assert set(SECTIONS) == {"AutoGPTQ", "optimum", "GPTQModel", "transformers"}
