"""One matrix in the file, several layers in memory: each is quantized and written by itself."""

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
    assert not plan.skipped
    assert {f"layers.0.self_attn.{part}_proj" for part in "qkvo"} <= {layer.name for layer in plan.layers}
    # q, k, v of both blocks; gate and up have tensors of their own.
    assert any("holds each by itself" in note and "6 layers" in note for note in plan.notes)


@pytest.mark.parametrize("ignored", [(), ("0.*v_proj",), ("q_proj", "k_proj", "v_proj")])
def test_from_a_folder_and_in_memory(model, ignored, tmp_path):
    config = fewbit.QuantConfig(**{**CONFIG.to_dict(), "ignore": ignored})
    model.save_pretrained(tmp_path / "model")
    fewbit.quantize(tmp_path / "model", config, dataset=random_sequences(4), output=tmp_path / "out")
    assert not verify(tmp_path / "out").problems
    source, result = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    names = names_of(result)
    fused = {f"encoder.layers.{block}.attn.Wqkv" for block in (0, 1)}
    assert {name.removesuffix(".weight") for name in source} >= fused
    if len(ignored) == 3:  # nothing of the fused tensors is quantized: they stay as they are
        assert fused <= names
        assert all(torch.equal(result[f"{name}.weight"], source[f"{name}.weight"]) for name in fused)
    else:
        assert not fused & names
        assert ("encoder.layers.0.self_attn.v_proj.weight" in result) == bool(ignored)
        assert "encoder.layers.0.self_attn.q_proj.qweight" in result
        assert "encoder.layers.1.self_attn.v_proj.qweight" in result
    ids = torch.arange(9)[None]
    loaded = fewbit.load(tmp_path / "out", dtype=torch.float32)(ids).last_hidden_state
    assert (loaded - model(ids).last_hidden_state).norm() < 0.3 * loaded.norm()
    in_memory = fewbit.quantize(model, config, dataset=random_sequences(4))
    assert torch.allclose(in_memory(ids).last_hidden_state, loaded, atol=1e-4)
    in_memory.save_pretrained(tmp_path / "saved")
    assert names_of(load_file(tmp_path / "saved" / "model.safetensors")) == names
    again = fewbit.load(tmp_path / "saved", dtype=torch.float32)(ids).last_hidden_state
    assert torch.allclose(again, loaded, atol=1e-4)


def names_of(tensors):
    return {name.rpartition(".")[0] for name in tensors}
