"""One model in a separate process, timed on request: ``python -m fewbit.bench.worker``.

A request is a line of JSON on stdin, its answer a line of JSON on stdout; all other output goes to stderr. Memory and
load time then belong to this model alone, and several such processes can take turns.

    {"do": "load", "model": PATH, "device": "cpu", "dtype": "bfloat16", "kernel": NAME or null, "threads": N,
     "options": {}}
        → {"seconds", "kernels": [lines], "memory_bytes"}       kernel null: not quantized, through transformers;
                                                                options: for `fewbit.load` or `open_source`
    {"do": "prefill", "tokens": N} → {"seconds"}                one pass over N tokens
    {"do": "decode", "tokens": N} → {"seconds", "tokens"}       tokens after the first, after a prompt of 16
    {"do": "memory"} → {"peak_bytes"}

A request that fails with a `FewbitError` gets the answer ``{"error": message}``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from ..config import Dtype
from ..errors import FewbitError
from ..profiling import memory_in_use_bytes, peak_memory_bytes

_PROMPT = 16


class Worker:
    """A loaded model, and the answers to requests about it."""

    def __init__(self) -> None:
        self._model: Any = None
        self._quantized = False

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request."""
        actions: dict[str, Callable[..., dict[str, Any]]] = {
            "load": self._load,
            "prefill": self._prefill,
            "decode": self._decode,
            "memory": self._memory,
        }
        return actions[request.pop("do")](**request)

    def _load(
        self, model: str, device: str, dtype: Dtype, kernel: str | None, threads: int, options: dict[str, Any]
    ) -> dict[str, Any]:
        from ..hf.load import kernels, load
        from ..modeling.source import open_source

        torch.set_num_threads(threads)
        start = time.perf_counter()
        if kernel is None:
            source = open_source(model, **options)
            self._model = source.load_model(dtype, torch.device(device))
        else:
            self._model = load(model, device, dtype, kernel, **options)
            self._quantized = True
        self._synchronize()
        seconds = time.perf_counter() - start
        lines = kernels(self._model) if self._quantized else ["transformers"]
        return {"seconds": seconds, "kernels": lines, "memory_bytes": self._memory_in_use()}

    def _prefill(self, tokens: int) -> dict[str, Any]:
        ids = self._tokens(tokens)
        with torch.inference_mode():
            self._synchronize()
            start = time.perf_counter()
            self._model(input_ids=ids, use_cache=True, logits_to_keep=1)
            self._synchronize()
            return {"seconds": time.perf_counter() - start}

    def _decode(self, tokens: int) -> dict[str, Any]:
        """Run the original with transformers' `generate`, as its users do, and a quantized model with fewbit's."""
        from ..hf.generate import Clock, generate

        # The model cannot choose this end token, so every run generates the same number of tokens.
        options: dict[str, Any] = {"do_sample": False, "eos_token_id": self._vocabulary(), "pad_token_id": 0}
        ids = self._tokens(_PROMPT)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self._quantized:
            generation = generate(self._model, inputs, tokens + 1, **options)
            return {"seconds": generation.decode_seconds, "tokens": generation.steps - 1}
        clock = Clock()
        self._model.generate(**inputs, max_new_tokens=tokens + 1, stopping_criteria=[clock], **options)
        return {"seconds": clock.times[-1] - clock.times[0], "tokens": len(clock.times) - 1}

    def _memory(self) -> dict[str, Any]:
        on_gpu = self._model.device.type == "cuda"
        return {"peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_memory_bytes()}

    def _memory_in_use(self) -> int:
        on_gpu = self._model.device.type == "cuda"
        return torch.cuda.memory_allocated() if on_gpu else memory_in_use_bytes()

    def _synchronize(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize()

    def _vocabulary(self) -> int:
        return int(self._model.get_input_embeddings().weight.shape[0])

    def _tokens(self, count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(count)
        return torch.randint(self._vocabulary(), (1, count), generator=generator).to(self._model.device)


def main() -> None:
    """Answer requests until stdin ends."""
    from transformers.utils import logging as transformers_logging

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries on stdout must not be read as an answer
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("fewbit").setLevel(logging.ERROR)
    worker = Worker()
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except FewbitError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
