"""Names → stacks, blocks and kinds; every layer's figures survive the way to the page."""

import pytest

from fewbit.planning import block_of
from fewbit.report.layers import (
    OUTSIDE,
    Place,
    columns,
    error_measure,
    kind_rows,
    mean,
    place_of_skipped,
    places,
    stacks,
)
from report_samples import dense_layers, expert_layers, layer


@pytest.mark.parametrize(
    ("name", "stack", "block", "kind", "numbers"),
    [
        ("model.layers.3.self_attn.q_proj", "model.layers", 3, "self_attn.q_proj", ""),
        ("model.layers.3.mlp.experts.17.down_proj", "model.layers", 3, "mlp.experts.*.down_proj", "17"),
        ("h.0.block_sparse_moe.experts.0.w1", "h", 0, "block_sparse_moe.experts.*.w1", "0"),
        ("layers.1.experts.4.experts.5.up", "layers", 1, "experts.*.experts.*.up", "4.5"),
        ("encoder.block.0.layer.0.SelfAttention.q", "encoder.block", 0, "layer.0.SelfAttention.q", ""),
        ("lm_head", OUTSIDE, None, "lm_head", ""),
        ("model.vision.projector", OUTSIDE, None, "model.vision.projector", ""),
        ("0", "", 0, "", ""),
        ("layers.2", "layers", 2, "", ""),
    ],
)
def test_place(name, stack, block, kind, numbers):
    (place,) = places([{"name": name, "block": block_of(name)}])
    assert place == Place(stack, block, kind, numbers)
    assert place.name == name


def test_every_name_comes_back():
    layers = [*dense_layers(3), *expert_layers(2, 12), layer("lm_head")]
    assert [place.name for place in places(layers)] == [item["name"] for item in layers]


def test_many_numbered_kinds_without_experts_are_taken_together():
    layers = [layer(f"layers.{block}.branch.{number}.proj") for block in range(2) for number in range(50)]
    found = places(layers)
    assert {place.kind for place in found} == {"branch.*.proj"}
    assert [place.name for place in found] == [item["name"] for item in layers]
    few = places(layers[:10])
    assert {place.kind for place in few} == {f"branch.{number}.proj" for number in range(10)}


def test_stacks_keep_the_order_of_the_model_and_put_the_rest_last():
    layers = [layer("lm_head"), *dense_layers(2), layer("vision.blocks.5.mlp"), layer("vision.blocks.3.mlp")]
    names = {stack.name: stack for stack in stacks(places(layers))}
    assert list(names) == ["model.layers", "vision.blocks", OUTSIDE]
    assert names["model.layers"].blocks == (0, 1)
    assert names["model.layers"].kinds[-1] == "mlp.down_proj"
    assert names["vision.blocks"].blocks == (3, 5)
    assert names[OUTSIDE].blocks == (None,)


def test_skipped_layers_have_a_place_only_beside_quantized_ones_of_their_kind():
    found = places([*dense_layers(2), *expert_layers(1, 2)])
    assert place_of_skipped("model.layers.7.mlp.down_proj", found) == Place(
        "model.layers", 7, "mlp.down_proj", ""
    )
    assert place_of_skipped("model.layers.0.mlp.experts.9.up_proj", found).numbers == "9"
    assert place_of_skipped("model.layers.0.mlp.gate", found) is None
    assert place_of_skipped("lm_head", found) is None


def test_columns_hold_every_figure_to_four_digits():
    layers = dense_layers(4)
    table = columns(layers)
    assert table["bits"] == [4]  # a column of equal values is stored once
    assert table["output_error"] == [float(f"{item['output_error']:.4g}") for item in layers]
    expected = [8 * item["stored_bytes"] / (item["out_features"] * item["in_features"]) for item in layers]
    assert table["bits_per_weight"] == pytest.approx(expected, rel=1e-3)


def test_figures_that_json_cannot_hold_become_unknown():
    table = columns(
        [layer("a.0.x", loss=float("inf")), layer("a.1.x", loss=float("nan")), layer("a.2.x", loss=1.0)]
    )
    assert table["loss"] == [None, None, 1.0]


def test_equal_values_of_another_type_are_no_constant_column():
    assert columns([layer("a.0.x", bits=True), layer("a.1.x", bits=1)])["bits"] == [True, 1]


def test_kind_rows():
    layers = [*dense_layers(3), layer("lm_head", (100, 50), bits=8, group_size=-1, method="rtn", tokens=0)]
    layers[0].update(true_error=None)
    layers[7].update(true_error=float("nan"))
    layers[14].update(true_error=0.25)
    rows = {row.kind: row for row in kind_rows(layers, places(layers))}
    assert list(rows)[-1] == "lm_head"
    q = rows["self_attn.q_proj"]
    assert (q.layers, q.shapes, q.settings, q.error, q.worst) == (
        3,
        "576 × 576",
        "4 bits, group 64",
        0.25,
        0.25,
    )
    assert q.worst_name == "model.layers.2.self_attn.q_proj"
    assert rows["lm_head"].settings == "8 bits, one group, rtn"
    assert rows["lm_head"].thin == 0  # round-to-nearest was asked for: tokens do not matter
    assert rows["lm_head"].error is None
    assert sum(row.stored_bytes for row in rows.values()) == sum(item["stored_bytes"] for item in layers)


def test_a_kind_with_several_settings_and_too_few_tokens():
    layers = [
        layer(f"h.{i}.proj", bits=bits, group_size=g, tokens=10 + 9999 * i)
        for i, (bits, g) in enumerate([(4, 64), (2, 32)])
    ]
    (row,) = kind_rows(layers, places(layers))
    assert row.settings == "2, 4 bits; groups 32, 64"
    assert (row.fewest, row.most, row.thin) == (10, 10009, 1)


def test_the_true_error_is_shown_where_the_run_measured_it():
    assert error_measure([layer("a.0.x")]) == "output_error"
    assert error_measure([layer("a.0.x"), layer("a.1.x", true_error=0.1)]) == "true_error"


def test_mean_of_what_is_known():
    assert mean([0.1, None, float("nan"), 0.3]) == pytest.approx(0.2)
    assert mean([None]) is None
