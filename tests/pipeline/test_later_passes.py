"""Layers that run several times in one forward pass count all their inputs."""

import copy

import pytest
import torch
from torch import nn

import fewbit
from fewbit.pipeline.later_passes import uses_per_pass
from models import random_sequences

CONFIG = fewbit.QuantConfig(bits=3, group_size=32, num_samples=8, seq_len=24)


class Looped(nn.Module):
    """Two layers used three times, each time with inputs from other eight dimensions, then a last layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.last = nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 64)
        self.turns = nn.Parameter(torch.randn(3, 8, 64), requires_grad=False)

    def forward(self, x):
        return self.last(sum(self.down(self.up(x @ turn)) for turn in self.turns))


def batches(n=6):
    g = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(40, 8, generator=g)} for _ in range(n)]


def quantized(**settings):
    return fewbit.quantize(Looped(), fewbit.QuantConfig(bits=3, group_size=32, **settings), dataset=batches())


def test_uses_are_counted_without_weights():
    model = Looped()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert uses_per_pass(model.to("meta"), layers, batches(1)[0]) == {"up": 3, "down": 3}


def test_the_hessian_is_the_sum_over_all_uses(monkeypatch):
    from fewbit.gptq import Hessian

    seen = {}
    include = Hessian.include

    def recorded(self, H, tokens, dropped):
        include(self, H, tokens, dropped)
        seen[self.n] = self.matrix().clone()

    monkeypatch.setattr(Hessian, "include", recorded)
    quantized(correction=0.0)
    model, expected = Looped().double(), {"up": [], "down": []}
    for name, inputs in expected.items():
        model.get_submodule(name).register_forward_pre_hook(lambda m, a, inputs=inputs: inputs.append(a[0]))
    for batch in batches():
        model(batch["x"].double())
    X = torch.cat(expected["up"])  # nothing in front of `up` is quantized at its first use
    assert torch.allclose(seen[64].double(), X.T @ X, rtol=1e-5, atol=1e-3)


def test_all_uses_together_are_better_than_the_first_alone(monkeypatch):
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(9))
    expected = Looped()(x)

    @torch.no_grad()
    def error(model):
        return float((model(x) - expected).norm() / expected.norm())

    both = quantized(correction=0.0)
    assert both.fewbit_report.layers[0]["tokens"] == 3 * 240
    assert any("2 layers run up to 3 times" in note for note in both.fewbit_report.notes)
    monkeypatch.setattr("fewbit.pipeline.quantize_layers.uses_per_pass", lambda *_: {})
    first = quantized(correction=0.0)
    assert any("reached 2 layers after" in note for note in first.fewbit_report.notes)
    assert error(both) < 0.5 * error(first)


@pytest.mark.parametrize("settings", [{}, {"correction": 0.0}, {"tune": True, "tune_steps": 20}])
def test_albert_streamed_and_in_memory_give_the_same_codes(settings, tmp_path):
    from transformers import AlbertConfig, AlbertForMaskedLM

    torch.manual_seed(0)
    model = AlbertForMaskedLM(
        AlbertConfig(
            vocab_size=120, embedding_size=32, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
            intermediate_size=96, max_position_embeddings=64,
        )
    ).eval()  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    data = [
        {"input_ids": one["input_ids"][None], "attention_mask": torch.ones(1, 24).long()}
        for one in random_sequences(6, 24, vocab=120)
    ]
    config = fewbit.QuantConfig(**{**CONFIG.to_dict(), **settings})
    report = fewbit.quantize(tmp_path / "model", config, dataset=data, output=tmp_path / "out")
    assert any("6 layers run up to 4 times" in note for note in report.notes)
    in_memory = fewbit.quantize(copy.deepcopy(model), config, dataset=data)
    loaded = fewbit.load(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        a, b = loaded(**data[0]).logits, in_memory(**data[0]).logits
    assert torch.allclose(a, b, atol=1e-4)
