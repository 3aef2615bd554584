"""``fewbit serve``: a quantized checkpoint behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
import socket
from typing import Annotated, Any

import typer

from ..errors import ConfigError, DependencyError, ModelError
from .display import console, examples, quiet_libraries
from .options import ActivationDtype, Device, Fuse, KernelName, LmHeadRuntime, TrustRemoteCode, head_bits

# What transformers' server imports; its release is in pyproject.toml too.
_PACKAGES = ("fastapi", "uvicorn", "openai", "pydantic", "psutil")
_TRANSFORMERS = "5.24"

_BLOCK = 256  # tokens in a block of transformers' paged cache
# Tokens of a forward pass of all requests. transformers' 8192 would keep running answers waiting for long prompts.
_BATCH_TOKENS = 512


@examples(
    "fewbit serve ./SmolLM2-135M-4bit",
    "fewbit serve ./SmolLM2-135M-4bit --port 8080 --continuous-batching",
)
def serve(
    checkpoint: Annotated[str, typer.Argument(help="A quantized checkpoint: a folder or a Hub id.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0: every network, without a password.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    continuous_batching: Annotated[
        bool,
        typer.Option("--continuous-batching", help="Answer several requests at once, not one after another."),
    ] = False,
    cache_tokens: Annotated[
        int, typer.Option(min=512, help="With --continuous-batching: tokens of all requests in progress.")
    ] = 16384,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, help="Where a request has none; 0: the likeliest token. Else the model's."),
    ] = None,
    enable_cors: Annotated[
        bool, typer.Option("--enable-cors", help="Let web pages of other origins use it.")
    ] = False,
    device: Device = "auto",
    dtype: ActivationDtype = "auto",
    kernel: KernelName = "auto",
    fuse: Fuse = True,
    lm_head_runtime: LmHeadRuntime = "auto",
    trust_remote_code: TrustRemoteCode = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Also what transformers logs.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only errors.")] = False,
) -> None:
    """Serve a quantized checkpoint to OpenAI clients, with transformers' own server.

    Chat and text completions, streamed or not. Ctrl-C or SIGTERM ends it.
    """
    _check_installed()
    _check_port(host, port)
    from transformers import AutoProcessor

    from ..context import resolve_device
    from ..hf.load import kernels, load
    from ..hf.prompts import load_tokenizer
    from ..hf.server import run

    quiet_libraries()
    where = resolve_device(device)
    wanted = "bfloat16" if dtype == "auto" and where.type == "cpu" else dtype
    faster: dict[str, Any] = {"fuse": fuse, "lm_head_runtime": head_bits(lm_head_runtime)}
    model = load(checkpoint, where, wanted, kernel, trust_remote_code, **faster)
    if not model.can_generate():
        raise ModelError(f"{checkpoint} is a {type(model).__name__}, which cannot generate text")
    if model.config.is_encoder_decoder:
        raise ModelError(
            f"{checkpoint} is an encoder and a decoder, which transformers' server does not serve"
        )
    processor = load_tokenizer(checkpoint, trust_remote_code, AutoProcessor)
    if not quiet:
        dtype_name = str(model.dtype).removeprefix("torch.")
        console.print(f"{type(model).__name__} on {where} in {dtype_name}", highlight=False)
        for line in (*kernels(model), *_how_to_use(checkpoint, host, port, bool(processor.chat_template))):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    options: dict[str, Any] = {"host": host, "port": port, "enable_cors": enable_cors, "device": str(where)}
    options["log_level"] = "error" if quiet else "info" if verbose else "warning"
    if continuous_batching:
        blocks = math.ceil(cache_tokens / _BLOCK)
        options |= {"continuous_batching": True, "cb_num_blocks": blocks, "cache_tokens": blocks * _BLOCK}
        options["cb_max_batch_tokens"] = _BATCH_TOKENS
    run(checkpoint, model, processor, temperature=temperature, **options)


def _how_to_use(name: str, host: str, port: int, chat: bool) -> list[str]:
    """Where the endpoint is, and a command that works."""
    reachable = "127.0.0.1" if host == "0.0.0.0" else f"[{host}]" if ":" in host else host
    url = f"http://{reachable}:{port}/v1"
    body: dict[str, Any] = {"model": name, "max_tokens": 50}
    if chat:
        path, body["messages"] = "chat/completions", [{"role": "user", "content": "Name three rivers."}]
    else:
        path, body["prompt"] = "completions", "The capital of France is"
    command = ["curl", f"{url}/{path}", "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    lines = [f"OpenAI endpoint {url}, model {name}", shlex.join(command)]
    if not chat:
        lines.append("The model has no chat template: /v1/completions works, /v1/chat/completions does not.")
    return lines


def _check_installed() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise DependencyError(
            f"serving needs {', '.join(missing)}: pip install 'transformers[serving]' psutil"
        )
    import transformers
    from packaging.version import Version

    if Version(transformers.__version__) < Version(_TRANSFORMERS):
        raise DependencyError(
            f"serving needs transformers {_TRANSFORMERS} or newer, {transformers.__version__} is installed: "
            "pip install 'transformers[serving]'"
        )


def _check_port(host: str, port: int) -> None:
    """Refuse an address that is in use or not this machine's, before the model is loaded."""
    version = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=version).close()
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0]
        raise ConfigError(
            f"cannot listen on {host}, port {port}: {reason}; choose others with --host and --port"
        ) from error
