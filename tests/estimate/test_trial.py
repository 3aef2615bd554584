"""What one batch shows of a model: rows, shared inputs, held bytes, kinds of blocks."""

import pytest
import torch

from fewbit import QuantConfig
from fewbit.estimate.trial import block_kinds, run_trial
from fewbit.modeling.experts import unfuse
from fewbit.pipeline.streaming import Weights
from fewbit.planning import make_plan
from fewbit.profiling import Profiler
from models import random_sequences, tiny_model


def tried(model, config=None, length=24):
    plan = make_plan(model, config or QuantConfig(group_size=16))
    batch = {"input_ids": random_sequences(1, length)[0]["input_ids"][None]}
    return run_trial(model, Weights(model), plan, batch, Profiler())


def test_a_llama_block_as_its_code_has_it():
    trial = tried(tiny_model("llama"))
    pauses = {name.removeprefix("model.layers.0."): pause for name, pause in trial.pauses.items()}
    assert trial.kinds == {"model.layers.0": ["model.layers.0", "model.layers.1"]}
    assert list(trial.seconds) == ["model.layers.0"]
    assert all(pause.rows == 24 for pause in pauses.values())
    first = {name: pause.first.removeprefix("model.layers.0.") for name, pause in pauses.items()}
    assert first == {
        "self_attn.q_proj": "self_attn.q_proj",
        "self_attn.k_proj": "self_attn.q_proj",
        "self_attn.v_proj": "self_attn.q_proj",
        "self_attn.o_proj": "self_attn.o_proj",
        "mlp.gate_proj": "mlp.gate_proj",
        "mlp.up_proj": "mlp.gate_proj",
        "mlp.down_proj": "mlp.down_proj",
    }


def test_held_bytes_are_the_tensors_that_a_paused_forward_needs():
    pauses = tried(tiny_model("llama")).pauses
    d, inner, tokens = 48, 80, 24
    # At down_proj, from the second block on: embeddings, input of the block, residual, input of the MLP; and the
    # gated product.
    states = 4 * tokens * (4 * d + inner)
    rotary = 2 * 4 * tokens * 12
    held = pauses["model.layers.0.mlp.down_proj"].held
    assert states + rotary <= held <= 1.1 * (states + rotary)
    # The output of gate_proj through the activation is the only difference to up_proj.
    waiting = pauses["model.layers.0.mlp.up_proj"].held - pauses["model.layers.0.mlp.gate_proj"].held
    assert waiting == 4 * tokens * inner


def test_the_model_is_as_before():
    model = tiny_model("llama")
    forward = dict(model.model.layers[0].mlp.down_proj.__dict__)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tried(model)
    assert model.model.layers[0].mlp.down_proj.__dict__.keys() == forward.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_of_a_large_block_only_the_beginning_of_a_batch_runs(monkeypatch):
    monkeypatch.setattr("fewbit.estimate.trial._OPERATIONS", 1.0)
    monkeypatch.setattr("fewbit.estimate.trial._FEWEST_TOKENS", 8)
    short, whole = tried(tiny_model("llama"), length=24), tried(tiny_model("llama"), length=8)
    assert short.tokens == 8
    assert short.pauses.keys() == whole.pauses.keys()
    assert all(short.pauses[name].held == whole.pauses[name].held for name in whole.pauses)


def test_blocks_with_other_settings_are_kinds_of_their_own():
    config = QuantConfig(group_size=16, override={r"layers\.1\..*q_proj": {"bits": 8}})
    kinds = block_kinds(make_plan(tiny_model("llama", num_hidden_layers=3), config))
    assert list(kinds.values()) == [["model.layers.0", "model.layers.2"], ["model.layers.1"]]


@pytest.mark.parametrize("family", ["gpt2", "bloom", "falcon", "t5"])
def test_other_families(family):
    model = tiny_model(family)
    plan = make_plan(model, QuantConfig(group_size=16))
    batch = {"input_ids": random_sequences(1)[0]["input_ids"][None]}
    if family == "t5":
        batch["decoder_input_ids"] = batch["input_ids"]
    trial = run_trial(model, Weights(model), plan, batch, Profiler())
    assert len(trial.pauses) == sum(layer.block in trial.kinds for layer in plan.layers)
    assert all(pause.rows == 24 and pause.held > 0 for pause in trial.pauses.values())
    assert trial.seconds.keys() == trial.kinds.keys()


def test_experts_are_known_by_their_router():
    model = tiny_model(
        "mixtral", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    unfuse(model)
    trial = tried(model)
    assert trial.experts_per_token == 2
    assert not any("experts" in name for name in trial.pauses)
    assert len(trial.pauses) == 4
