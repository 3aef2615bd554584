"""transformers reads folders of compressed-tensors: see protocol.py.

Environment: fewbit's own, with ``pip install compressed-tensors==0.20.1``.
The layers are decoded when the model is loaded, and the products are float32.
"""

from __future__ import annotations

import torch
from protocol import answer
from transformers import AutoModelForCausalLM, CompressedTensorsConfig


def read(checkpoint: str, tokens: list[int]) -> list[list[float]]:
    decoded = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, quantization_config=decoded)
    with torch.no_grad():
        logits: list[list[float]] = model(input_ids=torch.tensor([tokens])).logits[0].tolist()
    return logits


if __name__ == "__main__":
    answer(read, "compressed-tensors", "transformers", "torch")
