"""mlx-lm reads folders on the CPU: see protocol.py.

Environment: ``python -m venv V && V/bin/pip install mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2``.
With ``--generate``, the answer is the most likely continuation of the tokens. With ``--save``, logits go into
CHECKPOINT.npy, and the answer is empty.
"""

from __future__ import annotations

import sys

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.utils import load
from protocol import answer

NEW_TOKENS = 32


def read(checkpoint: str, tokens: list[int]) -> list[list[float]]:
    model, _ = load(checkpoint)
    return model(mx.array([tokens]))[0].astype(mx.float32).tolist()


def generate(checkpoint: str, tokens: list[int]) -> list[list[int]]:
    model, _ = load(checkpoint)
    return [[int(token) for token, _ in generate_step(mx.array(tokens), model, max_tokens=NEW_TOKENS)]]


def save(checkpoint: str, tokens: list[int]) -> list[list[float]]:
    np.save(f"{checkpoint}.npy", np.array(read(checkpoint, tokens), dtype=np.float32))
    return []


MODES = {"--generate": generate, "--save": save}

if __name__ == "__main__":
    mode = MODES[sys.argv.pop(1)] if sys.argv[1] in MODES else read
    answer(mode, "mlx-lm", "mlx")
