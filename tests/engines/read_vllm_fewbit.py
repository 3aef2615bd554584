"""vLLM reads checkpoints on the CPU with fewbit's plugin: see protocol.py.

Environment: as for read_vllm_cpu.py, then ``V/bin/pip install .`` in this repository.
"""

from __future__ import annotations

import os

os.environ["VLLM_PLUGINS"] = "fewbit"

from protocol import answer
from read_vllm_cpu import read

if __name__ == "__main__":
    answer(read, "vllm-cpu", "transformers", "torch")
