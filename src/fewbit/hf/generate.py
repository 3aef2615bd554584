"""Text from a model, with the tokens that transformers' ``generate`` gives, in less time per token.

Sampling, stopping and masks are transformers' own. What is added around its ``generate``:

- no autograd bookkeeping at all (``torch.inference_mode``), which custom operators feel most;
- a cache with room for the whole text, written in place (`cache`);
- the step of one token compiled, where that wins the time back (`compiled`): in models loaded without ``fuse=True``.

    generation = generate(model, tokenizer(["Once"], return_tensors="pt"), max_new_tokens=200)
    print(tokenizer.decode(generation.tokens[0]), generation.decode_rate)
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.cpu.fused_ops import ATTENTION
from .compiled import CompiledModel, compiled_model
from .static_cache import ReservedCache, reserved_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.generation.streamers import BaseStreamer

# Compiling takes about 1.4 s per block, and saves about 0.1 ms per block and token (docs/performance.md).
COMPILE_FROM = 14_000


@dataclass(frozen=True)
class Generation:
    """What was written, and what it took.

    Attributes:
        tokens: the new tokens of every prompt, up to and including the one that ended it.
        prompt_tokens: length of the longest prompt, which the others are padded to.
        steps: tokens that were computed for every prompt.
        prefill_seconds: until the first new token.
        decode_seconds: from there to the last, without compiling.
        compile_seconds: 0.0 where nothing was compiled, or it had been before.
        method: how tokens after the first were computed, and why not otherwise.
    """

    tokens: list[list[int]]
    prompt_tokens: int
    steps: int
    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float
    method: str

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first, over all prompts."""
        return (self.steps - 1) * len(self.tokens) / self.decode_seconds if self.steps > 1 else 0.0


def generate(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    max_new_tokens: int,
    *,
    compile: bool | None = None,
    streamer: BaseStreamer | None = None,
    **options: Any,
) -> Generation:
    """Continue every row of ``inputs["input_ids"]``.

    Args:
        model: of transformers, quantized or not.
        inputs: what its tokenizer returns; several prompts are padded on the left, with an attention mask.
        max_new_tokens: at most so many for each prompt.
        compile: compile the step of one token; None: from `COMPILE_FROM` tokens on, if the model is not fused.
        streamer: gets the prompts, then one token per prompt at a time.
        options: for transformers' ``generate``: ``do_sample``, ``temperature``, ``eos_token_id`` and so on.

    A model that cannot be compiled runs as it is; `Generation.method` says why.
    """
    prompts = inputs["input_ids"]
    cache, no_cache = reserved_cache(model, prompts.shape[1] + max_new_tokens)
    compiled, why_not = _compiled(model, cache, no_cache, compile, max_new_tokens)
    clock = Clock()
    if cache is not None:
        options = {"past_key_values": cache, **options}
    with torch.inference_mode(), compiled or nullcontext():
        start = time.perf_counter()
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            stopping_criteria=[clock],
            **options,
        )
    first = clock.times[0]
    compiling = compiled.seconds if compiled else 0.0
    begin = 1 if model.config.is_encoder_decoder else prompts.shape[1]
    why_not = compiled.why_not if compiled else why_not
    return Generation(
        tokens=[_until_end(row, model, options) for row in output[:, begin:].tolist()],
        prompt_tokens=prompts.shape[1],
        steps=output.shape[1] - begin,
        prefill_seconds=first - start,
        decode_seconds=clock.times[-1] - first - compiling,
        compile_seconds=compiling,
        method=f"not compiled: {why_not}" if why_not else "compiled",
    )


def _compiled(
    model: PreTrainedModel, cache: ReservedCache | None, no_cache: str, compile: bool | None, tokens: int
) -> tuple[CompiledModel | None, str]:
    """The model to be compiled, or None and the reason."""
    if compile is False:
        return None, "not asked for"
    if cache is None:
        return None, no_cache
    if compile is None and model.config._attn_implementation == ATTENTION:
        return None, "its steps are fused, which is faster"
    if compile is None and tokens < COMPILE_FROM:
        return None, f"it would pay from about {COMPILE_FROM:,} tokens on"
    return compiled_model(model)


class Clock:
    """A stopping criterion that stops nothing, and notes when each token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Go on, for every text."""
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def end_tokens(model: PreTrainedModel, options: Mapping[str, Any]) -> set[int]:
    """The tokens that end a text."""
    ends = options.get("eos_token_id", model.generation_config.eos_token_id)
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def _until_end(row: list[int], model: PreTrainedModel, options: Mapping[str, Any]) -> list[int]:
    ends = end_tokens(model, options)
    last = next((i for i, token in enumerate(row) if token in ends), len(row))
    return row[: last + 1]
