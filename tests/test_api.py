"""The names that `import fewbit` offers: complete, typed, documented, quick to import, and the same as the commands."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import fewbit
from docs_runner import DOCS
from fewbit.cli.main import app
from fewbit.config import ACT_ORDERS, DTYPES, FORMATS, METHODS, QUALITIES, ExportTarget, PlainDtype
from fewbit.errors import ConfigError, ModelError
from fewbit.exports import DTYPES as DENSE_DTYPES
from fewbit.exports import GGUF, TARGETS
from models import save_tiny, tiny_tokenizer
from tiny_gptq import llama, write_checkpoint

NAMES = [name for name in fewbit.__all__ if name != "__version__"]
FUNCTIONS = [name for name in NAMES if name[0].islower()]


def test_all_is_sorted_and_every_name_is_there():
    assert fewbit.__all__ == sorted(fewbit.__all__)
    assert dir(fewbit) == fewbit.__all__
    assert all(getattr(fewbit, name) is not None for name in fewbit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        fewbit.quantise  # noqa: B018


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(fewbit.__file__).read_text(encoding="utf-8"))
    seen = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    assert sorted([*seen, "__version__"]) == fewbit.__all__
    for name, path in fewbit._LAZY.items():
        assert seen[name] == path
    assert (Path(fewbit.__file__).parent / "py.typed").exists()


def test_importing_loads_neither_torch_nor_transformers():
    code = "import sys, fewbit; print(sorted({'torch', 'transformers', 'numpy', 'typer'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_the_commands_show_their_help_without_torch():
    code = "import sys, fewbit.cli.main; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_typed_and_every_argument_is_described(name):
    function = getattr(fewbit, name)
    hints, doc = typing.get_type_hints(function), inspect.getdoc(function)
    assert hints.keys() - {"return"} == inspect.signature(function).parameters.keys()
    assert "return" in hints
    for argument in inspect.signature(function).parameters:
        assert re.search(rf"^    {argument}: \S", doc, re.M), argument


def choices(hint: object) -> set[str]:
    """The strings that a type allows."""
    if typing.get_origin(hint) is typing.Literal:
        return {value for value in typing.get_args(hint) if isinstance(value, str)}
    return set().union(*map(choices, typing.get_args(hint)))


def test_string_options_are_literals():
    config = typing.get_type_hints(fewbit.QuantConfig)
    allowed = {
        "act_order": ACT_ORDERS,
        "method": METHODS,
        "format": FORMATS,
        "dtype": DTYPES,
        "quality": QUALITIES,
    }
    for name, values in allowed.items():
        assert choices(config[name]) == set(values), name
    assert choices(config["correction"]) == {"auto"}
    assert choices(typing.get_type_hints(fewbit.export)["to"]) == choices(ExportTarget) == {*TARGETS, GGUF}
    assert choices(PlainDtype) == {*DENSE_DTYPES, "q8_0"}
    assert choices(typing.get_type_hints(fewbit.convert)["fmt"]) == set(FORMATS)
    assert choices(typing.get_type_hints(fewbit.load)["dtype"]) == set(DTYPES)


def test_the_page_has_every_name():
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    table = set(re.findall(r"`(\w+)`", page.partition("| name |")[2].partition("\n\n")[0]))
    assert table == set(NAMES)
    # All errors are on the page as a module.
    assert {f"fewbit.{name}" for name in NAMES} - set(re.findall(r"^::: (\S+)$", page, re.M)) == {
        "fewbit.FewbitError"
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, llama())
    tiny_tokenizer().save_pretrained(folder)
    return folder


def command(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_inspect_is_the_command(checkpoint):
    found = fewbit.inspect(checkpoint)
    assert found.to_dict() == json.loads(command("inspect", checkpoint, "--json"))
    assert found.modules == len(found.layers) == 14


def test_verify_is_the_command(checkpoint):
    found = fewbit.verify(checkpoint)
    answer = json.loads(command("verify", checkpoint, "--json"))
    assert (found.ok, found.layers) == (answer["ok"], answer["layers"]) == (True, 14)


def test_convert_is_the_command(checkpoint, tmp_path):
    fewbit.convert(checkpoint, tmp_path / "a", "gptq_v2")
    command("convert", checkpoint, "-o", tmp_path / "b", "--format", "gptq_v2", "-q")
    first, second = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in "ab")
    assert first == second
    assert fewbit.inspect(tmp_path / "a").format == "gptq_v2"


def test_plan_is_the_command(tmp_path):
    folder = save_tiny(tmp_path / "model")
    config = fewbit.QuantConfig(bits=3, group_size=16, num_samples=2, seq_len=32)
    found = fewbit.plan(folder, config).summary()
    options = ("--bits", "3", "--group-size", "16", "--num-samples", "2", "--seq-len", "32", "--json")
    answer = json.loads(command("plan", folder, *options))
    assert found["problems"] == answer["problems"] == []
    assert found["modules"] == answer["modules"]
    assert found["output_bytes"] == answer["output_bytes"]


def test_generate_is_the_command(checkpoint):
    text = fewbit.generate(checkpoint, "the", max_new_tokens=12, device="cpu")
    assert text + "\n" == command(
        "generate", checkpoint, "-p", "the", "--max-new-tokens", "12", "--device", "cpu", "-q"
    )
    model = fewbit.load(checkpoint, dtype="bfloat16")
    assert fewbit.generate(model, "the", max_new_tokens=12) == text
    texts = fewbit.generate(model, ["the", "hello"], max_new_tokens=12)
    assert texts[0] == text
    assert len(texts) == 2


@pytest.mark.parametrize(
    ("prompt", "options", "error", "words"),
    [
        ("", {}, ConfigError, "the prompt is empty"),
        ([], {}, ConfigError, "the prompt is empty"),
        (["the", ""], {}, ConfigError, "the prompt is empty"),
        ("the", {"chat": True}, ModelError, "has no chat template; leave out chat"),
    ],
)
def test_generate_refuses(checkpoint, prompt, options, error, words):
    with pytest.raises(error, match=words):
        fewbit.generate(checkpoint, prompt, device="cpu", **options)


def test_generate_says_where_a_tokenizer_is_missing(tmp_path):
    write_checkpoint(tmp_path, llama())
    with pytest.raises(ModelError, match="has no tokenizer that can be loaded"):
        fewbit.generate(tmp_path, "the", device="cpu")


def test_the_command_line_of_the_pages_is_the_app():
    """The page of commands is generated with typer's own tool."""
    sys.path.insert(0, str(DOCS))
    try:
        from cli_reference import reference
    finally:
        sys.path.remove(str(DOCS))
    text = reference()
    for name, one in typer.main.get_command(app).commands.items():
        section = text.partition(f"## `fewbit {name}`\n")[2].partition("\n## ")[0]
        assert f"```bash\nfewbit {name}" in section, name
        for parameter in one.params:
            for option in (
                (*parameter.opts, *parameter.secondary_opts) if parameter.param_type_name == "option" else ()
            ):
                assert option in section, (name, option)
