"""vLLM behind the protocol of `fewbit.bench.worker`, in an environment of its own.

    VLLM-PYTHON benchmarks/vllm_worker.py

"kernel" is the quantization method: fewbit for the plugin, gptq for vLLM's own. Options: ``requests``, the number of
requests that are decoded at the same time; all others go to vLLM. Imports nothing from fewbit.
"""

from __future__ import annotations

import os
import resource
import time
from typing import Any

# vLLM takes these from the environment only: the engine in this process, and a small cache.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}

import torch
from vllm import LLM, SamplingParams, TokensPrompt
from worker_protocol import answer_requests, resident_bytes

_PROMPT = 16


class Worker:
    engine: Any = None
    requests = 1

    def load(
        self, model: str, device: str, dtype: str, kernel: str, threads: int, options: dict[str, Any]
    ) -> dict[str, Any]:
        torch.set_num_threads(threads)
        self.requests = options.pop("requests", 1)
        start = time.perf_counter()
        settings = {"max_model_len": 1024, "max_num_seqs": self.requests, "enable_prefix_caching": False}
        llm = LLM(model, dtype=dtype, quantization=kernel, skip_tokenizer_init=True, **settings, **options)
        self.engine = llm.llm_engine
        seconds = time.perf_counter() - start
        used = self.engine.model_config.quantization
        return {"seconds": seconds, "kernels": [used], "memory_bytes": resident_bytes()}

    def prefill(self, tokens: int) -> dict[str, Any]:
        start = time.perf_counter()
        self._run(1, tokens, 1)
        return {"seconds": time.perf_counter() - start}

    def decode(self, tokens: int) -> dict[str, Any]:
        times = self._run(self.requests, _PROMPT, tokens + 1)
        return {"seconds": times[-1] - times[-1 - tokens], "tokens": tokens * self.requests}

    def memory(self) -> dict[str, Any]:
        return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}

    def _run(self, requests: int, prompt: int, new: int) -> list[float]:
        """The time after each step of the engine."""
        greedy = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, detokenize=False)
        for number in range(requests):
            given = TokensPrompt(prompt_token_ids=self._tokens(prompt, number))
            self.engine.add_request(f"{time.perf_counter()}-{number}", given, greedy)
        times = []
        while self.engine.has_unfinished_requests():
            self.engine.step()
            times.append(time.perf_counter())
        return times

    def _tokens(self, count: int, seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        vocabulary = self.engine.model_config.get_vocab_size()
        return torch.randint(vocabulary, (count,), generator=generator).tolist()


if __name__ == "__main__":
    answer_requests(Worker())
