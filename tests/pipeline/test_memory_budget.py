"""The memory of a GPU for activations: arithmetic, with the device's answer put in."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import models
from fewbit import QuantConfig
from fewbit.modeling.source import open_source
from fewbit.pipeline import memory
from fewbit.pipeline.memory import activation_budget, free_device_bytes, largest_layer_bytes
from fewbit.pipeline.statistics import BatchMasks
from fewbit.pipeline.streaming import REST, StreamedWeights
from fewbit.planning import make_plan
from fewbit.profiling import Profiler

GPU = torch.device("cuda", 0)


def llama(hidden, inner, key_values):
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=2, num_attention_heads=hidden // 128,
        num_key_value_heads=key_values // 128, vocab_size=128_256,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config).bfloat16().eval()


def budget_of(monkeypatch, model, free, paths=2, batches=128):
    monkeypatch.setattr(memory, "free_device_bytes", lambda device: free)
    rows = [BatchMasks(counts=frozenset([2048]))] * batches
    weights = SimpleNamespace(device=GPU, pending_bytes=lambda: 10**9)
    return activation_budget(model, make_plan(model, QuantConfig()), weights, rows, paths)


def test_no_budget_on_a_cpu():
    assert free_device_bytes(torch.device("cpu")) is None
    weights = SimpleNamespace(device=torch.device("cpu"))
    assert activation_budget(models.tiny_model("llama"), None, weights, [], 1) is None


def test_8b_model_on_gpus_of_two_sizes(monkeypatch):
    model = llama(4096, 14336, 1024)
    # Held while the widest layer waits: its input, the residual, and the input of the feed-forward network.
    held = 2 * 128 * 2048 * (14336 + 2 * 4096) * 2
    large = budget_of(monkeypatch, model, 139 * 2**30)
    assert held < large.needed < 2 * held
    assert large.needed < large.bytes < 0.9 * 139 * 2**30
    small = budget_of(monkeypatch, model, 24 * 2**30)
    assert 0 < small.bytes < held
    assert small.needed == large.needed
    assert large.bytes - small.bytes == pytest.approx(0.9 * 115 * 2**30, abs=2)
    assert budget_of(monkeypatch, model, 24 * 2**30, paths=1).needed == large.needed // 2
    assert budget_of(monkeypatch, model, 2**30).bytes == 0
    assert large.pinned


def test_70b_model_fits_on_a_large_gpu(monkeypatch):
    found = budget_of(monkeypatch, llama(8192, 28672, 1024), 139 * 2**30)
    assert found.needed < found.bytes


def test_largest_layer_bytes():
    plan = make_plan(llama(4096, 14336, 1024), QuantConfig())
    assert largest_layer_bytes(plan, 2) == 32 * 14336**2 + 14 * 14336 * 4096 + 12 * 14336 * 1024
    assert largest_layer_bytes(plan, 1) == 16 * 14336**2 + 15 * 14336 * 4096


def test_batch_without_tokens(monkeypatch):
    model = models.tiny_model("llama")
    monkeypatch.setattr(memory, "free_device_bytes", lambda device: 10**9)
    weights = SimpleNamespace(device=GPU, pending_bytes=lambda: 0)
    found = activation_budget(model, make_plan(model, QuantConfig(group_size=16)), weights, [BatchMasks()], 1)
    assert 0 < found.needed < found.bytes


def test_pending_bytes(tmp_path):
    folder = models.save_tiny(tmp_path / "model", "llama", num_hidden_layers=4)
    model, files = open_source(folder).build_model("auto")
    weights = StreamedWeights(model, files, torch.device("cpu"), Profiler())
    sizes = weights.shard_sizes()
    rest, largest = sizes.pop(REST), sorted(sizes.values())
    assert weights.pending_bytes() == rest + largest[-1] + largest[-2]
    weights.load("model.norm")
    assert weights.pending_bytes() == largest[-1] + largest[-2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_free_memory_of_a_gpu():
    before = free_device_bytes(GPU)
    held = torch.empty(2**28, dtype=torch.uint8, device=GPU)
    assert 2**28 <= before - free_device_bytes(GPU) < 2**29
    del held  # torch keeps it, and would use it again
    assert free_device_bytes(GPU) > before - 2**26
