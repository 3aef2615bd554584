from __future__ import annotations

import dataclasses
import json
import random
import re

import pytest

import fewbit
from fewbit.checkpoint.quantization_config import build, parse
from fewbit.config import LayerSettings, QuantConfig
from fewbit.errors import CheckpointError

CONFIG = QuantConfig()
PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.down_proj",
)


def names(blocks: int = 12) -> list[str]:
    return [f"model.layers.{block}.{projection}" for block in range(blocks) for projection in PROJECTIONS]


def with_settings(chosen: dict[str, LayerSettings]) -> dict[str, LayerSettings]:
    return dict.fromkeys(names(), CONFIG.defaults) | chosen


def engine_lookup(dynamic: dict[str, dict], name: str) -> dict | None:
    """What GPTQModel, vLLM and SGLang do with `dynamic`: first `re.match` decides."""
    for pattern, override in dynamic.items():
        if pattern.startswith("-:"):
            if re.match(pattern[2:], name):
                return None
        elif re.match(pattern.removeprefix("+:"), name):
            return override
    return {}


def test_the_keys_of_an_ordinary_checkpoint() -> None:
    result = build(CONFIG, dict.fromkeys(names(), CONFIG.defaults), ["lm_head"], {"damp": 0.01})
    assert result == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "desc_act": False,
        "damp_percent": 0.01,
        "true_sequential": True,
        "checkpoint_format": "gptq",
        "format": "gptq",
        "lm_head": False,
        "meta": {"quantizer": [f"fewbit:{fewbit.__version__}"], "damp": 0.01},
    }
    json.dumps(result)


def test_whole_rows_have_no_order() -> None:
    config = QuantConfig(group_size=-1, act_order="full", override={"v_proj": {"group_size": 16}})
    result = build(
        config, {"h.0.q_proj": config.layer("q_proj"), "h.0.v_proj": config.layer("v_proj")}, [], {}
    )
    assert result["desc_act"] is False
    assert list(result["dynamic"].values()) == [{"group_size": 16, "desc_act": True}]
    assert parse(result).layer("h.0.v_proj").desc_act


def test_full_act_order_is_desc_act() -> None:
    config = QuantConfig(act_order="full", format="gptq_v2", bits=3, group_size=64)
    result = build(config, dict.fromkeys(names(), config.defaults), [], {})
    assert (result["desc_act"], result["checkpoint_format"], result["format"]) == (True, "gptq_v2", "gptq_v2")
    assert parse(result).format == "gptq_v2"


def test_one_projection_in_every_block() -> None:
    wide = dataclasses.replace(CONFIG.defaults, bits=8, group_size=32)
    layers = with_settings({name: wide for name in names() if name.endswith("down_proj")})
    dynamic = build(CONFIG, layers, [], {})["dynamic"]
    assert dynamic == {r"+:model\.layers\.\d+\.mlp\.down_proj(?:\.|$)": {"bits": 8, "group_size": 32}}


def test_one_block_takes_few_patterns() -> None:
    wide = dataclasses.replace(CONFIG.defaults, bits=8)
    layers = with_settings({name: wide for name in names() if ".1." in name})
    dynamic = build(CONFIG, layers, [], {})["dynamic"]
    assert len(dynamic) == 2
    assert engine_lookup(dynamic, "model.layers.1.self_attn.qkv_proj") == {"bits": 8}
    assert engine_lookup(dynamic, "model.layers.11.self_attn.q_proj") == {}


def test_skipped_experts_also_cover_their_merged_name() -> None:
    skipped = [f"model.layers.3.mlp.experts.{e}.{p}_proj" for e in range(8) for p in ("gate", "up", "down")]
    dynamic = build(CONFIG, dict.fromkeys(names(), CONFIG.defaults), skipped, {})["dynamic"]
    assert len(dynamic) == 1
    assert engine_lookup(dynamic, "model.layers.3.mlp.experts") is None
    assert engine_lookup(dynamic, "model.layers.3.mlp.experts.7.up_proj") is None
    assert engine_lookup(dynamic, "model.layers.3.mlp.experts.7.up_proj.qweight") is None
    assert engine_lookup(dynamic, "model.layers.3.mlp.experts.7.router") == {}
    assert engine_lookup(dynamic, "model.layers.3.mlp.experts_gate") == {}


def test_lm_head_has_its_own_key() -> None:
    assert build(CONFIG, {"lm_head": CONFIG.defaults}, [], {}) | {"meta": 0} == build(CONFIG, {}, [], {}) | {
        "meta": 0,
        "lm_head": True,
    }
    wide = build(CONFIG, {"lm_head": dataclasses.replace(CONFIG.defaults, bits=8)}, [], {})
    assert wide["dynamic"] == {r"+:lm_head(?:\.|$)": {"bits": 8}}
    settings = parse(wide)
    assert settings.layer("lm_head").bits == 8
    assert parse(build(CONFIG, {}, ["lm_head"], {})).layer("lm_head") is None


def test_any_mixture_reads_back() -> None:
    rng = random.Random(0)
    choices = [
        CONFIG.defaults,
        dataclasses.replace(CONFIG.defaults, bits=8),
        dataclasses.replace(CONFIG.defaults, group_size=-1, sym=False),
        dataclasses.replace(CONFIG.defaults, act_order="full"),
        None,
    ]
    experts = [f"model.layers.{b}.mlp.experts.{e}.w{i}" for b in range(3) for e in range(4) for i in (1, 2)]
    for _ in range(30):
        drawn = {name: rng.choice(choices) for name in [*names(6), *experts, "score", "a.0.b.1"]}
        layers = {name: settings for name, settings in drawn.items() if settings is not None}
        skipped = [name for name, settings in drawn.items() if settings is None]
        written = build(CONFIG, layers, skipped, {})
        parsed = parse(json.loads(json.dumps(written)))
        for name, settings in drawn.items():
            if settings is None:
                assert parsed.layer(name) is None
                assert engine_lookup(written["dynamic"], name) is None
                continue
            full = settings.act_order == "full"
            assert parsed.layer(name) == (settings.bits, settings.group_size, settings.sym, full)
            for asked in (name, f"{name}.qweight"):
                assert engine_lookup(written["dynamic"], asked).get("bits", 4) == settings.bits


def test_autogptq_without_method_sym_or_format() -> None:
    values = {"bits": 4, "group_size": 128, "damp_percent": 0.01, "model_name_or_path": None}
    settings = parse(values, default_method="gptq")
    assert (settings.format, settings.sym, settings.desc_act, settings.lm_head) == (
        "gptq",
        False,
        False,
        False,
    )
    assert settings.assumed == ("sym", "desc_act", "checkpoint_format")
    assert settings.extra == {"damp_percent": 0.01, "model_name_or_path": None}
    assert parse({**values, "is_marlin_format": False}, default_method="gptq").bits == 4


def test_optimum_lists_the_quantized_modules() -> None:
    settings = parse(
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 64,
            "sym": True,
            "modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.down_proj"]],
        }
    )
    assert settings.layer("model.layers.0.self_attn.q_proj") is not None
    assert settings.layer("model.layers.0.self_attn.k_proj") is None


def test_gptqmodel_writes_method_format_and_dynamic() -> None:
    settings = parse(
        {
            "method": "gptq",
            "format": "gptq_v2",
            "bits": 4,
            "group_size": 128,
            "desc_act": False,
            "sym": False,
            "lm_head": True,
            "dynamic": {r"-:.*\.0\.": {}, r"+:.*gate": {"bits": 8, "group_size": 32}, "lm_head": {"bits": 8}},
            "meta": {"quantizer": "gptqmodel:4.0.0"},
            "pack_dtype": "int32",
        }
    )
    assert settings.format == "gptq_v2"
    assert settings.quantizers == ("gptqmodel:4.0.0",)
    assert settings.layer("m.0.gate") is None
    assert settings.layer("m.1.gate") == (8, 32, False, False)
    assert settings.layer("lm_head").bits == 8
    assert settings.extra == {"method": "gptq", "pack_dtype": "int32"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": None}, "has no quant_method"),
        ({"quant_method": "awq"}, "says quant_method 'awq'; fewbit reads 'gptq' only"),
        ({"quant_method": "compressed-tensors"}, "Load this checkpoint with the tool that made it"),
        ({"bits": 5}, "has bits 5; GPTQ checkpoints have 2, 3, 4, 8"),
        ({"bits": "4"}, "has bits '4'"),
        ({"bits": True}, "has bits True"),
        ({"group_size": 0}, "has group_size 0; it must be positive, or -1"),
        ({"group_size": None}, "has group_size None"),
        ({"sym": "yes"}, "has sym 'yes'; it must be true or false"),
        ({"checkpoint_format": "marlin"}, "has checkpoint_format 'marlin'; fewbit reads gptq and gptq_v2"),
        ({"is_marlin_format": True}, "is_marlin_format: the weights are packed for one GPU kernel"),
        ({"dynamic": ["x"]}, "has dynamic of type list"),
        ({"dynamic": {"(": {}}}, r"dynamic '\(' is not a regular expression"),
        ({"dynamic": {"x": 3}}, "dynamic 'x' must hold settings, not 3"),
        ({"dynamic": {"x": {"bits": 9}}}, "dynamic 'x', has bits 9"),
        ({"modules_in_block_to_quantize": "q_proj"}, "it must be a list of names"),
        ({"modules_in_block_to_quantize": [[1]]}, "it must be a list of names"),
    ],
)
def test_what_cannot_be_meant_is_refused(change: dict, message: str) -> None:
    values = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True} | change
    if values["quant_method"] is None:
        del values["quant_method"]
    with pytest.raises(CheckpointError, match=message):
        parse(values)
