"""Which layers must be alike, what they may get, and how many bytes that takes."""

import pytest
import torch

from fewbit.checkpoint.layout import pack
from fewbit.config import QuantConfig
from fewbit.mixed_precision.settings_groups import Choice, make_groups, stored_bytes
from fewbit.planning import LayerPlan, Plan, make_plan
from fewbit.quantized_matrix import QuantizedMatrix, group_count, sequential_groups
from models import tiny_model


def plan_of(shapes, config):
    """A plan of layers given as name → (out, in)."""
    layers = tuple(LayerPlan(name, *shape, config.layer(name), "block") for name, shape in shapes.items())
    return Plan(layers, (), ())


def names(groups):
    return [[layer.name for layer in group.layers] for group in groups]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 32, 48])
@pytest.mark.parametrize("shape", [(64, 96), (40, 100)])
def test_stored_bytes_are_those_of_the_packed_tensors(bits, group_size, shape):
    out_features, in_features = shape
    groups = group_count(in_features, group_size)
    codes = QuantizedMatrix(
        torch.zeros(shape, dtype=torch.uint8),
        torch.ones(out_features, groups, dtype=torch.float16),
        torch.ones(out_features, groups, dtype=torch.int16),
        sequential_groups(in_features, group_size),
        bits,
        group_size,
    )
    packed = sum(tensor.nbytes for tensor in pack(codes, "gptq").values())
    assert stored_bytes(out_features, in_features, Choice(bits, group_size)) == packed


def test_layers_that_engines_merge_are_one_group():
    plan = make_plan(tiny_model("llama", num_hidden_layers=1), QuantConfig())
    endings = [
        {name.rpartition(".")[2] for name in group} for group in names(make_groups(plan, QuantConfig()))
    ]
    assert endings == [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]


def test_all_experts_of_a_block_are_one_group():
    config = QuantConfig()
    experts = [
        f"model.layers.{b}.mlp.experts.{e}.{w}" for b in (0, 1) for e in (0, 1) for w in ("w1", "w2", "w3")
    ]
    plan = plan_of(dict.fromkeys([*experts, "model.layers.0.mlp.shared_expert.w1"], (64, 64)), config)
    assert names(make_groups(plan, config)) == [
        experts[:6],
        experts[6:],
        ["model.layers.0.mlp.shared_expert.w1"],
    ]


def test_group_sizes_divide_the_inputs_of_all_layers_of_a_group():
    config = QuantConfig()
    plan = plan_of({"experts.0.w1": (64, 128), "experts.0.w2": (128, 192)}, config)
    (group,) = make_groups(plan, config)
    assert group.choices == tuple(Choice(bits, size) for bits in (2, 3, 4, 8) for size in (32, 64))


@pytest.mark.parametrize(("group_size", "expected"), [(-1, [-1, 32, 64]), (128, [32, 64])])
def test_one_group_per_row_only_where_the_user_has_it(group_size, expected):
    config = QuantConfig(group_size=group_size)
    (group,) = make_groups(plan_of({"a": (64, 64)}, config), config)
    assert sorted({choice.group_size for choice in group.choices}) == expected


def test_widths_that_no_usual_group_size_divides_keep_the_users():
    config = QuantConfig(group_size=20)
    (group,) = make_groups(plan_of({"a": (64, 80)}, config), config)
    # 3 bits would need padded words, which other engines do not read.
    assert group.choices == (Choice(2, 20), Choice(4, 20), Choice(8, 20))


def test_padded_words_are_chosen_only_where_nothing_else_is_left():
    config = QuantConfig(group_size=5)
    (group,) = make_groups(plan_of({"a": (5, 5)}, config), config)
    assert [choice.bits for choice in group.choices] == [2, 3, 4, 8]


def test_overrides_stay_and_separate_layers_from_their_partners():
    config = QuantConfig(
        override={"q_proj": {"bits": 8}, "up_proj": {"group_size": 64}, "gate_proj": {"damp": 0.1}}
    )
    plan = plan_of({f"0.{name}_proj": (128, 128) for name in ("q", "k", "v", "gate", "up")}, config)
    groups = make_groups(plan, config)
    assert names(groups) == [["0.q_proj"], ["0.k_proj", "0.v_proj"], ["0.gate_proj"], ["0.up_proj"]]
    assert {choice.bits for choice in groups[0].choices} == {8}
    assert {choice.group_size for choice in groups[0].choices} == {32, 64, 128}
    assert {choice.group_size for choice in groups[3].choices} == {64}
    assert {choice.bits for choice in groups[3].choices} == {2, 3, 4, 8}
    assert len(groups[1].choices) == len(groups[2].choices) == 12
