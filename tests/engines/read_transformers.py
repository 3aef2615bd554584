"""transformers reads checkpoints with its own GPTQ support, that is through optimum and GPTQModel: see protocol.py.

Environment: ``python -m venv V && V/bin/pip install gptqmodel==7.7.0 transformers accelerate optimum``.
GPTQModel's plain torch kernel in float16: it takes every layout.
"""

from __future__ import annotations

import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # GPTQModel's kernels would be compiled, for a minute per layout

import torch
from protocol import answer
from transformers import AutoModelForCausalLM, GPTQConfig


def read(checkpoint: str, tokens: list[int]) -> list[list[float]]:
    # Only `backend` counts: the rest is read from the checkpoint.
    kernel = GPTQConfig(bits=4, backend="gptq_torch")
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, device_map="cpu", dtype=torch.float16, quantization_config=kernel
    )
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits[0].float().tolist()


if __name__ == "__main__":
    answer(read, "transformers", "optimum", "gptqmodel", "torch")
