"""GPTQModel behind the protocol of `fewbit.bench.worker`, in an environment of its own.

    GPTQMODEL-PYTHON benchmarks/gptqmodel_worker.py

"kernel" is the name of one of its backends, for example auto, gptq_torch_cpu_avx512 or gptq_torch. Decoding goes
through transformers' ``generate``, as its users do. Imports nothing from fewbit.
"""

from __future__ import annotations

import os
import resource
import time
from collections import Counter
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from worker_protocol import answer_requests, resident_bytes

_PROMPT = 16


class Clock:
    """A stopping criterion that stops nothing, and notes when each token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Worker:
    model: Any = None

    def load(
        self, model: str, device: str, dtype: str, kernel: str, threads: int, options: dict[str, Any]
    ) -> dict[str, Any]:
        from gptqmodel import BACKEND, GPTQModel

        torch.set_num_threads(threads)
        start = time.perf_counter()
        loaded = GPTQModel.load(
            model, device=device, dtype=getattr(torch, dtype), backend=BACKEND(kernel), **options
        )
        self.model = loaded.model.eval()
        seconds = time.perf_counter() - start
        kinds = Counter(
            type(m).__name__
            for m in self.model.modules()
            if hasattr(m, "qweight") or "Linear" in type(m).__name__
        )
        lines = [f"{count} layers: {kind}" for kind, count in kinds.most_common()]
        return {"seconds": seconds, "kernels": lines, "memory_bytes": resident_bytes()}

    def prefill(self, tokens: int) -> dict[str, Any]:
        ids = self._tokens(tokens)
        with torch.inference_mode():
            start = time.perf_counter()
            self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
            return {"seconds": time.perf_counter() - start}

    def decode(self, tokens: int) -> dict[str, Any]:
        ids, clock = self._tokens(_PROMPT), Clock()
        self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens + 1,
            do_sample=False,
            eos_token_id=self._vocabulary(),
            pad_token_id=0,
            stopping_criteria=[clock],
        )
        return {"seconds": clock.times[-1] - clock.times[0], "tokens": len(clock.times) - 1}

    def memory(self) -> dict[str, Any]:
        return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}

    def _vocabulary(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])

    def _tokens(self, count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(count)
        return torch.randint(self._vocabulary(), (1, count), generator=generator)


if __name__ == "__main__":
    answer_requests(Worker())
