"""transformers reads folders of compressed-tensors: see protocol.py.

Environment: fewbit's own, with ``pip install compressed-tensors==0.20.1``.
The products are float32. transformers 5.24 keeps symmetric layers packed. Asymmetric ones it has to decode when it
loads them (``dequantize=True``), with the settings of the first group of layers for all.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from protocol import answer
from transformers import AutoModelForCausalLM, CompressedTensorsConfig


def read(checkpoint: str, tokens: list[int]) -> list[list[float]]:
    stated = json.loads((Path(checkpoint) / "config.json").read_text())["quantization_config"]
    symmetric = all(group["weights"]["symmetric"] for group in stated["config_groups"].values())
    options = {} if symmetric else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, **options)
    with torch.no_grad():
        logits: list[list[float]] = model(input_ids=torch.tensor([tokens])).logits[0].tolist()
    return logits


if __name__ == "__main__":
    answer(read, "compressed-tensors", "transformers", "torch")
