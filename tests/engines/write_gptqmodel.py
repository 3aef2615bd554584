"""GPTQModel writes checkpoints, for fewbit to read.

    GPTQMODEL-PYTHON tests/engines/write_gptqmodel.py MODEL OUT 'JSON list of QuantizeConfig arguments'

runs in an environment of its own (``pip install gptqmodel==7.7.0``) and imports nothing of fewbit.
Element i of the list is written to OUT/i.
"""

from __future__ import annotations

import json
import os
import sys

# Without it GPTQModel starts one worker on two cores, and its calibration needs two.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig


def write(model: str, out: str, settings: dict[str, object]) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 1024, (64,), generator=generator).tolist() for _ in range(8)]
    calibration = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids]
    config = QuantizeConfig(**settings, offload_to_disk=False, act_group_aware=False)
    loaded = GPTQModel.load(model, config, dtype=torch.float32, device="cpu")
    loaded.quantize(calibration, batch_size=1, backend=BACKEND.GPTQ_TORCH)
    loaded.save(out)


if __name__ == "__main__":
    _, model, out, cells = sys.argv
    for number, settings in enumerate(json.loads(cells)):
        write(model, f"{out}/{number}", settings)
