"""What the tables of docs/performance-measurements.md are made of."""

import json

import performance_tables
import pytest
import random_models
import torch
from transformers import LlamaConfig

import fewbit

KERNELS = {
    "machine": {"threads": 2, "read_bandwidth": 10e9, "peaks": {"bfloat16": 4e11}},
    "shapes": {
        "64x64 4 bits g32": {
            "nbytes": 1_000_000,
            "refused": {},
            "tokens": {
                "16": {
                    "Linear": {"minimum": 2e-3, "error": 1e-3},
                    "cpu": {"minimum": 1e-3, "error": 2e-3},
                },
                "1": {
                    "Linear": {"minimum": 1e-3, "error": 1e-3},
                    "cpu": {"minimum": 2e-4, "error": 1e-3},
                    "torch_aten": {"minimum": 1e-3, "error": 1e-3},
                    "Linear (GPTQModel's torch)": {"minimum": 3e-3, "error": 1e-3},
                },
            },
        }
    },
}


def row_of(table, name):
    return next(line for line in table.splitlines() if name in line)


def test_ratios_and_share_of_bandwidth():
    table = performance_tables.kernels(KERNELS)
    cpu = row_of(table, "`cpu`")
    assert "| 0.200 (5.00×) | 1.000 (2.00×) | 50% | 2.0e-03 |" in cpu
    assert "1.000 (3.00×)" in row_of(table, "torch_aten")
    assert "%" not in row_of(table, "| bfloat16 Linear")
    assert "GPTQModel's torch" not in table


def test_the_plot_has_a_line_for_each_candidate():
    from xml.etree import ElementTree

    svg = ElementTree.fromstring(performance_tables.sweep_svg(KERNELS))
    lines = [element for element in svg.iter() if element.tag.endswith("polyline")]
    assert len(lines) == 2
    assert {len(line.get("points").split()) for line in lines} == {1, 2}


def test_model_ratios_refer_to_transformers_bfloat16():
    one = {"prefill": 0.001, "decode": 0.02, "load_seconds": 1.0, "peak_bytes": 2**20}
    models = {"tiny": {"transformers bfloat16": one, "fewbit": one | {"decode": 0.01}}}
    table = performance_tables.decode({"threads": 2, "prefill": 512, "decode": 32, "models": models})
    assert "| 1000.0 (1.00×) | 100.0 (2.00×) |" in row_of(table, "| fewbit")


def test_tables_go_between_their_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- kernels -->\nold\n<!-- /kernels -->\nb\n")
    performance_tables.put(page, "kernels", r"new \1")
    assert page.read_text() == "a\n<!-- kernels -->\nnew \\1\n<!-- /kernels -->\nb\n"
    with pytest.raises(SystemExit, match="no place for it"):
        performance_tables.put(page, "models", "x")


@pytest.mark.parametrize("bits", [3, 4])
def test_random_models_are_checkpoints_that_load(tmp_path, bits):
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**shape, num_key_value_heads=2, vocab_size=50)
    random_models.write(config, tmp_path / "quantized", bits, 32)
    random_models.write(config, tmp_path / "dense", None, 32)
    model = fewbit.load(tmp_path / "quantized")
    assert model.dtype == torch.bfloat16
    assert model(input_ids=torch.arange(5)[None]).logits.isfinite().all()
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
