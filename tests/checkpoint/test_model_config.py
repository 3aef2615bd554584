import json

import pytest
from transformers import AutoConfig, LlamaConfig, PhiConfig

from fewbit.checkpoint.writer import with_legacy_keys

YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 512}


def test_older_keys_are_added() -> None:
    config = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.5}}
    assert with_legacy_keys(config) == config | {"rope_theta": 1e5, "partial_rotary_factor": 0.5}


def test_rope_scaling_leaves_out_the_other_keys() -> None:
    found = with_legacy_keys({"rope_parameters": YARN})
    assert found["rope_theta"] == 5e5
    assert found["rope_scaling"] == {key: value for key, value in YARN.items() if key != "rope_theta"}


def test_image_sections_are_kept_with_the_default_type() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
    found = with_legacy_keys({"model_type": "some_vl", "text_config": {"rope_parameters": rope}})
    assert found["text_config"]["rope_scaling"] == {"rope_type": "default", "mrope_section": [2, 2, 2]}
    assert "rope_theta" not in found


def test_older_files_stay_as_they_are() -> None:
    config = {"rope_theta": 1e4, "rope_scaling": None, "vocab_size": 3}
    assert with_legacy_keys(config) == config


def test_keys_that_are_there_are_not_overwritten() -> None:
    config = {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}
    assert with_legacy_keys(config) == config


def test_nested_rope_parameters_get_no_legacy_keys() -> None:
    nested = {
        "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 1e4},
    }
    assert with_legacy_keys({"rope_parameters": nested}) == {"rope_parameters": nested}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 1e5}),
        LlamaConfig(rope_parameters=YARN, max_position_embeddings=2048),
        PhiConfig(rope_parameters={"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.25}),
    ],
    ids=["default", "yarn", "partial"],
)
def test_transformers_reads_the_same(config: LlamaConfig, tmp_path) -> None:
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    with_older_keys = with_legacy_keys(values)
    assert with_older_keys.keys() > values.keys()
    path.write_text(json.dumps(with_older_keys))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters
