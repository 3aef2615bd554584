"""mlx-lm reads folders on the CPU: see protocol.py.

Environment: ``python -m venv V && V/bin/pip install mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2``.
With ``--generate``, the answer is the most likely continuation of the tokens.
"""

from __future__ import annotations

import sys

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.utils import load
from protocol import answer

NEW_TOKENS = 64


def read(checkpoint: str, tokens: list[int]) -> list[list[float]]:
    model, _ = load(checkpoint)
    return model(mx.array([tokens]))[0].astype(mx.float32).tolist()


def generate(checkpoint: str, tokens: list[int]) -> list[list[int]]:
    model, _ = load(checkpoint)
    return [[int(token) for token, _ in generate_step(mx.array(tokens), model, max_tokens=NEW_TOKENS)]]


if __name__ == "__main__":
    mode = generate if sys.argv[1] == "--generate" and sys.argv.pop(1) else read
    answer(mode, "mlx-lm", "mlx")
