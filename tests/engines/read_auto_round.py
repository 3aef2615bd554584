"""transformers reads folders of auto-round on the CPU, through the package auto-round: see protocol.py.

Environment: ``python -m venv V && V/bin/pip install torch auto-round==0.16.1``.
"""

from __future__ import annotations

import torch
from protocol import answer
from transformers import AutoModelForCausalLM


def read(checkpoint: str, tokens: list[int]) -> list[list[float]]:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float16, device_map="cpu")
    with torch.no_grad():
        logits: list[list[float]] = model(input_ids=torch.tensor([tokens])).logits[0].float().tolist()
    return logits


if __name__ == "__main__":
    answer(read, "auto-round", "transformers", "torch")
