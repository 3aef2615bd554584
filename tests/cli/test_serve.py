"""`fewbit serve`, asked with the openai client. Each server is a process of its own."""

import json
import os
import re
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
from transformers import Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from fewbit.cli.main import app
from fewbit.errors import CheckpointError, ConfigError, DependencyError, ModelError
from fewbit.hf.server import GRACE
from models import VOCAB, save_tiny, tiny_tokenizer
from tiny_gptq import llama, write_checkpoint

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}a: "
HELLO = [{"role": "user", "content": "hello"}]
ENDLESS = 1_000_000  # tokens that no test waits for


class Server:
    """A running `fewbit serve`, and a client of it."""

    def __init__(self, folder, log, *options):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "fewbit", "serve", str(folder), "--port", str(self.port)]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, "--device", "cpu", "--dtype", "float32", *options], stdout=file, stderr=file
            )
        self.model, self._log = str(folder), log
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=30
        )
        self.wait_for("Uvicorn running")

    @property
    def log(self):
        return self._log.read_text()

    def wait_for(self, words, seconds=60):
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
        return self.process.wait(30), time.monotonic() - started

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama that never ends its text, with a chat template."""
    path = tmp_path_factory.mktemp("served")
    model = llama(vocab_size=VOCAB)
    model.lm_head.weight.data[model.config.eos_token_id] = 0
    write_checkpoint(path, model)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=[(), ("--continuous-batching",)], ids=["single", "continuous"])
def server(request, folder, tmp_path_factory):
    with Server(folder, tmp_path_factory.mktemp("log") / "log", *request.param) as running:
        yield running


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


@pytest.mark.parametrize("options", [(), ("--continuous-batching",)], ids=["single", "continuous"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_signals_end_it_while_it_generates(folder, tmp_path, number, options):
    with Server(folder, tmp_path / "log", *options) as server, ThreadPoolExecutor() as pool:
        stream = server.chat(stream=True, max_tokens=ENDLESS)
        next(stream)
        waiting = pool.submit(server.chat, max_tokens=ENDLESS)
        time.sleep(0.5)
        code, seconds = server.end(number)
        assert code == -number
        assert seconds < GRACE + 5
        assert isinstance(waiting.exception(), openai.APIError)
