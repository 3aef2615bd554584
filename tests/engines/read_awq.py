"""GPTQModel reads folders of AWQ, with its torch kernel in float16: see protocol.py.

Environment: the one of read_gptqmodel.py.
"""

from __future__ import annotations

import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # GPTQModel's kernels would be compiled, for a minute per layout

import torch
from gptqmodel import BACKEND, GPTQModel
from protocol import answer


def read(checkpoint: str, tokens: list[int]) -> list[list[float]]:
    model = GPTQModel.load(checkpoint, device="cpu", dtype=torch.float16, backend=BACKEND.AWQ_TORCH)
    with torch.no_grad():
        return model.model(input_ids=torch.tensor([tokens])).logits[0].float().tolist()


if __name__ == "__main__":
    answer(read, "gptqmodel", "transformers", "torch")
