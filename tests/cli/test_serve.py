"""`fewbit serve`, asked with the openai client. Each server is a process of its own."""

import itertools
import json
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from fastapi.testclient import TestClient
from transformers import Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from fewbit.cli.main import app
from fewbit.errors import CheckpointError, ConfigError, DependencyError, ModelError
from fewbit.hf.server import GRACE
from models import VOCAB, save_tiny, tiny_tokenizer
from tiny_gptq import llama, t5, write_checkpoint

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}a: "
HELLO = [{"role": "user", "content": "hello"}]
ENDLESS = 1_000_000  # tokens that no test waits for
CACHE_TOKENS = 2048


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Server:
    """A running `fewbit serve`, and a client of it."""

    def __init__(self, folder, log, *options):
        self.port = free_port()
        command = [sys.executable, "-m", "fewbit", "serve", str(folder), "--port", str(self.port)]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, "--device", "cpu", "--dtype", "float32", *options], stdout=file, stderr=file
            )
        self.model, self._log = str(folder), log
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=120
        )
        self.wait_for("Uvicorn running")

    @property
    def log(self):
        return self._log.read_text()

    def wait_for(self, words, seconds=300):
        end = time.monotonic() + seconds
        while words not in self.log:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < end, self.log
            time.sleep(0.05)

    def chat(self, messages=HELLO, max_tokens=12, **options):
        options = {"temperature": 0, "max_tokens": max_tokens} | options
        return self.client.chat.completions.create(model=self.model, messages=messages, **options)

    def text(self, content, max_tokens=12):
        answer = self.chat([{"role": "user", "content": content}], max_tokens)
        return answer.choices[0].message.content

    def end(self, number):
        """Send a signal; returns the exit code and the seconds until then."""
        started = time.monotonic()
        self.process.send_signal(number)
        return self.process.wait(120), time.monotonic() - started

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


def write_model(path, *, template=TEMPLATE, **changes):
    """A Llama that never ends its text."""
    model = llama(vocab_size=VOCAB, max_position_embeddings=65536, **changes)
    model.lm_head.weight.data[model.config.eos_token_id] = 0
    write_checkpoint(path, model)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("served"))


SINGLE, CONTINUOUS = (), ("--continuous-batching", "--cache-tokens", str(CACHE_TOKENS))


@pytest.fixture(scope="module", params=[SINGLE, CONTINUOUS], ids=["single", "continuous"])
def server(request, folder, tmp_path_factory):
    with Server(folder, tmp_path_factory.mktemp("log") / "log", *request.param) as running:
        running.continuous = request.param is CONTINUOUS
        yield running


@pytest.fixture
def here(monkeypatch):
    """Start a server inside this process; returns a client, and what was printed."""

    def start(folder, *options):
        apps = []
        monkeypatch.setattr("uvicorn.Server.run", lambda self: apps.append(self.config.app))
        monkeypatch.setattr("signal.signal", lambda *_: None)
        arguments = ["serve", str(folder), "--port", str(free_port()), "--device", "cpu", *options]
        result = CliRunner().invoke(app, [*arguments, "--dtype", "float32"])
        assert result.exit_code == 0, result.output
        client = openai.OpenAI(
            http_client=TestClient(apps[0]), base_url="http://testserver/v1", api_key="none", max_retries=0
        )
        return client, result.stderr

    return start


def generated(folder, *options):
    arguments = ["generate", str(folder), *options, "--device", "cpu", "--dtype", "float32", "-q"]
    return CliRunner().invoke(app, arguments).stdout.removesuffix("\n")


def test_chat_is_that_of_generate(server, folder):
    expected = generated(folder, "--chat", "-p", "hello", "--max-new-tokens", "12")
    answer = server.chat()
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    chunks = list(server.chat(stream=True))
    assert len(chunks) > 3
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "length"


def test_text_completions(server, folder):
    expected = generated(folder, "-p", "the", "--max-new-tokens", "12")
    options = {"model": server.model, "prompt": "the", "max_tokens": 12, "temperature": 0}
    assert server.client.completions.create(**options).choices[0].text == expected
    chunks = server.client.completions.create(**options, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected


def test_concurrent_clients_do_not_disturb_each_other(server):
    prompts = ["hello", "a", "one two three four", "Zebra 9"]
    alone = [server.text(prompt, 20) for prompt in prompts]
    assert len(set(alone)) == len(prompts)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda prompt: server.text(prompt, 20), prompts * 2)) == alone * 2


def test_a_client_that_vanishes_is_given_up(server):
    stream = server.chat(stream=True, max_tokens=ENDLESS)
    for _ in range(3):
        next(stream)
    stream.close()
    assert server.text("hello") == server.text("hello")


def test_a_wrong_model_name_is_refused(server):
    with pytest.raises(openai.BadRequestError, match=r"pinned to .*; requested 'gpt-4'"):
        server.client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert [model.id for model in server.client.models.list()] == [server.model]


def test_impossible_lengths_are_refused(server):
    with pytest.raises(
        openai.BadRequestError, match=r"the prompt has \d+ tokens; prompt and answer may have"
    ):
        server.text("a" * 70_000)
    with pytest.raises(openai.BadRequestError, match="the prompt has"):
        server.chat([{"role": "user", "content": "a" * 70_000}], stream=True)
    options = {"model": server.model, "temperature": 0}
    with pytest.raises(openai.BadRequestError, match="the prompt has no tokens"):
        server.client.completions.create(prompt="", **options)
    with pytest.raises(openai.BadRequestError, match="max_tokens is 0; it must be at least 1"):
        server.client.completions.create(prompt="a", max_tokens=0, **options)
    assert server.text("hello")


def test_an_answer_ends_where_the_cache_ends(server):
    if not server.continuous:
        pytest.skip("only continuous batching has a cache of a given size")
    answer = server.chat([{"role": "user", "content": "a" * (CACHE_TOKENS - 16)}], max_tokens=ENDLESS)
    assert answer.usage.total_tokens == CACHE_TOKENS
    assert answer.choices[0].finish_reason == "length"
    assert server.text("hello")


def test_sampling_is_what_a_request_asks_for(server):
    greedy = server.text("hello", 40)
    if server.continuous:
        for options in ({"temperature": 1.5}, {"top_p": 0.5}, {"frequency_penalty": 1.0}, {"stop": ["a"]}):
            with pytest.raises(openai.BadRequestError, match=r"for all requests, because of --continuous"):
                server.chat(**options)
        return
    sampled = server.chat(max_tokens=40, temperature=1.5, seed=0).choices[0].message.content
    assert sampled != greedy
    assert server.chat(max_tokens=40, temperature=1.5, seed=0).choices[0].message.content == sampled
    assert server.text("hello", 40) == greedy


def test_the_printed_command_works(server):
    command = shlex.split(next(line for line in server.log.splitlines() if line.startswith("curl")))
    assert command[2:5:2] == ["-H", "-d"]
    address, header, body = command[1::2]
    request = urllib.request.Request(address, body.encode(), dict([header.split(": ")]))
    answer = json.load(urllib.request.urlopen(request))
    assert answer["usage"]["completion_tokens"] == 50


def check_that_it_ends(server, number):
    stream = server.chat(stream=True, max_tokens=ENDLESS)
    next(stream)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(server.chat, max_tokens=ENDLESS)
        time.sleep(0.5)
        code, seconds = server.end(number)
        assert code == -number
        assert seconds < GRACE + 10
        assert isinstance(waiting.exception(), openai.APIError)


def test_a_signal_ends_it_while_it_generates(server):
    """The last test that uses `server`."""
    check_that_it_ends(server, signal.SIGTERM if server.continuous else signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "number"),
    [(SINGLE, signal.SIGTERM), (CONTINUOUS, signal.SIGINT)],
    ids=["single", "continuous"],
)
def test_other_signals(folder, tmp_path, options, number):
    with Server(folder, tmp_path / "log", *options) as server:
        check_that_it_ends(server, number)


def test_without_a_chat_template(here, tmp_path):
    client, said = here(write_model(tmp_path, template=None))
    assert "The model has no chat template: /v1/completions works, /v1/chat/completions does not." in said
    assert "/v1/completions -H" in said
    with pytest.raises(openai.BadRequestError, match="the model has no chat template; use /v1/completions"):
        client.chat.completions.create(model=str(tmp_path), messages=HELLO)
    answer = client.completions.create(model=str(tmp_path), prompt="the", max_tokens=5)
    assert answer.usage.completion_tokens == 5


def test_temperature_of_requests_that_name_none(here, folder):
    def answer(client):
        options = {"model": str(folder), "prompt": "the", "max_tokens": 30, "seed": 3}
        return client.completions.create(**options).choices[0].text

    greedy = generated(folder, "-p", "the", "--max-new-tokens", "30")
    assert answer(here(folder)[0]) == greedy
    assert answer(here(folder, "--temperature", "2")[0]) != greedy


def test_endpoints_that_load_and_unload_change_nothing(here, folder):
    client, _ = here(folder)
    assert client.post("/../reset", cast_to=object) == {"status": "ok"}
    options = {"model": str(folder), "prompt": "the", "max_tokens": 5}
    assert client.completions.create(**options).usage.completion_tokens == 5


CALL = '\n{"name": "weather", "arguments": {"city": "Rome"}}\n'
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "the weather", "parameters": {}}}
]
TOOL_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


def write_model_that_calls(path):
    """A Qwen2 that writes one call of a tool: each token decides the next one, through the output layer alone."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", CALL])
    tokenizer.chat_template = TOOL_TEMPLATE
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=len(tokenizer), eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    chain = tokenizer.convert_tokens_to_ids(["t", "<tool_call>", CALL, "</tool_call>", "<|im_end|>"])
    for token, following in itertools.pairwise(chain):
        model.lm_head.weight.data[following] = model.model.embed_tokens.weight.data[token] * 1000
    silent = lambda name, parts: {  # noqa: E731
        part: tensor * 0 if part == "scales" and name.endswith(("o_proj", "down_proj")) else tensor
        for part, tensor in parts.items()
    }
    write_checkpoint(path, model, change=silent)
    tokenizer.save_pretrained(path)
    return path


def test_tools_are_passed_on(here, tmp_path):
    client, _ = here(write_model_that_calls(tmp_path))
    options = {"model": str(tmp_path), "messages": HELLO, "max_tokens": 20}
    plain = client.chat.completions.create(**options)
    answer = client.chat.completions.create(**options, tools=TOOLS)
    assert answer.usage.prompt_tokens > plain.usage.prompt_tokens
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"city": "Rome"}
    assert answer.choices[0].finish_reason == "tool_calls"
    chunks = list(client.chat.completions.create(**options, tools=TOOLS, stream=True))
    (streamed,) = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert json.loads(streamed.function.arguments) == {"city": "Rome"}


def refused(*arguments):
    return CliRunner().invoke(app, ["serve", *map(str, arguments), "--device", "cpu"]).exception


def test_errors_before_the_model_is_loaded(tmp_path, folder, monkeypatch):
    port = ("--port", free_port())
    error = refused(tmp_path / "none", *port)
    assert isinstance(error, CheckpointError)
    assert "none is neither a folder" in str(error)
    error = refused(save_tiny(tmp_path / "dense"), *port)
    assert isinstance(error, CheckpointError)
    assert "is not a quantized checkpoint" in str(error)
    with socket.create_server(("127.0.0.1", 0)) as other:
        error = refused(folder, "--port", other.getsockname()[1])
    assert isinstance(error, ConfigError)
    assert "Address already in use; choose others with --host and --port" in str(error)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "fastapi" else name)
    error = refused(folder, *port)
    assert isinstance(error, DependencyError)
    assert str(error) == "serving needs fastapi: pip install 'transformers[serving]' psutil"
    monkeypatch.undo()
    monkeypatch.setattr("transformers.__version__", "5.1.0")
    assert "serving needs transformers 5.24 or newer, 5.1.0 is installed" in str(refused(folder, *port))


def test_models_that_cannot_be_served(tmp_path):
    write_checkpoint(tmp_path / "t5", t5())
    error = refused(tmp_path / "t5", "--port", free_port())
    assert isinstance(error, ModelError)
    assert "is an encoder and a decoder" in str(error)
    write_checkpoint(tmp_path, llama())
    error = refused(tmp_path, "--port", free_port())
    assert isinstance(error, ModelError)
    assert "has no tokenizer that can be loaded" in str(error)
