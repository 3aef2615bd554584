import pytest
import typer
from typer.testing import CliRunner

from fewbit.cli.generate import generate
from fewbit.errors import CheckpointError, ConfigError, KernelError, ModelError
from models import tiny_tokenizer
from tiny_gptq import llama, t5, write_checkpoint

app = typer.Typer()
app.command()(generate)


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path, llama())
    tiny_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def run(*args):
    return CliRunner().invoke(app, args)


def test_writes_text_and_speed(folder):
    result = run(folder, "-p", "the", "--max-new-tokens", "5", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "tokens/s, prompt included" in result.stderr
    assert "14 layers: cpu" in result.stderr
    assert "tokens/s" not in result.stdout
    assert run(folder, "-p", "the", "--max-new-tokens", "5", "--device", "cpu", "-q").stderr == ""


def test_seed_decides_what_is_sampled(folder):
    def text(seed):
        arguments = ("-p", "the", "--max-new-tokens", "12", "--temperature", "1.5", "--device", "cpu", "-q")
        return run(folder, *arguments, "--seed", seed).stdout

    assert text("1") == text("1")
    assert text("1") != text("2")


def test_dtype_decides_the_kernel(folder):
    command = (folder, "-p", "the", "--max-new-tokens", "2", "--device", "cpu", "--dtype", "float32")
    assert "14 layers: cpu\n" in run(*command).stderr
    result = run(*command, "--kernel", "torch")
    assert "14 layers: reference (torch_int4: activations are float32" in result.stderr


def test_encoder_decoder(tmp_path):
    write_checkpoint(tmp_path, t5())
    tiny_tokenizer().save_pretrained(tmp_path)
    result = run(str(tmp_path), "-p", "the", "--max-new-tokens", "3", "--device", "cpu")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("--chat",), ModelError, "has no chat template; leave out --chat"),
        (("--kernel", "marlin"), KernelError, "device is cpu, not cuda"),
        (("--device", "quantum"), ConfigError, "device 'quantum' cannot be used here"),
        (("-p", ""), ConfigError, "the prompt is empty"),
    ],
)
def test_errors(folder, arguments, error, words):
    result = run(folder, "-p", "the", "--device", "cpu", *arguments)
    assert isinstance(result.exception, error)
    assert words in str(result.exception)


def test_no_tokenizer(tmp_path):
    write_checkpoint(tmp_path, llama())
    result = run(str(tmp_path), "-p", "the", "--device", "cpu")
    assert isinstance(result.exception, ModelError)
    assert "has no tokenizer that can be loaded" in str(result.exception)
    assert "Copy the original model's tokenizer files" in str(result.exception)


def test_a_prompt_without_tokens(folder, monkeypatch):
    import torch
    from transformers import PreTrainedTokenizerFast

    nothing = {"input_ids": torch.zeros((1, 0), dtype=torch.long)}
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", lambda *_, **__: nothing)
    result = run(folder, "-p", " ", "--device", "cpu")
    assert isinstance(result.exception, ConfigError)
    assert "makes no token of the prompt ' '" in str(result.exception)


def test_verbose_adds_device_and_dtype(folder):
    result = run(folder, "-p", "the", "--max-new-tokens", "2", "--device", "cpu", "-v")
    assert "on cpu in bfloat16" in result.stderr
    assert "prompt: 3 tokens" in result.stderr


def test_not_a_checkpoint(tmp_path):
    result = run(str(tmp_path), "-p", "the")
    assert isinstance(result.exception, CheckpointError)
