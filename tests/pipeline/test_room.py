"""The room that a GPU has for activations: arithmetic, with the device's answer put in."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import models
from fewbit import QuantConfig
from fewbit.modeling.experts import unfuse, unfused_modules
from fewbit.modeling.source import open_source
from fewbit.pipeline import memory as room
from fewbit.pipeline.memory import activation_budget, companies_on_device, free_device_bytes, solver_bytes
from fewbit.pipeline.statistics import Rows
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


def room_of(monkeypatch, model, free, streams=2, batches=128):
    monkeypatch.setattr(room, "free_device_bytes", lambda device: free)
    rows = [Rows(counts=frozenset([2048]))] * batches
    weights = SimpleNamespace(device=GPU, pending_bytes=lambda: 10**9)
    return activation_budget(model, make_plan(model, QuantConfig()), weights, rows, streams)


def test_nobody_asks_a_cpu():
    assert free_device_bytes(torch.device("cpu")) is None
    weights = SimpleNamespace(device=torch.device("cpu"))
    assert activation_budget(models.tiny_model("llama"), None, weights, [], 1) is None


def test_an_8b_model_on_gpus_of_two_sizes(monkeypatch):
    model = llama(4096, 14336, 1024)
    # Held while the widest layer waits: its input, the residual, and the input of the feed-forward network.
    held = 2 * 128 * 2048 * (14336 + 2 * 4096) * 2
    large = room_of(monkeypatch, model, 139 * 2**30)
    assert held < large.needed < 2 * held
    assert large.needed < large.bytes < 0.9 * 139 * 2**30
    small = room_of(monkeypatch, model, 24 * 2**30)
    assert 0 < small.bytes < held
    assert small.needed == large.needed
    assert large.bytes - small.bytes == pytest.approx(0.9 * 115 * 2**30, abs=2)
    assert room_of(monkeypatch, model, 24 * 2**30, streams=1).needed == large.needed // 2
    assert room_of(monkeypatch, model, 2**30).bytes == 0
    assert large.pinned


def test_a_70b_model_needs_no_watching_on_a_large_gpu(monkeypatch):
    found = room_of(monkeypatch, llama(8192, 28672, 1024), 139 * 2**30)
    assert found.needed < found.bytes


def test_the_solver_has_its_matrices():
    plan = make_plan(llama(4096, 14336, 1024), QuantConfig())
    assert solver_bytes(plan, 2) == 36 * 14336**2 + 26 * 14336 * 4096
    assert solver_bytes(plan, 1) == 20 * 14336**2 + 15 * 14336 * 4096


def experts_of(kind, **shape):
    """Two layers of a mixture with the shape of a real one, taken apart."""
    config = AutoConfig.for_model(kind, num_hidden_layers=2, vocab_size=1000, **shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).bfloat16().eval()
    unfuse(model)
    return model


def companies_of(monkeypatch, model, free, config=None, batches=128, streams=2):
    monkeypatch.setattr(room, "free_device_bytes", lambda device: free)
    rows = [Rows(counts=frozenset([2048]))] * batches
    weights = SimpleNamespace(device=GPU, pending_bytes=lambda: 10**9)
    arguments = model, make_plan(model, config or QuantConfig()), weights, rows, streams
    sizes = companies_on_device(*arguments)
    return sizes, activation_budget(*arguments), activation_budget(*arguments, sizes)


def qwen3_30b_a3b():
    return experts_of(
        "qwen3_moe",
        hidden_size=2048,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        head_dim=128,
    )


def test_companies_fill_a_large_gpu_and_have_their_share_of_it(monkeypatch):
    model = qwen3_30b_a3b()
    sizes, alone, together = companies_of(monkeypatch, model, 139 * 2**30)
    assert sizes == dict.fromkeys(unfused_modules(model), 16)  # of 2048 rows: 32768 are enough
    # 16 of 128 experts get 3 times their share of 8 experts for each token, in both streams, and some when starved.
    inputs = 2 * (3 * 128 * 2048 + 16 * 2048) * 2048 * 2
    assert together.needed - alone.needed == inputs
    # While α is chosen: two weights in float32, both streams' probes twice, three products with them.
    solving = 8 * 2048 * 1536 + 4 * 2048 * (2 * 2 * 2048 + 3 * 1536)
    matrices = 16 * (36 * 2048**2 + solving)
    assert alone.bytes - together.bytes == matrices - solver_bytes(make_plan(model, QuantConfig()), 2)
    assert inputs + matrices < 0.25 * alone.bytes


def test_companies_are_smaller_where_there_is_less_room(monkeypatch):
    model, fitting, moved = qwen3_30b_a3b(), [], []
    for gib in (52, 32, 22, 18):
        found, alone, together = companies_of(monkeypatch, model, gib * 2**30)
        fitting.append(max(found.values(), default=1))
        assert alone.needed <= alone.bytes
        assert together.needed <= together.bytes  # they are no reason to move activations
    assert fitting == [16, 10, 5, 1]
    for gib in (16, 9, 2):  # here activations are moved anyway
        found, alone, together = companies_of(monkeypatch, model, gib * 2**30)
        moved.append(max(found.values(), default=1))
        assert alone.needed > alone.bytes
        assert together.needed - alone.needed <= 0.25 * alone.bytes
    assert moved == [4, 2, 1]


def test_experts_that_fill_a_gpu_alone_form_no_companies(monkeypatch):
    mixtral = experts_of("mixtral", hidden_size=4096, intermediate_size=14336, num_local_experts=8)
    assert companies_of(monkeypatch, mixtral, 139 * 2**30)[0] == {}


def test_experts_that_are_not_solved_form_no_companies(monkeypatch):
    first, second = unfused_modules(model := qwen3_30b_a3b())
    config = QuantConfig(ignore=(rf"{first}\.",))
    assert list(companies_of(monkeypatch, model, 139 * 2**30, config)[0]) == [second]
    assert companies_of(monkeypatch, model, 139 * 2**30, QuantConfig(method="rtn"))[0] == {}


def test_companies_of_about_equal_size(monkeypatch):
    model = experts_of(
        "qwen3_moe", hidden_size=1536, moe_intermediate_size=512, num_experts=64, num_experts_per_tok=4
    )
    sizes, *_ = companies_of(monkeypatch, model, 139 * 2**30)
    assert set(sizes.values()) == {16}  # 21 would do; four companies are needed either way


def test_no_companies_where_nobody_says_what_is_free():
    weights = SimpleNamespace(device=torch.device("cpu"))
    assert companies_on_device(qwen3_30b_a3b(), None, weights, [], 1) == {}


def test_a_batch_without_tokens(monkeypatch):
    model = models.tiny_model("llama")
    monkeypatch.setattr(room, "free_device_bytes", lambda device: 10**9)
    weights = SimpleNamespace(device=GPU, pending_bytes=lambda: 0)
    found = activation_budget(model, make_plan(model, QuantConfig(group_size=16)), weights, [Rows()], 1)
    assert 0 < found.needed < found.bytes


def test_the_weights_that_are_still_to_come(tmp_path):
    folder = models.save_tiny(tmp_path / "model", "llama", num_hidden_layers=4)
    model, files = open_source(folder).build_model("auto")
    weights = StreamedWeights(model, files, torch.device("cpu"), Profiler())
    sizes = weights.shard_sizes()
    rest, largest = sizes.pop(REST), sorted(sizes.values())
    assert weights.pending_bytes() == rest + largest[-1] + largest[-2]
    weights.load("model.norm")
    assert weights.pending_bytes() == largest[-1] + largest[-2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_says_what_is_free():
    before = free_device_bytes(GPU)
    held = torch.empty(2**28, dtype=torch.uint8, device=GPU)
    assert 2**28 <= before - free_device_bytes(GPU) < 2**29
    del held  # torch keeps it, and would use it again
    assert free_device_bytes(GPU) > before - 2**26
