"""The table of engines: it agrees with every measured checkpoint, and says why not in words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from cells import CELLS, MATRIX, Cell, build_model
from matrix import PARTS, page_with
from measure import MEASURED
from torch import nn

from fewbit.checkpoint.quantization_config import LayerFormat
from fewbit.config import QuantConfig
from fewbit.engines import ENGINES, Contents, Engine, engine, of_plan, unsupported_reasons
from fewbit.kernels.spec import KernelSpec
from fewbit.planning import make_plan

RECORD = json.loads(MEASURED.read_text())
LINEAR = KernelSpec(bits=4, group_size=128, sym=True, act_order=False, in_features=256, out_features=256)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_model()


def contents(
    *layers: tuple[str, KernelSpec], base: KernelSpec = LINEAR, plain: tuple[str, ...] = ()
) -> Contents:
    stated = LayerFormat(base.bits, base.group_size, base.sym, base.act_order)
    return Contents(stated, layers or (("model.layers.0.mlp.down_proj", base),), plain)


def refusals(name: str, **changes: object) -> list[str]:
    return unsupported_reasons(engine(name), contents(base=replace(LINEAR, **changes)))


@pytest.mark.parametrize("name", [entry.name for entry in ENGINES if entry.measured])
def test_the_table_agrees_with_what_was_measured(name: str, model: nn.Module) -> None:
    measured = RECORD[name]["cells"]
    assert [Cell(**settings(found)).name for found in measured] == [cell.name for cell in CELLS]
    for cell, found in zip(CELLS, measured, strict=True):
        config = cell.config()
        reasons = unsupported_reasons(engine(name), of_plan(make_plan(model, config), config))
        if name == "mlx-lm" and (cell.bits, cell.sym) == (2, False) and found["outcome"] == "reads":
            continue  # exact by chance: no zero point is 3, and −scale · 1 and −scale · 2 need no rounding
        assert (found["outcome"] == "reads") == (not reasons), (cell.name, found, reasons)


def settings(found: dict[str, object]) -> dict[str, object]:
    return {key: found[key] for key in ("format", "bits", "group_size", "sym", "act_order", "variation")}


def test_every_combination_was_measured_with_every_engine() -> None:
    # Those of vLLM and SGLang cannot run here; others read the same files.
    assert set(RECORD) == {entry.name for entry in ENGINES if entry.measured or entry.target}
    assert len(MATRIX) == 2 * 4 * 4 * 2 * 2


@pytest.mark.parametrize("page", PARTS, ids=lambda page: page.name)
def test_the_pages_are_made_from_the_record(page: Path) -> None:
    text = page.read_text()
    assert page_with(text, PARTS[page](RECORD)) == text


@pytest.mark.parametrize("entry", [one for one in ENGINES if one.target], ids=lambda one: one.name)
def test_what_the_table_allows_was_read(entry: Engine, model: nn.Module) -> None:
    for cell, found in zip(CELLS, RECORD[entry.name]["cells"], strict=True):
        config = cell.config()
        if not unsupported_reasons(entry, of_plan(make_plan(model, config), config)):
            assert found["outcome"] == "reads", (cell.name, found)


@pytest.mark.parametrize("entry", ENGINES, ids=lambda entry: entry.name)
def test_every_engine_loads_4_bit_symmetric_v1(entry) -> None:
    for group_size in (32, 64, 128):
        assert unsupported_reasons(entry, contents(base=replace(LINEAR, group_size=group_size))) == []


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("vllm", {"bits": 3}, "1 layer: 3 bits; it takes 4 and 8"),
        ("vllm-cpu", {"bits": 8}, "1 layer: 8 bits; it takes 4"),
        ("vllm", {"sym": False}, "1 layer: asymmetric grids; it takes symmetric ones (--sym)"),
        ("vllm", {"group_size": 16}, "1 layer: group size 16; it takes -1, 32, 64 and 128"),
        (
            "vllm",
            {"act_order": True},
            "1 layer: groups in the order of activations; it takes none (--act-order group)",
        ),
        (
            "sglang",
            {"format": "gptq_v2"},
            "1 layer: format gptq_v2, which it takes for gptq and misreads (--format gptq)",
        ),
        ("vllm", {"in_features": 192}, "1 layer: 192 inputs, which groups of 128 do not divide"),
        ("sglang", {"out_features": 72}, "1 layer: 72 outputs, no multiple of 32"),
        ("vllm-cpu", {"in_features": 144, "group_size": -1}, "1 layer: 144 inputs, no multiple of 32"),
        (
            "onnxruntime",
            {"group_size": -1, "in_features": 384},
            "1 layer: group size 384 (the whole row); it takes 16, 32, 64, 128 and 256",
        ),
        (
            "onnxruntime",
            {"act_order": True, "sym": False},
            "1 layer: groups in the order of activations; it takes them at 4 bits, symmetric (--act-order group)",
        ),
        ("vllm", {"kind": "conv2d"}, "1 layer: a convolution"),
    ],
)
def test_reasons(name: str, changes: dict[str, object], reason: str) -> None:
    assert refusals(name, **changes) == [reason]


def test_the_order_of_one_group_means_nothing() -> None:
    assert refusals("vllm", act_order=True, group_size=-1) == []


def test_layers_of_which_an_engine_makes_one_must_be_alike() -> None:
    q, k = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
    other = replace(LINEAR, group_size=64)
    assert unsupported_reasons(engine("vllm"), contents((q, LINEAR), (k, LINEAR))) == []
    expected = (
        "in model.layers.0.self_attn.k_proj+q_proj+v_proj (the same --override and --ignore for all of them)"
    )
    for apart in (contents((q, LINEAR), (k, other)), contents((q, LINEAR), plain=(k,))):
        (reason,) = unsupported_reasons(engine("vllm"), apart)
        assert reason.endswith(expected)
        assert unsupported_reasons(engine("gptqmodel"), apart) == []


def test_what_no_layer_uses_is_checked_where_an_engine_checks_it() -> None:
    down = ("model.layers.0.mlp.down_proj", LINEAR)
    found = unsupported_reasons(engine("vllm"), contents(down, base=replace(LINEAR, bits=3)))
    assert found == ["config.json says of layers without a rule: 3 bits; it takes 4 and 8"]


def test_what_transformers_alone_does_not_look_up() -> None:
    down, other = (
        ("model.layers.0.mlp.down_proj", LINEAR),
        ("model.layers.1.mlp.down_proj", replace(LINEAR, bits=8)),
    )
    named = "for example model.layers.1.mlp.down_proj"
    for mixed, reason in (
        (contents(down, other), f"1 layer: settings of their own, {named}"),
        (contents(down, plain=(other[0], "model.embed_tokens")), f"1 projection not quantized, {named}"),
        (contents(down, ("lm_head", LINEAR)), "lm_head is quantized, which it does not notice"),
    ):
        assert unsupported_reasons(engine("transformers"), mixed) == [reason]
        assert unsupported_reasons(engine("gptqmodel"), mixed) == []


def test_gptqmodel_reads_asymmetric_v1_from_itself_only() -> None:
    asymmetric = contents(base=replace(LINEAR, sym=False))
    reason = "asymmetric grids in format gptq, which it reads from itself only (--format gptq_v2)"
    assert unsupported_reasons(engine("gptqmodel"), asymmetric) == [reason]
    assert unsupported_reasons(engine("gptqmodel"), replace(asymmetric, by_gptqmodel=True)) == []
    assert refusals("gptqmodel", sym=False, format="gptq_v2") == []


def test_with_a_budget_every_choice_must_be_one_that_the_engine_takes(model: nn.Module) -> None:
    config = QuantConfig(target_bits=4.5)
    reasons = unsupported_reasons(engine("vllm"), of_plan(make_plan(model, config), config))
    assert any("2 bits" in reason for reason in reasons)
    assert unsupported_reasons(engine("gptqmodel"), of_plan(make_plan(model, config), config)) == []
