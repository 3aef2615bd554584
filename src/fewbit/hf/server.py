"""`run`: transformers' own OpenAI-compatible server, for one model that is loaded already.

What a client sees is transformers': endpoints, chat templates, streaming, tool calls, batching. fewbit's part is the
model, an error for what it cannot do before the work begins, and that the server ends in time.
"""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as AnyHTTPException
from transformers import GenerationConfig, PreTrainedModel
from transformers.cli.serve import Serve

from ..transformers_internals import on_messages, pin_served_model, wrap_generation
from .blocks import SEQLEN_KEYS

# Seconds that answers may still take after SIGTERM or Ctrl-C.
GRACE = 2


class _Server(Serve):  # type: ignore[misc]
    """Serves a given model, and does not wait for long answers when it is told to end."""

    def __init__(
        self, name: str, model: PreTrainedModel, processor: Any, limit: float, **options: Any
    ) -> None:
        self._served, self._limit = (name, model, processor), limit
        # With `non_blocking`, transformers calls `start_server` at the end, instead of running at once.
        super().__init__(non_blocking=True, **options)

    def start_server(self) -> None:
        """Serve in this thread until a signal comes."""
        pin_served_model(self, *self._served)
        wrap_generation(self, lambda manager: _Careful(manager, self._limit))
        if not self._served[2].chat_template:
            on_messages(self, _refuse_chat)
        self.server.config.app.add_exception_handler(AnyHTTPException, _openai_error)
        self.server.config.timeout_graceful_shutdown = GRACE
        # uvicorn ends with the signal that it got. Python's own handler would then wait for transformers' threads,
        # which generate on.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        self.server.run()


class _Careful:
    """A generation manager of transformers that answers what can be answered, and refuses the rest.

    transformers' own generates beyond the model's context, samples only where generation_config.json says so, and with
    continuous batching takes all settings but the length from the first request; one request larger than the cache
    ends all others.
    """

    def __init__(self, manager: Any, limit: float) -> None:
        self._manager, self._limit = manager, limit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def init_cb(self, model: PreTrainedModel, gen_config: Any) -> None:
        """Prepare continuous batching, for requests that are all sampled alike."""
        shared = copy.deepcopy(model.generation_config)
        for name, value in _SHARED.items():
            if value(gen_config) != value(shared):
                raise HTTPException(
                    400, f"{name} is {value(shared)} for all requests, because of --continuous-batching"
                )
        shared.use_cache = False
        self._manager.init_cb(model, shared)

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, **more: Any
    ) -> Any:
        self._prepare(inputs, gen_config)
        return self._manager.generate_streaming(model, processor, inputs, gen_config, **more)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, **more: Any
    ) -> Any:
        self._prepare(inputs, gen_config)
        return await self._manager.generate_non_streaming(model, processor, inputs, gen_config, **more)

    def _prepare(self, inputs: Any, gen_config: Any) -> None:
        """Refuse impossible lengths, end the answer where the context ends, and sample if that is asked for."""
        ids = inputs["input_ids"]
        length = len(ids) if isinstance(ids, list) else ids.shape[-1]
        space = self._limit - length
        if space < 1:
            raise HTTPException(
                400, f"the prompt has {length} tokens; prompt and answer may have {self._limit} here"
            )
        if length < 1:
            raise HTTPException(400, "the prompt has no tokens")
        if gen_config.max_new_tokens is not None and gen_config.max_new_tokens < 1:
            raise HTTPException(400, f"max_tokens is {gen_config.max_new_tokens}; it must be at least 1")
        if gen_config.max_new_tokens is None or gen_config.max_new_tokens > space:
            gen_config.max_new_tokens = space
        _set_temperature(gen_config, _temperature(gen_config))


def _temperature(config: GenerationConfig) -> float:
    """The temperature that is meant; 0: always the likeliest token."""
    if config.temperature is None:
        return 1.0 if config.do_sample else 0.0
    return float(config.temperature)


def _set_temperature(config: GenerationConfig, value: float) -> None:
    config.do_sample, config.temperature = value > 0, value or None


# With continuous batching the same for all requests, under the names that clients use.
_SHARED: dict[str, Callable[[GenerationConfig], Any]] = {
    "temperature": _temperature,
    "top_p": lambda config: config.top_p or 1.0,
    "frequency_penalty": lambda config: (config.repetition_penalty or 1.0) - 1.0,
    "logit_bias": lambda config: config.sequence_bias or None,
    "stop": lambda config: config.stop_strings or None,
}


def _openai_error(_: Any, error: AnyHTTPException) -> JSONResponse:
    """An error in the form in which OpenAI clients find its reason."""
    body = {"message": str(error.detail), "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": body}, error.status_code)


def _refuse_chat(*_: Any) -> None:
    raise HTTPException(400, "the model has no chat template; use /v1/completions")


def run(
    name: str,
    model: PreTrainedModel,
    processor: Any,
    *,
    temperature: float | None = None,
    cache_tokens: int | None = None,
    **options: Any,
) -> None:
    """Serve until SIGTERM or Ctrl-C; the process ends by that signal.

    Args:
        name: what clients call the model.
        model: from `fewbit.load`.
        processor: its tokenizer, or a processor for images and audio.
        temperature: where a request does not say; None: as generation_config.json says.
        cache_tokens: size of the paged cache, with continuous batching.
        options: of transformers' ``Serve``: host, port and so on.
    """
    default = model.generation_config
    _set_temperature(default, _temperature(default) if temperature is None else temperature)
    config = model.config.get_text_config()
    lengths = [getattr(config, key, None) for key in SEQLEN_KEYS]
    limit = min([length for length in (*lengths, cache_tokens) if length], default=float("inf"))
    _Server(name, model, processor, limit, **options)
