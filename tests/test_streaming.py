"""A model that does not fit: quantized in a process that may not have it in memory whole."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from streaming import random_llama

import fewbit
from fewbit.quantization import quantize

LIMITED = """
import resource, sys
from pathlib import Path
import torch
import fewbit, fewbit.quantization
from fewbit.pipeline import streaming
from transformers.models.llama import modeling_llama

folder, output, headroom, whole, settings = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5]
torch.set_num_threads(1)
torch.ones(300, 300) @ torch.ones(300, 300)  # libraries reserve address space at first use
used = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmSize")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + headroom, used + headroom))
tokens = [{"input_ids": torch.arange(i, i + 48) % 1000} for i in range(4)]
config = fewbit.QuantConfig(seq_len=48, num_samples=4, **eval(settings))
if whole == "whole":
    from transformers import AutoModelForCausalLM
    AutoModelForCausalLM.from_pretrained(folder)
report = fewbit.quantize(folder, config, dataset=tokens, output=output)
print("done", len(report.layers))
"""


def run_limited(
    folder: Path, output: Path, headroom: int, whole: bool, **settings
) -> subprocess.CompletedProcess:
    arguments = [folder, output, headroom, "whole" if whole else "-", settings]
    return subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, arguments)], capture_output=True, text=True, timeout=6000
    )


needs_limit = pytest.mark.skipif(
    not hasattr(resource, "RLIMIT_AS") or sys.platform != "linux", reason="Linux only"
)


@needs_limit
def test_a_model_larger_than_memory(tmp_path):
    # 6 blocks of 76 MB; one small layer of each is solved, all the others only pass through.
    size = random_llama(tmp_path / "model", 6, hidden=1024, intermediate=4736, dtype="float32")
    assert size > 400e6
    headroom = 360_000_000
    settings = {"override": {"q_proj|o_proj|v_proj|mlp": "skip"}, "group_size": 128}
    # The limit is real: the same process cannot load the model.
    refused = run_limited(tmp_path / "model", tmp_path / "refused", headroom, whole=True, **settings)
    assert refused.returncode != 0
    assert "done" not in refused.stdout
    found = run_limited(tmp_path / "model", tmp_path / "out", headroom, whole=False, **settings)
    assert found.stdout.split() == ["done", "6"], found.stderr[-2000:]
    # Byte for byte what it is without a limit.
    import torch

    tokens = [{"input_ids": torch.arange(i, i + 48) % 1000} for i in range(4)]
    config = fewbit.QuantConfig(seq_len=48, num_samples=4, **settings)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    quantize(tmp_path / "model", config, dataset=tokens, output=tmp_path / "free")
    torch.set_num_threads(threads)
    for path in sorted((tmp_path / "free").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


@needs_limit
@pytest.mark.slow
def test_four_gigabytes_within_one(tmp_path):
    size = random_llama(tmp_path / "model", 40, hidden=2048, intermediate=5632, dtype="bfloat16")
    assert size > 3.6e9
    found = run_limited(tmp_path / "model", tmp_path / "out", 1_000_000_000, whole=False, fast=True)
    assert found.stdout.split() == ["done", str(40 * 7)], found.stderr[-2000:]
