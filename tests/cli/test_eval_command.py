"""``fewbit eval`` on the demo model."""

import json

import pytest
from typer.testing import CliRunner

from fewbit import demo
from fewbit.cli.main import app
from fewbit.errors import CalibrationError, ModelError
from models import tiny_tokenizer
from tiny_gptq import llama, write_checkpoint

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


EVAL = ("--dataset", TEXT, "--seq-len", "32", "--num-samples", "2", "--device", "cpu")


def test_verbose_names_device_and_kernels(tmp_path):
    write_checkpoint(tmp_path, llama())
    tiny_tokenizer().save_pretrained(tmp_path)
    result = run(str(tmp_path), *EVAL, "-q", "-v")
    assert result.exit_code == 0, result.output
    assert "LlamaForCausalLM on cpu" in result.stderr
    assert "14 layers: " in result.stderr


def test_a_kernel_may_be_asked_for(tmp_path):
    write_checkpoint(tmp_path, llama())
    tiny_tokenizer().save_pretrained(tmp_path)
    result = run(str(tmp_path), *EVAL, "-q", "-v", "--kernel", "reference")
    assert "14 layers: reference\n" in result.stderr
    assert "device is cpu, not cuda" in str(run(str(tmp_path), *EVAL, "--kernel", "marlin").exception)


def test_trust_in_a_checkpoints_code_reaches_the_loader(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, llama())
    tiny_tokenizer().save_pretrained(tmp_path)
    trusted = []

    def load(path, device, dtype, kernel, trust_remote_code):
        trusted.append(trust_remote_code)
        return llama()

    monkeypatch.setattr("fewbit.hf.load.load", load)
    assert run(str(tmp_path), *EVAL, "--trust-remote-code").exit_code == 0
    assert run(str(tmp_path), *EVAL).exit_code == 0
    assert trusted == [True, False]


def test_a_gguf_file_beside_a_quantize_config_is_what_is_evaluated(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").touch()
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 32}')
    opened = []

    def load_model(source, dtype, device):
        opened.append(source.gguf)
        return llama()

    monkeypatch.setattr("fewbit.modeling.source.Source.load_model", load_model)
    monkeypatch.setattr("fewbit.modeling.source.Source.load_tokenizer", lambda source: tiny_tokenizer())
    result = run(str(tmp_path / "model.gguf"), *EVAL)
    assert result.exit_code == 0, result.output
    assert opened == ["model.gguf"]
