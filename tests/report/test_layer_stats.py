"""Locations of layers, and statistics over their records."""

import pytest

from fewbit.planning import block_of
from fewbit.report.layer_stats import (
    Location,
    error_measure,
    kind_rows,
    location_of_skipped,
    locations,
    mean,
)
from report_samples import dense_layers, expert_layers, layer


@pytest.mark.parametrize(
    ("name", "stack", "block", "kind"),
    [
        ("model.layers.3.self_attn.q_proj", "model.layers", 3, "self_attn.q_proj"),
        ("model.layers.3.mlp.experts.17.down_proj", "model.layers", 3, "mlp.experts.*.down_proj"),
        ("h.0.block_sparse_moe.experts.0.w1", "h", 0, "block_sparse_moe.experts.*.w1"),
        ("layers.1.experts.4.experts.5.up", "layers", 1, "experts.*.experts.*.up"),
        ("encoder.block.0.layer.0.SelfAttention.q", "encoder.block", 0, "layer.0.SelfAttention.q"),
        ("lm_head", "", None, "lm_head"),
        ("model.vision.projector", "", None, "model.vision.projector"),
        ("0", "", 0, ""),
        ("layers.2", "layers", 2, ""),
    ],
)
def test_location(name, stack, block, kind):
    assert locations([{"name": name, "block": block_of(name)}]) == [Location(stack, block, kind)]


def test_many_numbered_kinds_are_merged():
    layers = [layer(f"layers.{block}.branch.{number}.proj") for block in range(2) for number in range(50)]
    found = locations(layers)
    assert {location.kind for location in found} == {"branch.*.proj"}
    few = locations(layers[:10])
    assert {location.kind for location in few} == {f"branch.{number}.proj" for number in range(10)}


def test_locations_of_skipped_layers():
    found = locations([*dense_layers(2), *expert_layers(1, 2)])
    assert location_of_skipped("model.layers.7.mlp.down_proj", found) == Location(
        "model.layers", 7, "mlp.down_proj"
    )
    assert location_of_skipped("model.layers.0.mlp.experts.9.up_proj", found).kind == "mlp.experts.*.up_proj"
    assert location_of_skipped("model.layers.0.mlp.gate", found) is None
    assert location_of_skipped("lm_head", found) is None


def test_kind_rows():
    layers = [*dense_layers(3), layer("lm_head", (100, 50), bits=8, group_size=-1, method="rtn", tokens=0)]
    layers[0].update(true_error=None)
    layers[7].update(true_error=float("nan"))
    layers[14].update(true_error=0.25)
    rows = {row.kind: row for row in kind_rows(layers, locations(layers))}
    assert list(rows)[-1] == "lm_head"
    q = rows["self_attn.q_proj"]
    assert (q.layers, q.shapes, q.settings, q.error, q.worst["true_error"]) == (
        3,
        "576 × 576",
        "4 bits, group 64",
        0.25,
        0.25,
    )
    assert q.worst["name"] == "model.layers.2.self_attn.q_proj"
    assert rows["lm_head"].settings == "8 bits, one group, rtn"
    assert rows["lm_head"].thin == 0  # round-to-nearest was asked for: tokens do not matter
    assert rows["lm_head"].error is None
    assert sum(row.stored_bytes for row in rows.values()) == sum(item["stored_bytes"] for item in layers)


def test_a_kind_with_several_settings_and_too_few_tokens():
    layers = [
        layer(f"h.{i}.proj", bits=bits, group_size=g, tokens=10 + 9999 * i)
        for i, (bits, g) in enumerate([(4, 64), (2, 32)])
    ]
    (row,) = kind_rows(layers, locations(layers))
    assert row.settings == "2, 4 bits; groups 32, 64"
    assert (row.fewest, row.most, row.thin) == (10, 10009, 1)


def test_true_error_is_preferred():
    assert error_measure([layer("a.0.x")]) == "output_error"
    assert error_measure([layer("a.0.x"), layer("a.1.x", true_error=0.1)]) == "true_error"


def test_mean_of_what_is_known():
    assert mean([0.1, None, float("nan"), 0.3]) == pytest.approx(0.2)
    assert mean([None]) is None
