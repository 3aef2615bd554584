"""llama.cpp reads GGUF files on the CPU: see protocol.py.

Environment: ``python -m venv V && CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAMA_CURL=OFF" V/bin/pip install
llama-cpp-python==0.3.36``, which compiles for some minutes.
Keys and values are kept in float32, so that only products with quantized weights round: their inputs have 8 bits.
With ``--tokenize``, TOKENS.json holds texts, and the answers are token ids. With ``--generate``, the answer is the
most likely continuation of the tokens. With ``--save``, logits go into CHECKPOINT.npy, and the answer is empty.
"""

from __future__ import annotations

import itertools
import sys

import llama_cpp
import numpy as np
from protocol import answer

GGML_TYPE_F32 = 0
NEW_TOKENS = 32


def load(checkpoint: str, length: int) -> llama_cpp.Llama:
    return llama_cpp.Llama(
        checkpoint,
        n_ctx=length,
        n_batch=length,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        swa_full=True,
        verbose=False,
    )


def read(checkpoint: str, tokens: list[int]) -> list[list[float]]:
    model = load(checkpoint, len(tokens))
    model.eval(tokens)
    logits = model.scores[: len(tokens)].tolist()
    model.close()
    return logits


def tokenize(checkpoint: str, texts: list[str]) -> list[list[int]]:
    model = llama_cpp.Llama(checkpoint, vocab_only=True, verbose=False)
    found = [model.tokenize(text.encode(), add_bos=True, special=True) for text in texts]
    model.close()
    return found


def generate(checkpoint: str, tokens: list[int]) -> list[list[int]]:
    model = load(checkpoint, len(tokens) + NEW_TOKENS)
    found = list(itertools.islice(model.generate(tokens, temp=0.0, repeat_penalty=1.0), NEW_TOKENS))
    model.close()
    return [found]


def save(checkpoint: str, tokens: list[int]) -> list[list[float]]:
    model = load(checkpoint, len(tokens))
    model.eval(tokens)
    np.save(f"{checkpoint}.npy", model.scores[: len(tokens)])
    model.close()
    return []


MODES = {"--tokenize": tokenize, "--generate": generate, "--save": save}

if __name__ == "__main__":
    mode = MODES[sys.argv.pop(1)] if sys.argv[1] in MODES else read
    answer(mode, "llama-cpp-python")
