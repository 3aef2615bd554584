"""The command in the report gives back the configuration it was made from."""

import dataclasses
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fewbit
from fewbit import QuantConfig
from fewbit.cli.main import app
from fewbit.report.reproduce import reproduce


def called_by(command, monkeypatch):
    """The model, configuration and other arguments with which the command line calls `fewbit.quantization.quantize`."""
    calls = []

    def quantize(model, config, **arguments):
        calls.append((model, config, arguments))
        raise fewbit.errors.ModelError("seen enough")

    monkeypatch.setattr("fewbit.quantization.quantize", quantize)
    words = shlex.split(command)
    assert words[0] == "fewbit"
    result = CliRunner().invoke(app, words[1:])
    assert calls, result.output
    return calls[0]


OTHER = {
    "bits": 3, "group_size": -1, "sym": False, "act_order": "full", "damp": 1e-5, "method": "rtn",
    "ignore": ("layers.0.", "it's"), "override": {r"down_proj$": {"bits": 8, "damp": 2e-7, "sym": True}, "v=": "skip"},
    "correction": 0.25, "quality": "fast", "fast": True, "target_bits": 3.5, "tune": True,
    "tune_steps": 50, "loss_aware": True, "rotate": True, "distill": True,
    "distill_tokens": 1000, "lm_head": True, "mtp": True,
    "format": "gptq_v2", "num_samples": 8, "seq_len": 512, "batch_size": 2,
    "seed": 7, "dtype": "bfloat16", "strict": True,
}  # fmt: skip


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(QuantConfig)])
def test_every_setting_comes_back(field, monkeypatch):
    config = QuantConfig(**{field: OTHER[field]})
    assert config != QuantConfig()
    command = reproduce("a model", config, {"output": Path("out"), "dataset": "x.txt"})
    model, again, arguments = called_by(command, monkeypatch)
    assert (model, again, arguments["output"], arguments["dataset"]) == (
        "a model",
        config,
        Path("out"),
        "x.txt",
    )


def test_every_argument_comes_back(monkeypatch):
    given = {
        "output": Path("my out"), "dataset": "-", "tokenizer": None, "device": "cuda:1", "max_shard_size": "2GB",
        "trust_remote_code": True, "allow_pickle": True, "evaluate_on": "test.txt", "evaluate_tokens": 4096,
    }  # fmt: skip
    _, config, arguments = called_by(reproduce("m", QuantConfig(), given), monkeypatch)
    assert config == QuantConfig()
    assert {name: arguments[name] for name in given if name != "tokenizer"} == {
        name: value for name, value in given.items() if name != "tokenizer"
    }


def test_published_commands_have_no_folders(tmp_path):
    (tmp_path / "model").mkdir()
    given = {"output": "../up/out", "dataset": tmp_path / "text.txt", "evaluate_on": "~/eval.txt"}
    assert reproduce(str(tmp_path / "model"), QuantConfig(), given, published=True) == (
        "fewbit quantize model --output out --dataset text.txt --eval eval.txt"
    )
    hub = reproduce("org/model", QuantConfig(), {"dataset": "wikitext2"}, published=True)
    assert hub == "fewbit quantize org/model --dataset wikitext2"


def test_defaults_are_left_out():
    arguments = {"output": "out", "device": "auto", "max_shard_size": "5GB", "trust_remote_code": False}
    assert reproduce("m", QuantConfig(), arguments) == "fewbit quantize m --output out"


class Odd:
    """Compares as arrays do."""

    def __eq__(self, other):
        raise ValueError("the truth value is ambiguous")

    __hash__ = None


def test_what_the_shell_cannot_say_is_said_in_python():
    text = reproduce(
        "m", QuantConfig(bits=3), {"output": Path("out"), "dataset": ["a", "b"], "tokenizer": "t"}
    )
    assert text == (
        "import fewbit\n\n# dataset: list of 2 items\nconfig = fewbit.QuantConfig(bits=3)\n"
        "fewbit.quantize('m', config, output='out', dataset=dataset, tokenizer='t')"
    )
    assert "# dataset: Odd\n" in reproduce("m", QuantConfig(), {"dataset": Odd()})


def test_a_model_in_memory():
    text = reproduce(Odd(), QuantConfig(), {"dataset": ["a"], "tokenizer": Odd()})
    assert text.endswith(
        "# model: Odd\n# dataset: list of 1 items\n# tokenizer: Odd\nconfig = fewbit.QuantConfig()\n"
        "fewbit.quantize(model, config, dataset=dataset, tokenizer=tokenizer)"
    )
