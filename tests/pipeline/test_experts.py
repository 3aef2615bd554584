"""Unfused experts compute the same as fused ones, and are saved under the original names."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import use_experts_implementation
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from fewbit.checkpoint.assemble import names_on_disk
from fewbit.config import QuantConfig
from fewbit.modeling.expert_layouts import layout_of
from fewbit.modeling.expert_names import in_files
from fewbit.modeling.experts import (
    RoutedExperts,
    routes_of,
    unfuse,
    unfused_modules,
    why_fused,
)
from fewbit.planning import make_plan, with_settings
from models import random_sequences, tiny_model
from moe_models import EXPERTS, HIDDEN, INNER, MOE_SHAPES, tiny_moe

TOKENS = torch.randint(4, 100, (2, 20), generator=torch.Generator().manual_seed(3))


def saved(model, folder: Path):
    model.save_pretrained(folder)
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def expert_names(model):
    """Layer of an expert → its name in the files."""
    layers = [
        f"{name}.{layer}"
        for name, experts in unfused_modules(model).items()
        for layer, child in experts.named_modules()
        if isinstance(child, nn.Linear)
    ]
    return {layer: name for layer, (name,) in names_on_disk(model, layers).items()}


def expert_inputs(k=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(30, HIDDEN, generator=generator)
    index = torch.rand(30, EXPERTS, generator=generator).topk(k).indices
    return x, index, torch.rand(30, k, generator=generator)


@pytest.mark.parametrize("family", [*MOE_SHAPES, "qwen2_moe"])
def test_unfused_model_computes_and_saves_the_same(family, tmp_path):
    model = tiny_moe(family)
    addresses = [p.untyped_storage().data_ptr() for p in model.parameters() if p.ndim == 3]
    with torch.no_grad():
        expected = model(TOKENS).logits
    on_disk = saved(model, tmp_path / "fused")

    modules = unfuse(model)
    names = expert_names(model)

    assert not why_fused(model)
    assert len(names) == 3 * EXPERTS * len(modules) > 0
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, expected)
    for layer, name in names.items():
        weight = model.get_submodule(layer).weight
        torch.testing.assert_close(weight, on_disk[f"{name}.weight"], rtol=0, atol=0)
        assert weight.untyped_storage().data_ptr() in addresses
    again = saved(model, tmp_path / "unfused")
    assert again.keys() == on_disk.keys()
    assert all(torch.equal(again[name], on_disk[name]) for name in on_disk)


@pytest.mark.parametrize("family", MOE_SHAPES)
def test_names_without_weights(family):
    model = tiny_moe(family)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    assert unfuse(empty).keys() == unfuse(model).keys()
    assert expert_names(empty) == expert_names(model)
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_mixtral_file_names():
    model = tiny_moe("mixtral")
    unfuse(model)
    names = expert_names(model)
    experts, on_disk = "model.layers.1.mlp.experts.3", "model.layers.1.block_sparse_moe.experts.3"
    parts = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    assert {part: names[f"{experts}.{part}"] for part in parts} == {
        part: f"{on_disk}.{name}" for part, name in parts.items()
    }


def test_routers_are_not_quantized():
    model = tiny_moe("qwen2_moe")
    unfuse(model)
    plan = make_plan(model, QuantConfig(group_size=16))
    planned = {layer.name.rpartition(".")[2] for layer in plan.layers}
    skipped = {item.name.rpartition(".")[2]: item.reason for item in plan.skipped}
    assert {"gate_proj", "up_proj", "down_proj"} <= planned
    assert not {"gate", "shared_expert_gate"} & planned
    assert "router" in skipped["shared_expert_gate"]
    assert "router" in skipped["gate"]
    assert any("shared_expert.gate_proj" in layer.name for layer in plan.layers)


def test_experts_fused_in_the_files_are_saved_one_by_one(tmp_path):
    model = tiny_moe("qwen3_moe")
    model._weight_conversions = []  # as after loading a file to which no conversion applied
    with torch.no_grad():
        expected = model(TOKENS).logits
    modules = unfuse(model)
    assert all(module.stored_fused for module in modules.values())
    assert set(expert_names(model)) == set(expert_names(model).values())
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, expected)


def test_model_without_experts_is_unchanged():
    model = tiny_model("llama")
    before = dict(model.named_modules())
    assert unfuse(model) == {}
    assert dict(model.named_modules()) == before
    assert unfuse(nn.Linear(2, 2)) == {}


def test_choice_beyond_the_last_expert_is_ignored():
    experts = unfuse(tiny_moe("qwen3_moe"))["model.layers.0.mlp.experts"]
    x, index, weights = expert_inputs()
    index[:, 1] = EXPERTS
    alone = experts(x, index[:, :1], weights[:, :1])
    torch.testing.assert_close(experts(x, index, weights), alone)


def test_routes_follow_the_router():
    _, index, _ = expert_inputs(k=3)
    for expert, route in enumerate(routes_of(index, EXPERTS)):
        tokens, slots = (index == expert).nonzero(as_tuple=True)
        assert torch.equal(route.tokens, tokens)
        assert torch.equal(route.slots, slots)
        assert torch.equal(route.chosen, tokens)


def test_experts_without_a_gate():
    config = AutoConfig.for_model(
        "nemotron_h", hidden_size=HIDDEN, moe_intermediate_size=INNER, n_routed_experts=EXPERTS
    )
    config._experts_implementation = "eager"
    fused = NemotronHExperts(config)
    for parameter in fused.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, index, weights = expert_inputs()
    expected = fused(x, index, weights)
    unfused = RoutedExperts(fused, layout_of(fused))
    assert set(dict(unfused.get_submodule("0").named_children())) == {"up_proj", "down_proj"}
    torch.testing.assert_close(unfused(x, index, weights), expected)


@use_experts_implementation
class ClampedExperts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER))
        self.limit = 0.5

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return gate.clamp(max=self.limit) * (up + 1)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise AssertionError("not run")


def test_custom_activation_is_kept():
    fused = ClampedExperts(SimpleNamespace())
    gate_up, down = fused.gate_up_proj.detach(), fused.down_proj.detach()
    x, index, weights = expert_inputs(k=1)
    expected = torch.stack(
        [
            weights[t, 0] * (down[e] @ fused._apply_gate(gate_up[e] @ x[t]))
            for t, e in enumerate(index[:, 0].tolist())
        ]
    )
    torch.testing.assert_close(
        RoutedExperts(fused, layout_of(fused))(x, index, weights), expected, rtol=1e-4, atol=1e-4
    )


def test_unsupported_structures_have_a_reason():
    fused = ClampedExperts(SimpleNamespace())
    assert in_files("x", layout_of(fused), []).fused
    fused.extra = nn.Parameter(torch.zeros(1))
    assert "other weights" in layout_of(fused)
    unknown = nn.Module()
    unknown.weight = nn.Parameter(torch.zeros(2, 3, 4))
    assert layout_of(unknown) is None  # no experts: listed as a parameter that is used in its own way
    unknown.num_experts = 2
    assert "not one of transformers' fused experts" in layout_of(unknown)


def test_gradients_reach_every_chosen_expert():
    model = tiny_moe("qwen3_moe")
    unfuse(model)
    model(torch.stack([s["input_ids"] for s in random_sequences(2, 20)])).logits.sum().backward()
    experts = unfused_modules(model)["model.layers.0.mlp.experts"]
    assert experts.get_submodule("0.down_proj").weight.grad.abs().sum() > 0
    assert experts.get_submodule("5.down_proj").weight.grad is None


def test_notes_on_experts_stay_with_other_bits():
    model = tiny_moe("gpt_oss")
    unfuse(model)
    plan = make_plan(model, QuantConfig(group_size=16))
    changed = with_settings(plan, {layer.name: (8, 32) for layer in plan.layers})
    assert sum("in fused tensors" in note for note in plan.notes) == 1
    assert [note for note in changed.notes if "in fused tensors" in note] == [
        note for note in plan.notes if "in fused tensors" in note
    ]
