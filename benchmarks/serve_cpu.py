"""Many requests at once on this CPU: tokens/s of OpenAI-compatible servers, all alive in one run, taking turns.

    python benchmarks/serve_cpu.py --results serve.json [--threads 2] [--rounds 5] [--requests 1,4,16,64]
        [--llama-python PYTHON] [--only REGEX]
    python benchmarks/serve_cpu.py --results serve.json --table [--processor-time]

`fewbit serve` with the model in 4 bits, groups of 32, is compared with `transformers serve` and the model in
bfloat16, each with and without continuous batching, and with llama.cpp and the same weights as Q4_0 (`fewbit
export`, exact). Prompts are pieces of Wikipedia of unequal length. The numbers of new tokens are unequal too,
and the end of a text is ignored. All requests of a round are sent at once. Servers answer the openai client
through HTTP. llama.cpp runs in a process of its own (`llama_cpp_batches.py`), without HTTP. tokens/s are new
tokens divided by the time until the last answer is complete.

On a machine that is busy with other work, run it with one thread and take the table with --processor-time: new tokens
divided by the seconds that the server's process computed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prepare

BASE = "transformers bfloat16"
BATCHED = ", continuous batching"
CACHE_TOKENS = 16384
# Servers without batches answer one request after another: more of them take longer, at the same rate.
ENOUGH_WITHOUT_BATCHES = 4
PROMPT_TOKENS, NEW_TOKENS = (16, 128), (8, 40)
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Request:
    """One request: a prompt as text and as token ids, and how many tokens to generate."""

    text: str
    ids: list[int]
    new_tokens: int


class HttpServer:
    """A server in a process of its own, asked with the openai client."""

    def __init__(self, command: list[str], model: str, threads: int, log: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._url, self._model = f"http://127.0.0.1:{port}", model
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(port)],
                stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )  # fmt: skip
        self.pid = self._process.pid
        self._wait(log)

    def _wait(self, log: Path) -> None:
        for _ in range(600):
            if self._process.poll() is not None:
                raise SystemExit(f"a server ended; see {log}")
            try:
                urllib.request.urlopen(f"{self._url}/health", timeout=5)
                return
            except (urllib.error.URLError, TimeoutError):
                time.sleep(0.5)
        raise SystemExit(f"a server does not answer; see {log}")

    def answer(self, requests: list[Request]) -> dict[str, float]:
        """Send all requests at once; returns the time until the last answer, and the number of new tokens."""
        return asyncio.run(self._answer(requests))

    async def _answer(self, requests: list[Request]) -> dict[str, float]:
        import openai

        async with openai.AsyncOpenAI(
            base_url=f"{self._url}/v1", api_key="none", timeout=3600, max_retries=0
        ) as client:
            started = time.perf_counter()
            answers = await asyncio.gather(*(self._one(client, request) for request in requests))
            return {"seconds": time.perf_counter() - started, "tokens": sum(answers)}

    async def _one(self, client: Any, request: Request) -> int:
        # An end-of-text token that does not exist. Padding is not used, but asked for in the log.
        generation = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
        answer = await client.completions.create(
            model=self._model,
            prompt=request.text,
            max_tokens=request.new_tokens,
            extra_body={"generation_config": json.dumps(generation)},
        )
        return int(answer.usage.completion_tokens)

    def close(self) -> None:
        self._process.kill()  # transformers' server may wait long for a client before it ends
        self._process.wait()


class LlamaCpp:
    """llama.cpp in a process of its own, asked through its standard input."""

    def __init__(self, python: str, gguf: Path, threads: int, log: Path) -> None:
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [python, str(HERE / "llama_cpp_batches.py"), str(gguf), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip
        self.pid = self._process.pid
        if self._read() != "ready":
            raise SystemExit(f"llama.cpp did not start; see {log}")

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"llama.cpp ended; see {self._log.name}")
        return json.loads(line)

    def answer(self, requests: list[Request]) -> dict[str, float]:
        """As `HttpServer.answer`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([[r.ids, r.new_tokens] for r in requests]) + "\n")
        self._process.stdin.flush()
        result: dict[str, float] = self._read()
        return result

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._log.close()


def make_models(model: Path, folder: Path) -> tuple[Path, Path]:
    """The model in 4 bits as a GPTQ checkpoint, and the same weights as a GGUF file.

    Rounded to nearest: only the speed is measured.
    """
    import fewbit

    checkpoint, gguf = folder / "4bit", folder / "q4_0.gguf"
    if not (checkpoint / "config.json").exists():
        fewbit.quantize(
            str(model), fewbit.QuantConfig(bits=4, group_size=32, method="rtn"), output=str(checkpoint)
        )
    if not gguf.exists():
        fewbit.export(checkpoint, gguf, to="gguf")
    return checkpoint, gguf


def make_requests(count: int, round_: int, tokenizer: Any, text: str) -> list[Request]:
    """`count` requests; another round has others, and every server gets the same."""
    generator = random.Random(1000 * round_ + count)
    requests = []
    for _ in range(count):
        start = generator.randrange(len(text) - 4000)
        ids = tokenizer(text[start : start + 4000])["input_ids"][: generator.randint(*PROMPT_TOKENS)]
        requests.append(Request(tokenizer.decode(ids), ids, generator.randint(*NEW_TOKENS)))
    return requests


def start(arguments: argparse.Namespace) -> dict[str, HttpServer | LlamaCpp]:
    """Start everything that is asked for."""
    checkpoint, gguf = make_models(arguments.model, arguments.folder)
    threads, folder = arguments.threads, arguments.folder
    fewbit = [sys.executable, "-m", "fewbit", "serve", str(checkpoint), "--device", "cpu"]
    dense = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(arguments.model)]
    dense += ["--device", "cpu", "--dtype", "bfloat16"]
    commands = {
        BASE: (dense, str(arguments.model)),
        "fewbit 4 bits": (fewbit, str(checkpoint)),
        BASE + BATCHED: (
            dense + f"--continuous-batching --cb-num-blocks {CACHE_TOKENS // 256}".split(),
            str(arguments.model),
        ),
        "fewbit 4 bits" + BATCHED: (
            fewbit + f"--continuous-batching --cache-tokens {CACHE_TOKENS}".split(),
            str(checkpoint),
        ),
    }
    wanted = [name for name in commands if name == BASE or re.search(arguments.only, name)]
    servers: dict[str, HttpServer | LlamaCpp] = {
        name: HttpServer(*commands[name], threads, folder / f"server{index}.log")
        for index, name in enumerate(wanted)
    }
    if arguments.llama_python:
        servers["llama.cpp Q4_0"] = LlamaCpp(arguments.llama_python, gguf, threads, folder / "llama.log")
    return servers


def measure(arguments: argparse.Namespace) -> None:
    """Write number of requests → name → tokens per second, and per second of processor time, of each round."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = prepare.TEST.read_text(encoding="utf-8")
    servers = start(arguments)
    found: dict[str, dict[str, list[list[float]]]] = {}
    try:
        for server in servers.values():
            server.answer(make_requests(2, 0, tokenizer, text))
        for round_ in range(1, arguments.rounds + 1):
            for count in arguments.requests:
                requests = make_requests(count, round_, tokenizer, text)
                for name, server in servers.items():
                    batched = name.endswith(BATCHED) or isinstance(server, LlamaCpp)
                    rates = rates_of(name, server, requests[: None if batched else ENOUGH_WITHOUT_BATCHES])
                    found.setdefault(str(count), {}).setdefault(name, []).append(rates)
                    print(f"round {round_}, {count} requests, {name}: {rates[0]:.1f} tokens/s", flush=True)
                results = {"threads": arguments.threads, "rates": found}
                arguments.results.write_text(json.dumps(results, indent=1), encoding="utf-8")
    finally:
        for server in servers.values():
            server.close()


def rates_of(name: str, server: HttpServer | LlamaCpp, requests: list[Request]) -> list[float]:
    """Tokens per second, and per second of processor time."""
    before = processor_seconds(server.pid)
    result = server.answer(requests)
    expected = sum(request.new_tokens for request in requests)
    if result["tokens"] != expected:
        raise SystemExit(f"{name} made {result['tokens']} tokens instead of {expected}")
    return [expected / result["seconds"], expected / (processor_seconds(server.pid) - before)]


def processor_seconds(pid: int) -> float:
    import psutil

    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def table(results: dict[str, Any], processor_time: bool) -> str:
    """Markdown: medians of the ratios to `BASE` of the same round and number of requests, with their range."""
    rates = {
        count: {name: [rate[processor_time] for rate in rounds] for name, rounds in by_name.items()}
        for count, by_name in results["rates"].items()
    }
    names = list(dict.fromkeys(name for by_name in rates.values() for name in by_name))
    lines = ["| | " + " | ".join(f"{count} request{'s'[: count != '1']}" for count in rates) + " |"]
    lines.append("|---" * (len(rates) + 1) + "|")
    for name in names:
        cells = [_cell(name, by_name) for by_name in rates.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(name: str, rates: dict[str, list[float]]) -> str:
    if name == BASE:
        return f"1× ({statistics.median(rates[BASE]):.1f} tokens/s)"
    ratios = [rate / base for rate, base in zip(rates[name], rates[BASE], strict=True)]
    return f"{statistics.median(ratios):.2f}× ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="print the table of former results")
    parser.add_argument("--processor-time", action="store_true", help="in the table, instead of the clock's")
    parser.add_argument("--model", type=Path, default=prepare.MODEL)
    parser.add_argument("--folder", type=Path, default=Path("serve-models"), help="for models and logs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--requests", type=lambda text: [int(n) for n in text.split(",")], default=[1, 4, 16, 64]
    )
    parser.add_argument("--only", default="", help="regular expression of servers")
    parser.add_argument("--llama-python", help="a Python that has llama-cpp-python")
    arguments = parser.parse_args()
    if not arguments.table:
        prepare.ensure()
        arguments.folder.mkdir(parents=True, exist_ok=True)
        measure(arguments)
    results = json.loads(arguments.results.read_text(encoding="utf-8"))
    print(table(results, arguments.processor_time))


if __name__ == "__main__":
    main()
