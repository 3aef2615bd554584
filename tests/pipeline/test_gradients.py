"""Gradients of drawn labels: right, complete, and without a trace in the model."""

import pytest
import torch
from torch import nn

from fewbit.errors import ModelError
from fewbit.mixed_precision.sensitivity import LayerSample
from fewbit.modeling.layers import is_layer
from fewbit.pipeline.gradients import gaussian_score, label_score, run_backward
from models import FAMILIES, random_sequences, tiny_model


def linear_layers(model):
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "lm_head" not in name
    }


def batches(count=2, **more):
    return [{"input_ids": item["input_ids"][None], **more} for item in random_sequences(count)]


def collect(model, layers, blocks, data, rows=1000, seed=0):
    samples = {name: LayerSample(rows) for name in layers}
    takes = {name: sample.take for name, sample in samples.items()}
    return samples, run_backward(model, takes, blocks, data, seed=seed, progress=lambda done, total: None)


def run(model, data, rows=1000, seed=0):
    return collect(model, linear_layers(model), list(model.model.layers), data, rows, seed)


def test_label_score_is_the_drawn_label_less_the_distribution():
    logits = torch.randn(3, 7, 11)
    score, count = label_score(logits, None, torch.Generator().manual_seed(0))
    one_hot = score + logits.softmax(-1)
    assert count == 21
    torch.testing.assert_close(one_hot, (one_hot > 0.5).float())
    assert (one_hot > 0.5).sum(-1).eq(1).all()


def test_labels_follow_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0]).log_softmax(-1).expand(20_000, 3)
    score, _ = label_score(logits, None, torch.Generator().manual_seed(0))
    torch.testing.assert_close(score.mean(0), torch.zeros(3), atol=0.02, rtol=0)


def test_padding_has_no_label():
    counted = torch.tensor([[True, True, False]])
    for score_of in (label_score, gaussian_score):
        score, count = score_of(torch.randn(1, 3, 5), counted, torch.Generator().manual_seed(0))
        assert count == 2
        assert score[0, 2].eq(0).all()
        assert score[0, :2].ne(0).any()


def test_gradients_are_those_of_plain_autograd():
    model, data = tiny_model("llama"), batches(1)
    samples, positions = run(model, data)
    name = "model.layers.1.self_attn.o_proj"
    found = {}

    def remember(module, inputs, output):
        output.retain_grad()
        found["x"], found["y"] = inputs[0], output

    handle = model.get_submodule(name).register_forward_hook(remember)
    logits = model(**data[0], use_cache=False).logits
    handle.remove()
    score, count = label_score(logits.detach(), None, torch.Generator().manual_seed(0))
    logits.backward(score)
    x, g = samples[name].all_rows()
    assert positions == count == 24
    torch.testing.assert_close(x, found["x"][0].detach())
    torch.testing.assert_close(g, found["y"].grad[0])


def test_fewer_rows_are_scaled_to_stand_for_all():
    model, data = tiny_model("llama"), batches(1)
    whole, _ = run(model, data)
    some, _ = run(model, data, rows=8)
    name = "model.layers.0.mlp.down_proj"
    x, g = whole[name].all_rows()
    x_some, g_some = some[name].all_rows()
    kept = torch.linspace(0, 23, 8).round().long()
    torch.testing.assert_close(x_some, x[kept])
    torch.testing.assert_close(g_some, g[kept] * 3**0.5)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "t5"])
def test_every_layer_of_every_family_gets_gradients(family):
    model = tiny_model(family)
    layers = {
        name: module
        for name, module in model.named_modules()
        if is_layer(module) and name not in ("lm_head", "embed_out")
    }
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    samples, _ = collect(model, layers, list(blocks), batches())
    for name, sample in samples.items():
        x, g = sample.all_rows()
        assert len(x) == len(g) == 48, name
        assert g.ne(0).any(), name


def test_the_model_is_left_as_it_was():
    model, data = tiny_model("llama"), batches()
    before = model(**data[0]).logits
    model.model.norm.weight.requires_grad_(False)
    run(model, data)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert not any("forward" in module.__dict__ or module._forward_hooks for module in model.modules())
    torch.testing.assert_close(model(**data[0]).logits, before, rtol=0, atol=0)


def test_the_model_is_left_as_it_was_after_an_error():
    model = tiny_model("llama")
    with pytest.raises(IndexError):
        run(model, [{"input_ids": torch.tensor([[1, 10_000]])}])
    assert all(p.requires_grad for p in model.parameters())
    assert not any("forward" in module.__dict__ or module._forward_hooks for module in model.modules())


def test_the_seed_decides_the_labels():
    model, data = tiny_model("llama"), batches()
    name = "model.layers.0.mlp.up_proj"
    first, again, other = (run(model, data, seed=seed)[0][name].all_rows()[1] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


class InPlace(nn.Module):
    """Changes the output of its first layer in place, passes inputs by name, knows no cache and has no logits."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.config = None

    def forward(self, x):
        y = self.first(input=x)
        y += 1
        return self.second(y)


def test_models_of_unusual_habits():
    model = InPlace()
    layers = {"first": model.first, "second": model.second}
    samples, positions = collect(model, layers, [], [{"x": torch.randn(1, 6, 4)}])
    assert positions == 6
    torch.testing.assert_close(samples["first"].g[0], samples["second"].g[0] @ model.second.weight.detach())


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 5, 2, stride=2, padding=1)

    def forward(self, x):
        return self.layer(x).flatten(2).transpose(1, 2)


def test_rows_of_a_convolution_are_its_patches():
    model, x = Convolution(), torch.randn(2, 3, 6, 8)
    samples, _ = collect(model, {"layer": model.layer}, [], [{"x": x}])
    output = model(x)
    score, _ = gaussian_score(output.detach(), None, torch.Generator().manual_seed(0))
    output.backward(score)
    patches, g = samples["layer"].all_rows()
    torch.testing.assert_close(g.T @ patches, model.layer.weight.grad.flatten(1))


class NoGradient(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x).detach()


class BrokenBackward(NoGradient):
    def forward(self, x):
        y = self.layer(x)
        z = y.exp()
        z.add_(1)
        return z


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (NoGradient(), "no gradient reaches the output of NoGradient"),
        (BrokenBackward(), "no gradients through BrokenBackward: .*inplace"),
    ],
)
def test_models_without_gradients_are_refused_with_advice(model, reason):
    with pytest.raises(ModelError, match=rf"{reason}.*leave them out$"):
        collect(model, {"layer": model.layer}, [], [{"x": torch.randn(1, 3, 4)}])
