import dataclasses

import pytest
import torch

import fewbit
from fewbit import QuantConfig
from fewbit.config import parse_overrides
from fewbit.errors import ConfigError, FewbitError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"correction": 1.5}, "correction must lie between 0 and 1, or be 'auto'; got 1.5"),
        ({"correction": "none"}, "or be 'auto'; got 'none'"),
        ({"correction": True}, "got True"),
        ({"fast": 1}, "fast must be True or False"),
        ({"tune_steps": 0}, "tune_steps must be a whole number of at least 1"),
        ({"method": "rtn", "tune": True}, "method rtn looks at no activations"),
        ({"method": "rtn", "correction": 0.5}, "method rtn looks at no activations"),
        ({"fast": True, "tune": True}, "leave out fast or those"),
        ({"fast": True, "correction": 0.5}, "leave out fast or those"),
        ({"target_bits": 1.5}, "above 2, at most 9; got 1.5"),
        ({"target_bits": "3"}, "got '3'"),
        ({"bits": 5}, "bits must be one of 2, 3, 4, 8; got 5"),
        ({"bits": True}, "bits must be one of"),
        ({"group_size": 0}, "group_size must be positive, or -1"),
        ({"group_size": -2}, "group_size must be positive, or -1"),
        ({"group_size": 2.5}, "group_size must be an integer"),
        ({"damp": 0}, "damp must lie between 0 and 1"),
        ({"damp": 1}, "damp must lie between 0 and 1"),
        ({"damp": float("nan")}, "damp must lie between 0 and 1"),
        ({"act_order": "yes"}, "act_order must be one of group, none, full"),
        ({"method": "awq"}, "method must be one of gptq, rtn"),
        ({"format": "marlin"}, "format must be one of gptq, gptq_v2"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"sym": 1}, "sym must be True or False"),
        ({"num_samples": 0}, "num_samples must be a whole number of at least 1"),
        ({"seq_len": -5}, "seq_len must be a whole number of at least 1"),
        ({"batch_size": 1.5}, "batch_size must be a whole number"),
        ({"seed": "a"}, "seed must be a whole number"),
        ({"lm_head": "no"}, "lm_head must be True or False"),
        ({"strict": 1}, "strict must be True or False"),
        ({"ignore": None}, "ignore must be a list of regular expressions"),
        ({"override": ["a"]}, "override a dict of regular expression"),
        ({"ignore": ["("]}, "is not a regular expression"),
        ({"override": {"a": {"bits": 7}}}, "bits must be one of"),
        ({"override": {"a": {"bit": 4}}}, "override for 'a' has no setting 'bit'; use bits"),
        ({"override": {"a": "drop"}}, "must be 'skip' or settings"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        QuantConfig(**values)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("bit", "bits"),
        ("refit", "nothing: refit was removed"),
        ("desc_act", "act_order='full'"),
        ("damp_percent", "damp"),
        ("nsamples", "num_samples"),
        ("dynamic", "override and ignore"),
        ("xyzzy", "one of bits, group_size"),
    ],
)
def test_unknown_keys_are_refused_with_a_hint(key, hint):
    with pytest.raises(ConfigError, match=f"QuantConfig has no setting '{key}'; use {hint}"):
        QuantConfig.from_dict({key: 1})


def test_unknown_keywords_are_refused_like_unknown_keys():
    with pytest.raises(ConfigError, match="QuantConfig has no setting 'desc_act'; use act_order='full'"):
        QuantConfig(desc_act=True)
    with pytest.raises(ConfigError, match="QuantConfig has no setting 'groupsize'; use group_size"):
        QuantConfig(groupsize=64)


def test_settings_may_be_a_config_a_dict_or_keywords():
    expected = QuantConfig(bits=3, sym=False)
    assert QuantConfig.of(expected, {}, fewbit.quantize) is expected
    assert QuantConfig.of({"bits": 3, "sym": False}, {}, fewbit.quantize) == expected
    assert QuantConfig.of({"bits": 3}, {"sym": False}, fewbit.quantize) == expected
    assert QuantConfig.of(None, {"bits": 3, "sym": False}, fewbit.quantize) == expected
    assert QuantConfig.of(None, {}, fewbit.quantize) == QuantConfig()


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (None, {"bit": 3}, "fewbit has no argument 'bit'; use bits"),
        (None, {"datset": "a.txt"}, "fewbit has no argument 'datset'; use dataset"),
        ({"bits": 3}, {"bits": 4}, "bits is given twice: in config, and by itself"),
        (QuantConfig(), {"bits": 4}, "bits is given beside config: set it in the config"),
        (4, {}, "config must be a QuantConfig or a dict of its fields; got 4"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(config, settings, message):
    with pytest.raises(ConfigError, match=message):
        QuantConfig.of(config, settings, fewbit.quantize)


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", torch.bfloat16, "torch.bfloat16"])
def test_other_names_of_a_dtype(dtype):
    assert QuantConfig(dtype=dtype).dtype == "bfloat16"


def test_a_group_size_that_fits_is_the_default():
    assert QuantConfig().group_size == "auto"
    assert QuantConfig().defaults.group_size == 128
    with pytest.raises(ConfigError, match="group_size must be an integer"):
        QuantConfig(group_size="automatic")


def test_errors_have_one_root_and_are_value_errors():
    with pytest.raises(FewbitError):
        QuantConfig(bits=1)
    with pytest.raises(ValueError, match="bits"):
        QuantConfig(bits=1)


def test_round_trip_and_frozen():
    config = QuantConfig(
        bits=3, group_size=-1, sym=False, ignore=("head",), override={"down": {"bits": 8}, "q": "skip"}
    )
    assert QuantConfig.from_dict(config.to_dict()) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.bits = 4


def test_layer_settings_follow_ignore_then_the_first_override():
    config = QuantConfig(
        ignore=(r"\.0\.",),
        override={r"down_proj$": {"bits": 8, "group_size": 32}, r"\.1\.": "skip", "down": {"bits": 2}},
    )
    assert config.layer("model.0.down_proj") is None
    assert config.layer("model.1.down_proj") == dataclasses.replace(config.defaults, bits=8, group_size=32)
    assert config.layer("model.1.up_proj") is None
    assert config.layer("model.2.up_proj") == config.defaults
    assert config.layer("model.2.down_proj.x").bits == 2


def test_overrides_from_the_command_line():
    parsed = parse_overrides(["a=b$=bits:8, group-size:32,sym:false,damp:0.05,act_order:full", "q_proj=skip"])
    assert parsed == {
        "a=b$": {"bits": 8, "group_size": 32, "sym": False, "damp": 0.05, "act_order": "full"},
        "q_proj": "skip",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "write REGEX=bits:8,group_size:32 or REGEX=skip"),
        ("=skip", "write REGEX="),
        ("a=", "write REGEX="),
        ("a=bits", "write key:value"),
        ("a=bits:x", "bits in override 'a=bits:x' must be a number"),
        ("a=bitz:4", "has no setting 'bitz'; use bits"),
        ("a=sym:maybe", "must be true or false"),
        ("a=damp:1.2.3", "damp in override 'a=damp:1.2.3' must be a number"),
    ],
)
def test_bad_overrides_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_overrides([text])


def test_the_same_pattern_twice_is_refused():
    with pytest.raises(ConfigError, match="two overrides have the pattern 'x'"):
        parse_overrides(["x=bits:8", "x=group_size:32"])


def test_the_order_of_overrides_is_part_of_the_fingerprint():
    from fewbit.calibration import Calibration
    from fewbit.preparation import fingerprint_of

    empty = Calibration(batches=[], fingerprint="none", tokens=0, sequences=0, source="none")
    rules = {"down": {"bits": 8}, "proj": {"bits": 3}}
    one = fingerprint_of(QuantConfig(override=rules), empty, "w")
    other = fingerprint_of(QuantConfig(override=dict(reversed(rules.items()))), empty, "w")
    assert one["config"] != other["config"]
    assert one == fingerprint_of(QuantConfig(override=dict(rules)), empty, "w")


def test_fast_means_no_correction():
    assert QuantConfig(fast=True).effective_correction == 0
    assert QuantConfig().effective_correction == "auto"
    assert QuantConfig(correction=0.3).effective_correction == 0.3


def test_presets_leave_what_was_asked_for():
    best = fewbit.QuantConfig(quality="best")
    assert (best.tune, best.distill, best.rotate) == (True, True, False)
    assert fewbit.QuantConfig(quality="best", rotate=True).rotate
    assert fewbit.QuantConfig(quality="fast").fast
    assert fewbit.QuantConfig.from_dict(best.to_dict()) == best
    with pytest.raises(ConfigError, match="rotate must be True or False, not 'yes'"):
        fewbit.QuantConfig(rotate="yes")
