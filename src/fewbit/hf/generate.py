"""Text generation with transformers' ``generate``, in less time per token and with the same tokens.

fewbit adds ``torch.inference_mode``, because autograd bookkeeping is costly for custom operators, and a key-value cache
that is allocated once and written in place (`PreallocatedCache`).

    generation = generate(model, tokenizer(["Once"], return_tensors="pt"), max_new_tokens=200)
    print(tokenizer.decode(generation.tokens[0]), generation.decode_rate)
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from .. import transformers_internals
from ..transformers_internals import DynamicLayer

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class Generation:
    """Generated tokens and timings.

    Attributes:
        tokens: the new tokens of every prompt, up to and including its end token.
        prompt_tokens: length of the longest prompt; the others are padded to it.
        steps: number of forward passes, which is the number of new tokens of the longest text.
        prefill_seconds: time to the first new token.
        decode_seconds: time from the first new token to the last.
        cache: "preallocated", or "transformers' own" with the reason.
    """

    tokens: list[list[int]]
    prompt_tokens: int
    steps: int
    prefill_seconds: float
    decode_seconds: float
    cache: str

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first token, summed over all prompts."""
        return (self.steps - 1) * len(self.tokens) / self.decode_seconds if self.steps > 1 else 0.0


def generate(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    max_new_tokens: int,
    *,
    streamer: BaseStreamer | None = None,
    **options: Any,
) -> Generation:
    """Continue every row of ``inputs["input_ids"]``.

    Args:
        model: a transformers model, quantized or not.
        inputs: the output of its tokenizer; several prompts are padded on the left and have an attention mask.
        max_new_tokens: maximum number of new tokens per prompt.
        streamer: gets the prompts, then one token per prompt and step.
        options: arguments of transformers' ``generate``, such as ``do_sample``, ``temperature`` and ``eos_token_id``.
    """
    prompts = inputs["input_ids"]
    cache, reason = preallocated_cache(model, prompts.shape[1] + max_new_tokens)
    if cache is not None:
        options = {transformers_internals.cache_argument(model): cache, **options}
    clock = Clock()
    start = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            stopping_criteria=[clock],
            **options,
        )
    first = clock.times[0]
    begin = 1 if model.config.is_encoder_decoder else prompts.shape[1]
    return Generation(
        tokens=[_until_end(row, model, options) for row in output[:, begin:].tolist()],
        prompt_tokens=prompts.shape[1],
        steps=output.shape[1] - begin,
        prefill_seconds=first - start,
        decode_seconds=clock.times[-1] - first,
        cache=f"transformers' own: {reason}" if reason else "preallocated",
    )


class Clock:
    """A stopping criterion that never stops and records the time of every token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _until_end(row: list[int], model: PreTrainedModel, options: Mapping[str, Any]) -> list[int]:
    ends = options.get("eos_token_id", model.generation_config.eos_token_id)
    ends = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
    last = next((i for i, token in enumerate(row) if token in ends), len(row))
    return row[: last + 1]


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one block, (batch, heads, capacity, head size), with the first `length` tokens filled.

    transformers' own layer concatenates, so every token copies all keys and values. This one returns views with the
    same numbers.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._buffers = [_buffer(states, self.capacity) for states in (key_states, value_states)]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[-2]
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self._buffers)
        self.keys[:, :, start:] = key_states
        self.values[:, :, start:] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length


def _buffer(states: Tensor, capacity: int) -> Tensor:
    batch, heads, _, size = states.shape
    return torch.zeros((batch, heads, capacity, size), dtype=states.dtype, device=states.device)


class PreallocatedCache(Cache):  # type: ignore[misc]
    """One `PreallocatedLayer` per block."""

    def __init__(self, blocks: int, capacity: int) -> None:
        super().__init__(layers=[PreallocatedLayer(capacity) for _ in range(blocks)])


def preallocated_cache(model: PreTrainedModel, capacity: int) -> tuple[PreallocatedCache | None, str]:
    """Return a cache for `capacity` tokens, or None and the reason why this model keeps transformers' own cache."""
    if model.config.is_encoder_decoder:
        return None, "the model is an encoder and a decoder"
    if model.generation_config.cache_implementation is not None or not model.generation_config.use_cache:
        return None, "the model's generation_config.json asks for a cache of its own"
    layers = DynamicCache(config=model.config).layers
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return None, "not all blocks of the model attend to the whole text"
    return PreallocatedCache(len(layers), capacity), ""
