"""``fewbit eval`` on the demo model."""

import json

import pytest
from typer.testing import CliRunner

from fewbit import demo
from fewbit.cli.main import app
from fewbit.errors import CalibrationError, ModelError

MODEL, TEXT = str(demo.model_path()), str(demo.evaluation_text())


def run(*args):
    return CliRunner().invoke(app, ["eval", *args])


def test_json_has_the_keys_of_the_contract():
    result = run(
        MODEL,
        "--against",
        MODEL,
        "--dataset",
        TEXT,
        "--seq_len",
        "64",
        "--nsamples",
        "3",
        "--device",
        "cpu",
        "--json",
    )
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert {"perplexity", "nll", "stderr", "tokens", "kl", "top1_agreement"} <= values.keys()
    assert (values["tokens"], values["kl"], values["top1_agreement"]) == (189, 0.0, 1.0)


def test_the_table_names_every_number():
    result = run(MODEL, "--dataset", TEXT, "--seq-len", "64", "--num-samples", "3", "--device", "cpu", "-q")
    assert result.exit_code == 0, result.output
    assert "perplexity" in result.stdout
    assert "189 in 3 windows of 64" in result.stdout
    assert "KL" not in result.stdout


def test_bad_input_is_a_fewbit_error(tmp_path):
    assert isinstance(run(MODEL, "--dataset", "nowhere.txt").exception, CalibrationError)
    too_long = run(MODEL, "--dataset", TEXT, "--seq-len", "1024", "--num-samples", "1", "--device", "cpu")
    with pytest.raises(ModelError, match="at most 512"):
        raise too_long.exception
    (tmp_path / "config.json").write_text((demo.model_path() / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((demo.model_path() / "model.safetensors").read_bytes())
    no_tokenizer = run(str(tmp_path), "--dataset", TEXT)
    with pytest.raises(CalibrationError, match="has no tokenizer"):
        raise no_tokenizer.exception
