"""AutoGPTQ's BaseQuantizeConfig and its files."""

import json

import pytest

from fewbit.compat.auto_gptq import BaseQuantizeConfig
from fewbit.errors import CheckpointError, ConfigError


def test_defaults_are_those_of_autogptq():
    assert BaseQuantizeConfig().to_dict() == {
        "bits": 4,
        "group_size": -1,
        "damp_percent": 0.01,
        "desc_act": True,
        "static_groups": False,
        "sym": True,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": None,
        "is_marlin_format": False,
        "quant_method": "gptq",
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, r"bits must be one of 2, 3, 4, 8; got 5"),
        ({"group_size": 0}, r"group_size must be positive, or -1"),
        ({"damp_percent": 0}, r"damp must lie between 0 and 1"),
        ({"damp_percent": 1}, r"damp must lie between 0 and 1"),
    ],
)
def test_values_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        BaseQuantizeConfig(**settings)
    assert isinstance(caught.value, ValueError)  # what AutoGPTQ raised


def test_what_it_becomes_here():
    assert BaseQuantizeConfig().quant_config().act_order == "full"
    assert BaseQuantizeConfig(desc_act=False).quant_config().act_order == "group"
    assert BaseQuantizeConfig(static_groups=True).quant_config().act_order == "group"
    config = BaseQuantizeConfig(3, 64, damp_percent=0.05, sym=False).quant_config(seq_len=7)
    assert (config.bits, config.group_size, config.damp, config.sym, config.seq_len) == (
        3,
        64,
        0.05,
        False,
        7,
    )


def test_round_trip_through_a_file(tmp_path):
    config = BaseQuantizeConfig(bits=3, group_size=64, desc_act=False, model_file_base_name="mine")
    config.save_pretrained(tmp_path)
    assert BaseQuantizeConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize(
    ("name", "wrap"),
    [("quantize_config.json", False), ("quant_config.json", False), ("config.json", True)],
)
def test_three_files(tmp_path, name, wrap):
    values = {"bits": 8, "group_size": 32, "sym": False, "desc_act": False, "quant_method": "gptq"}
    (tmp_path / name).write_text(json.dumps({"quantization_config": values} if wrap else values))
    config = BaseQuantizeConfig.from_pretrained(tmp_path)
    assert (config.bits, config.group_size, config.sym, config.desc_act) == (8, 32, False, False)


def test_other_names_unknown_keys_and_an_absent_sym(tmp_path, caplog):
    (tmp_path / "quantize_config.json").write_text(json.dumps({"w_bit": 4, "q_group_size": 64, "clip": 1}))
    config = BaseQuantizeConfig.from_pretrained(tmp_path)
    assert (config.bits, config.group_size) == (4, 64)
    assert "quantize_config.json: BaseQuantizeConfig has no field for clip" in caplog.text
    assert "quantize_config.json does not say sym" in caplog.text


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("quant_config.json", '{"w_bit": 4, "version": "GEMM"}', r"describes an AWQ checkpoint"),
        (
            "quantize_config.json",
            '{"bits": 4, "group_size": 32, "quant_method": "awq"}',
            r"quant_method .*awq",
        ),
        (
            "quantize_config.json",
            '{"bits": 4, "group_size": 32, "is_marlin_format": true}',
            r"is_marlin_format",
        ),
        ("config.json", "{}", r"config.json has no quantization_config"),
        ("other.json", "{}", r"has none of quantize_config.json, quant_config.json, config.json"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, file, text, message):
    (tmp_path / file).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        BaseQuantizeConfig.from_pretrained(tmp_path)
