import pytest
import torch
import typer
from typer.testing import CliRunner

from fewbit.cli.generate import generate
from fewbit.errors import CheckpointError, ConfigError, KernelError, ModelError
from fewbit.hf import prompts
from models import tiny_tokenizer
from tiny_gptq import llama, t5, write_checkpoint

app = typer.Typer()
app.command()(generate)


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path, llama())
    tiny_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def run(*args, said=None):
    return CliRunner().invoke(app, args, input=said)


def test_writes_text_and_speed(folder):
    result = run(folder, "-p", "the", "--max-new-tokens", "5", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "prompt: 3 tokens in " in result.stderr
    assert "then 5 tokens: " in result.stderr
    assert "14 layers: cpu" in result.stderr
    assert "key-value cache: preallocated" in result.stderr
    assert "tokens/s" not in result.stdout
    assert run(folder, "-p", "the", "--max-new-tokens", "5", "--device", "cpu", "-q").stderr == ""


def test_text_is_that_of_transformers(folder):
    from transformers import AutoTokenizer

    import fewbit

    model, tokenizer = fewbit.load(folder, dtype="float32"), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the", return_tensors="pt")
    tokens = model.generate(**ids, max_new_tokens=20, do_sample=False)[0, 3:]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    arguments = ("-p", "the", "--max-new-tokens", "20", "--device", "cpu", "--dtype", "float32", "-q")
    for option in ("--fuse", "--no-fuse"):
        assert run(folder, *arguments, option).stdout == text + "\n"


def test_several_prompts_in_their_order(folder):
    def text(*prompts, options=()):
        named = [word for prompt in prompts for word in ("-p", prompt)]
        return run(folder, *named, "--max-new-tokens", "6", "--dtype", "float32", "--device", "cpu", *options)

    alone = [text(prompt).stdout.removesuffix("\n") for prompt in ("the", "hello")]
    together = text("the", "hello")
    assert together.stdout == "\n\n".join(alone) + "\n"
    assert together.stdout.startswith("the")
    alone = [text(prompt, options=["-q"]).stdout.removesuffix("\n") for prompt in ("the", "hello")]
    assert text("the", "hello", options=["-q"]).stdout == "\n\n".join(alone) + "\n"
    assert "12 tokens in 2 texts" in together.stderr


def test_the_prompt_is_echoed_unless_quiet(folder):
    options = ("-p", "the", "--max-new-tokens", "20", "--device", "cpu")
    assert run(folder, *options).stdout == "the" + run(folder, *options, "-q").stdout


def test_a_conversation_goes_on_from_all_that_was_said(folder, monkeypatch):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    chats, real = [], prompts.encode_chats

    def encode_chats(tokenizer, batch, checkpoint):
        chats.append([(message["role"], message["content"]) for message in batch[0]])
        return real(tokenizer, batch, checkpoint)

    monkeypatch.setattr(prompts, "encode_chats", encode_chats)
    result = run(folder, "--chat", "--max-new-tokens", "9", "--device", "cpu", said="the\n\nhello\n")
    assert result.exit_code == 0, result.output
    first, second = chats
    assert first == [("user", "the")]
    assert [role for role, _ in second] == ["user", "assistant", "user"]
    assert [second[0], second[2]] == [("user", "the"), ("user", "hello")]
    assert second[1][1].strip() in result.stdout


def test_seed_decides_what_is_sampled(folder):
    def text(seed):
        arguments = ("-p", "the", "--max-new-tokens", "12", "--temperature", "1.5", "--device", "cpu", "-q")
        return run(folder, *arguments, "--seed", seed).stdout

    assert text("1") == text("1")
    assert text("1") != text("2")


def test_dtype_and_kernel_are_taken(folder):
    options = ("-p", "the", "--max-new-tokens", "2", "--device", "cpu")
    result = run(folder, *options, "--dtype", "float32", "--kernel", "reference", "-v")
    assert "14 layers: reference" in result.stderr
    assert "on cpu in float32" in result.stderr


def test_faster_loading_is_passed_on(folder, monkeypatch):
    given = {}

    def load(*args, **options):
        given.update(options)
        return llama()

    monkeypatch.setattr("fewbit.hf.load.load", load)
    options = ("-p", "the", "--max-new-tokens", "2", "--device", "cpu")
    run(folder, *options, "--fuse", "--lm-head-runtime", "8")
    assert given == {"fuse": True, "lm_head_runtime": 8}


def test_encoder_decoder(tmp_path):
    write_checkpoint(tmp_path, t5())
    tiny_tokenizer().save_pretrained(tmp_path)
    result = run(str(tmp_path), "-p", "the", "--max-new-tokens", "3", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "key-value cache: transformers' own: the model is an encoder and a decoder" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("--chat",), ModelError, "has no chat template; leave out chat (--chat)"),
        (("--kernel", "marlin"), KernelError, "device is cpu, not cuda"),
        (("--device", "quantum"), ConfigError, "device 'quantum' cannot be used here"),
        (("-p", ""), ConfigError, "the prompt is empty"),
        (("-p", "", "--chat"), ConfigError, "the prompt is empty"),
    ],
)
def test_errors(folder, arguments, error, words):
    result = run(folder, "-p", "the", "--device", "cpu", *arguments)
    assert isinstance(result.exception, error)
    assert words in str(result.exception)


def test_no_prompt(folder):
    assert "the prompt is empty" in str(run(folder).exception)
    assert "has no chat template" in str(run(folder, "--chat", "--device", "cpu", said="the\n").exception)


def test_no_tokenizer(tmp_path):
    write_checkpoint(tmp_path, llama())
    result = run(str(tmp_path), "-p", "the", "--device", "cpu")
    assert isinstance(result.exception, ModelError)
    assert "has no tokenizer that can be loaded" in str(result.exception)
    assert "Copy the original model's tokenizer files" in str(result.exception)


def test_a_prompt_without_tokens(folder, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    empty = torch.zeros((1, 0), dtype=torch.long)
    monkeypatch.setattr(
        PreTrainedTokenizerFast, "__call__", lambda *_, **__: {"input_ids": empty, "attention_mask": empty}
    )
    result = run(folder, "-p", " ", "--device", "cpu")
    assert isinstance(result.exception, ConfigError)
    assert "makes no token of the prompt ' '" in str(result.exception)


def test_not_a_checkpoint(tmp_path):
    result = run(str(tmp_path), "-p", "the")
    assert isinstance(result.exception, CheckpointError)
