"""Predicted costs: the right size, the right order, and something sensible where no token came."""

import pytest
import torch
from torch import nn

from fewbit.calibration import Calibration, prepare
from fewbit.config import QuantConfig
from fewbit.errors import ModelError
from fewbit.gptq.grid import fit_grid, nearest
from fewbit.mixed_precision.sensitivity import BATCHES, TOKENS, measure
from fewbit.mixed_precision.settings_groups import Choice, make_groups
from fewbit.pipeline.gradients import some_batches
from fewbit.planning import make_plan
from fewbit.quantized_matrix import sequential_groups
from models import random_sequences, tiny_model

CONFIG = QuantConfig()


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def calibration():
    return prepare(random_sequences(40, 48), None, num_samples=40, seq_len=48)


def costs(model, calibration, seed=0):
    plan = make_plan(model, CONFIG)
    groups = make_groups(plan, CONFIG)
    return groups, measure(model, plan, groups, calibration, seed, lambda done, total: None)


def kl_of(model, batches, name, E):
    """Mean KL divergence of the model from itself with `E` taken off one weight."""
    layer = model.get_submodule(name)
    original = layer.weight.data
    with torch.no_grad():
        base = torch.cat([model(**batch).logits for batch in batches]).double().log_softmax(-1)
        layer.weight.data = original - E
        changed = torch.cat([model(**batch).logits for batch in batches]).double().log_softmax(-1)
        layer.weight.data = original
    return float((base.exp() * (base - changed)).sum(-1).mean())


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.o_proj", "model.layers.0.mlp.down_proj"])
def test_the_prediction_is_the_kl_divergence(model, calibration, name):
    groups, found = costs(model, calibration)
    index = next(i for i, group in enumerate(groups) if group.layers[0].name == name)
    choice = Choice(3, 32)
    predicted = found.by_group[index][groups[index].choices.index(choice)]
    W = model.get_submodule(name).weight.data
    groups = sequential_groups(W.shape[1], 32)
    grid = fit_grid(W, torch.ones(W.shape[1]), groups, 3, sym=True)
    Wq = (nearest(W, grid, 3) - grid.zeros[:, groups.long()].float()) * grid.scales[:, groups.long()].float()
    measured = kl_of(model, calibration.batches, name, W - Wq)
    assert 0.6 < predicted / measured < 1.6


def test_more_bits_and_smaller_groups_cost_less(model, calibration):
    groups, found = costs(model, calibration)
    for group, of_group in zip(groups, found.by_group, strict=True):
        cost = dict(zip(group.choices, of_group, strict=True))
        assert cost[2, 64] > 2 * cost[3, 64] > 4 * cost[4, 64] > 40 * cost[8, 64] > 0
        assert cost[4, 32] < cost[4, 64]


def test_the_same_seed_gives_the_same_costs(model):
    calibration = prepare(random_sequences(4, 16), None, num_samples=4, seq_len=16)
    first, again, other = (costs(model, calibration, seed)[1].by_group for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_progress_runs_to_the_end(model, calibration):
    plan = make_plan(model, CONFIG)
    seen = []
    measure(
        model, plan, make_groups(plan, CONFIG), calibration, 0, lambda done, total: seen.append((done, total))
    )
    assert seen == sorted(seen)
    assert seen[-1] == (28, 28)


@pytest.mark.parametrize(("length", "expected"), [(256, 16), (600, 8), (100, 24), (0, 8)])
def test_as_many_batches_as_the_tokens_need_from_the_whole_set(length, expected):
    batches = [{"input_ids": torch.tensor([[number]])} for number in range(24)]
    chosen = some_batches(
        Calibration(batches, "", 24 * length, 24, "ids"), TOKENS, BATCHES, torch.device("cpu")
    )
    numbers = [int(batch["input_ids"]) for batch in chosen]
    assert numbers == [24 * i // expected for i in range(expected)]


class Branches(nn.Module):
    """Two layers of which one never runs, and an output that may be infinite."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale, self.first, self.unused = scale, nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.first(x) * self.scale


def ready(model):
    batches = [{"x": torch.randn(2, 16, 64)} for _ in range(3)]
    plan = make_plan(model, CONFIG)
    calibration = Calibration(batches, "", 0, 3, "tensors")
    return measure(model, plan, make_groups(plan, CONFIG), calibration, 0, lambda done, total: None)


def test_a_layer_without_tokens_counts_like_the_average_weight():
    torch.manual_seed(0)
    found = ready(Branches())
    assert found.unreached == ["unused"]
    reached, unreached = found.by_group
    assert all(0.5 < b / a < 2 for a, b in zip(reached, unreached, strict=True))


def test_no_finite_gradient_is_an_error():
    with pytest.raises(
        ModelError, match="no token with finite inputs and gradients at any layer: try dtype float32"
    ):
        ready(Branches(scale=float("inf")))
