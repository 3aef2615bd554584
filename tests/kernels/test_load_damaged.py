"""Checkpoints that open, but are not whole or not what their config.json says: refused before memory is taken."""

import json
import re
import resource
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import fewbit
from fewbit.cli.main import app
from fewbit.errors import CheckpointError
from fewbit.verification import verify
from tiny_gptq import llama, write_checkpoint

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path, llama())
    return tmp_path


def rewrite(folder, change):
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_missing_weight_is_not_made_up(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(
        CheckpointError, match=r"lacks 1 weights of LlamaForCausalLM, .* model.norm.weight: get it"
    ):
        fewbit.load(folder)


def test_a_weight_of_another_shape_is_refused(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}))
    message = r"do not fit together: model.norm.weight has shape \(7,\), but LlamaForCausalLM needs \(96,\)"
    with pytest.raises(CheckpointError, match=message):
        fewbit.load(folder)
    assert ("model.norm.weight", "has shape (7,), but LlamaForCausalLM needs (96,)") in verify(
        folder
    ).problems


def test_whole_numbers_are_no_weights(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(96, dtype=torch.int32)}))
    with pytest.raises(CheckpointError, match=r"is torch.int32, but LlamaForCausalLM needs floating-point"):
        fewbit.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1e.09, which cannot be"),
        ({"num_hidden_layers": 10**4000}, "num_hidden_layers 1e.300, which cannot be"),
        ({"num_hidden_layers": 900}, "far more than the files hold"),
        ({"num_hidden_layers": 10**6}, "far more than the files hold"),
        ({"num_hidden_layers": 190}, "lacks"),
        ({"vocab_size": 10**12}, r"needs \(1000000000000, 96\)"),
        ({"vocab_size": 2**62}, "does not describe|needs"),
        ({"hidden_size": 10**9}, "needs|does not describe"),
        ({"num_labels": 10**9}, "num_labels 1e.09, which cannot be"),
        ({"num_attention_heads": 0}, "cannot read the configuration|does not describe"),
        ({"hidden_act": "no such thing"}, "does not describe a LlamaForCausalLM|cannot load"),
        ({"rope_parameters": {"rope_type": "no such thing"}}, "does not describe|cannot read"),
        ({"architectures": {"a": 1}}, None),
        ({"architectures": 7}, None),
        ({"architectures": ["PreTrainedModel"]}, "."),
        ({"architectures": ["torch"]}, "."),
        ({"architectures": ["AutoConfig"]}, "."),
        ({"model_type": ["llama"]}, "."),
        ({"dtype": "no such thing"}, "."),
        ({"id2label": {"x": "y"}}, "."),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, "self": 1}},
            "cannot load",
        ),
    ],
)
def test_config_of_another_model(folder, changes, message):
    change_config(folder, **changes)
    refused = ""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    try:
        fewbit.load(folder)
    except CheckpointError as error:
        refused = str(error)
    assert re.search(message or "^$", refused), refused
    verify(folder)
    assert CliRunner().invoke(app, ["inspect", str(folder), "-v"]).exit_code in (0, 1)
    assert time.perf_counter() - start < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KB


@pytest.mark.parametrize("value", [-1, 3, 2**31 - 1])
def test_groups_out_of_range(folder, value):
    rewrite(folder, lambda tensors: tensors[f"{Q}.g_idx"].__setitem__(0, value))
    with pytest.raises(CheckpointError, match=rf"layer {Q}: g_idx holds .* with 3 groups 0 … 2 are valid"):
        fewbit.load(folder)


def test_control_characters_are_shown_escaped(folder):
    change_config(
        folder,
        model_type="[/red]\x1b]0;owned\x07",
        quantization_config={
            "quant_method": "gptq", "bits": 4, "group_size": 32, "meta": {"quantizer": ["[link=x]\x1b[2J"]}
        },
    )  # fmt: skip
    result = CliRunner().invoke(app, ["inspect", str(folder), "-v"])
    assert result.exit_code == 0, result.exception
    assert "\x1b" not in result.output
    assert r"[/red]\x1b]0;owned\x07" in result.output
    assert r"[link=x]\x1b[2J" in result.output


def test_an_order_without_g_idx_is_said(folder, caplog):
    """A writer with static groups may leave g_idx out; with any other the weights are wrong."""

    def lose(tensors):
        for name in [name for name in tensors if name.endswith(".g_idx")]:
            del tensors[name]

    rewrite(folder, lose)
    fewbit.load(folder)
    assert "no g_idx" not in caplog.text
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    change_config(folder, quantization_config={**quantization, "desc_act": True})
    fewbit.load(folder)
    assert "layers have no g_idx although the configuration says desc_act" in caplog.text
