"""One matrix in the file, several layers in memory: decided in the plan, never an error after the work."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import NomicBertConfig, NomicBertModel

import fewbit
from fewbit.planning import make_plan
from fewbit.verification import verify
from models import random_sequences

CONFIG = fewbit.QuantConfig(group_size=16, seq_len=24, num_samples=4)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = NomicBertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=120
    )
    return NomicBertModel(config).eval()


def test_the_plan_says_so(model):
    plan = make_plan(model, CONFIG)
    reasons = {item.name: item.reason for item in plan.skipped}
    for part in "qkv":
        assert "Wqkv" in reasons[f"layers.0.self_attn.{part}_proj"]
    assert [layer.name for layer in plan.layers if ".0." in layer.name] == [
        "layers.0.mlp.gate_proj",
        "layers.0.mlp.up_proj",
        "layers.0.mlp.down_proj",
        "layers.0.self_attn.o_proj",
    ]


def test_the_rest_is_quantized_from_a_folder_and_in_memory(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    fewbit.quantize(tmp_path / "model", CONFIG, dataset=random_sequences(4), output=tmp_path / "out")
    assert not verify(tmp_path / "out").problems
    source, result = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    fused = "encoder.layers.0.attn.Wqkv.weight"
    assert torch.equal(result[fused], source[fused])
    ids = torch.arange(9)[None]
    loaded = fewbit.load(tmp_path / "out", dtype=torch.float32)(ids).last_hidden_state
    assert (loaded - model(ids).last_hidden_state).norm() < 0.3 * loaded.norm()
    in_memory = fewbit.quantize(model, CONFIG, dataset=random_sequences(4))
    assert torch.allclose(in_memory(ids).last_hidden_state, loaded, atol=1e-4)
    in_memory.save_pretrained(tmp_path / "saved")
    again = fewbit.load(tmp_path / "saved", dtype=torch.float32)(ids).last_hidden_state
    assert torch.allclose(again, loaded, atol=1e-4)
