import pytest
import torch
from torch import nn

from fewbit import QuantConfig
from fewbit.errors import ConfigError, ModelError
from fewbit.planning import block_of, make_plan, plan_and_group_size
from models import tiny_model


def test_layers_in_blocks_are_taken_and_the_rest_has_a_reason():
    plan = make_plan(tiny_model("llama"), QuantConfig(group_size=16))
    assert len(plan.layers) == 14
    assert plan.layers[0].name == "model.layers.0.self_attn.q_proj"
    assert plan.layers[0].block == "model.layers.0"
    assert [(s.name, s.reason) for s in plan.skipped] == [
        ("lm_head", "output embedding (quantized with lm_head=True, --lm-head)")
    ]
    assert plan.weights == sum(layer.out_features * layer.in_features for layer in plan.layers)


def test_lm_head_ignore_and_override():
    config = QuantConfig(
        group_size=16, lm_head=True, ignore=("k_proj",), override={"layers.1.*v_proj": "skip"}
    )
    plan = make_plan(tiny_model("llama"), config)
    names = [layer.name for layer in plan.layers]
    assert "lm_head" in names
    assert len(names) == 14 + 1 - 2 - 1
    assert {s.reason for s in plan.skipped} == {"asked to stay as it is (ignore or override)"}


def test_outside_the_blocks():
    plan = make_plan(tiny_model("opt"), QuantConfig(group_size=16))
    reasons = {s.name: s.reason for s in plan.skipped}
    assert "outside the repeated blocks" in reasons["model.decoder.project_in"]
    config = QuantConfig(group_size=16, override={"project_in": {"bits": 8}})
    taken = {layer.name: layer for layer in make_plan(tiny_model("opt"), config).layers}
    assert taken["model.decoder.project_in"].settings.bits == 8


def test_every_layer_of_a_model_without_blocks():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 8)
            self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
            self.attention = nn.MultiheadAttention(32, 4)

    plan = make_plan(Plain(), QuantConfig(group_size=16))
    assert [layer.name for layer in plan.layers] == ["first", "second"]
    assert {s.name: s.reason for s in plan.skipped} == {
        "depthwise": "convolution with groups",
        "attention.out_proj": "its weight is used directly, not through its forward",
    }


def test_routers_and_fused_experts_are_listed():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(4, 8, 16))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.q_proj, self.experts = nn.Linear(16, 4), nn.Linear(16, 16), Experts()

    model = nn.Module()
    model.layers = nn.ModuleList([Block(), Block()])
    plan = make_plan(model, QuantConfig(group_size=16))
    assert [layer.name for layer in plan.layers] == ["layers.0.q_proj", "layers.1.q_proj"]
    assert {s.reason for s in plan.skipped} == {
        "router of a mixture of experts",
        "Experts holds a weight of three dimensions that is not one of transformers' fused experts",
    }


@pytest.mark.parametrize("config", [QuantConfig(ignore=("nope",)), QuantConfig(override={"nope": "skip"})])
def test_a_pattern_that_matches_nothing_is_refused(config):
    with pytest.raises(
        ConfigError, match="the pattern 'nope' matches no layer of this model; its layers are called"
    ):
        make_plan(tiny_model("llama"), config)


def test_nothing_to_quantize():
    with pytest.raises(ModelError, match="nothing to quantize in LlamaForCausalLM: 15 × asked to stay"):
        make_plan(tiny_model("llama"), QuantConfig(ignore=(".*",)))
    with pytest.raises(ModelError, match="it has no linear layers"):
        make_plan(nn.Embedding(4, 4), QuantConfig())


@pytest.mark.parametrize(
    ("widths", "config", "expected"),
    [
        ((128, 256), {}, 128),
        ((64, 128), {}, 64),
        ((64, 96), {}, 32),
        ((48, 80), {}, 128),  # none divides them
        ((64, 96), {"group_size": 128}, 128),  # as asked
        ((64, 96), {"override": {"down_proj": {"group_size": -1}}}, 64),
        ((64, 96), {"ignore": ("down_proj",)}, 64),
    ],
)
def test_the_group_size_that_fits(widths, config, expected):
    model = tiny_model("llama", hidden_size=widths[0], intermediate_size=widths[1])
    plan, fitted = plan_and_group_size(model, QuantConfig(**config))
    assert fitted.group_size == expected
    free = [layer for layer in plan.layers if "override" not in config or "down_proj" not in layer.name]
    assert {layer.settings.group_size for layer in free} == {expected}
    noted = any(note.startswith(f"group size {expected}: the largest of 128, 64, 32") for note in plan.notes)
    assert noted is (expected != 128)


def test_widths_that_groups_do_not_divide_are_noted():
    notes = make_plan(tiny_model("llama"), QuantConfig(bits=3, group_size=32)).notes
    assert any("have 48 inputs, which group size 32 does not divide" in note for note in notes)
    assert any("14 layers have a width that does not fill whole 32-bit words" in note for note in notes)
    assert (
        make_plan(tiny_model("llama"), QuantConfig(group_size=16)).notes == ()
    )  # 48 × 4 bits are whole words
    assert (
        make_plan(tiny_model("llama", hidden_size=64, intermediate_size=96), QuantConfig(group_size=32)).notes
        == ()
    )


def test_block_names():
    assert block_of("model.layers.12.mlp.experts.3.w1") == "model.layers.12"
    assert block_of("encoder.block.0.layer.1.q") == "encoder.block.0"
    assert block_of("0") == "0"
    assert block_of("lm_head") == "lm_head"


def test_a_broad_override_does_not_reach_the_head():
    plan = make_plan(tiny_model("llama"), QuantConfig(override={".": {"group_size": 16}}))
    assert "lm_head" not in [layer.name for layer in plan.layers]
    plan = make_plan(tiny_model("llama"), QuantConfig(group_size=16, override={"lm_head": {"bits": 8}}))
    assert {layer.name: layer.settings.bits for layer in plan.layers}["lm_head"] == 8
