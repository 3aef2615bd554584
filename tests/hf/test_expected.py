"""Checkpoints against the models that their config.json names: nothing missing is overlooked or made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fewbit
from checkpoint_samples import edit_json, rewrite
from fewbit.checkpoint.safetensors_file import TensorInfo
from fewbit.hf.model_check import UNBUILDABLE, check_numbers, expected
from fewbit.verification import uneven_blocks, verify
from models import FAMILIES, random_sequences, save_tiny, tiny_model
from tiny_gptq import FAMILIES as PEER_FAMILIES
from tiny_gptq import llama, write_checkpoint


def texts(folder: Path) -> list[str]:
    return [f"{problem.where}: {problem.what}" for problem in verify(folder).problems]


def packed_like_peers(folder: Path, model, **options) -> Path:
    write_checkpoint(folder, model, **options)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_whole_checkpoints_raise_no_alarm(tmp_path: Path, family: str, tied: bool) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    assert texts(packed_like_peers(tmp_path, model, group_size=16)) == []


@pytest.mark.parametrize("family", PEER_FAMILIES)
def test_peers_folders_raise_no_alarm(tmp_path: Path, family: str) -> None:
    assert texts(packed_like_peers(tmp_path / "new", PEER_FAMILIES[family]())) == []
    assert texts(packed_like_peers(tmp_path / "old", PEER_FAMILIES[family](), legacy=True)) == []


@pytest.mark.parametrize("tied", [True, False])
def test_a_quantized_head_raises_no_alarm(tmp_path: Path, tied: bool) -> None:
    model = llama(tie=tied)
    if tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.all_tied_weights_keys = {}
    assert texts(packed_like_peers(tmp_path, model, lm_head=True)) == []


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_fewbit_writes_raises_no_alarm(tmp_path: Path, family: str, tied: bool) -> None:
    source = save_tiny(tmp_path / "source", family, tie_word_embeddings=tied)
    config = fewbit.QuantConfig(group_size=16, num_samples=4, seq_len=24)
    fewbit.quantize(source, config, dataset=random_sequences(4), output=tmp_path / "out")
    assert texts(tmp_path / "out") == []


def test_a_lost_block_and_a_lost_norm_are_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, llama())

    def lose(tensors) -> None:
        for name in [n for n in tensors if n.startswith("model.layers.1.")] + ["model.norm.weight"]:
            del tensors[name]

    rewrite(tmp_path, lose)
    found = texts(tmp_path)
    assert "model.norm.weight: is missing: LlamaForCausalLM needs it" in found
    assert "model.layers.1.mlp.down_proj.weight: is missing: LlamaForCausalLM needs it" in found
    assert len(found) == 1 + 9


def test_only_the_last_copy_of_a_tied_weight_is_missed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, llama(tie=True))
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert texts(tmp_path) == []
    rewrite(tmp_path, lambda t: t.pop("lm_head.weight"))
    assert texts(tmp_path) == ["model.embed_tokens.weight: is missing: LlamaForCausalLM needs it"]


def test_names_go_through_transformers_renaming(tmp_path: Path) -> None:
    """Old GPT-2 files have no ``transformer.`` in front."""
    write_checkpoint(tmp_path, PEER_FAMILIES["gpt2"]())
    path = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor.clone() for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    assert texts(tmp_path) == []


def test_a_config_that_describes_no_model_is_a_problem(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, llama())
    edit_json(tmp_path / "config.json", lambda c: c.update(hidden_size="wide"))
    assert any("config.json does not describe a LlamaForCausalLM" in text for text in texts(tmp_path))


def test_architectures_of_others_are_left_to_the_blocks(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, llama(num_hidden_layers=4))
    edit_json(tmp_path / "config.json", lambda c: c.update(model_type="x", architectures=["XForCausalLM"]))
    config = json.loads((tmp_path / "config.json").read_text())
    assert expected(tmp_path, config, {}) is None
    assert texts(tmp_path) == []

    def lose(tensors) -> None:
        for name in list(tensors):
            if name.startswith(("model.layers.1.", "model.layers.2.mlp.up_proj.")):
                del tensors[name]

    rewrite(tmp_path, lose)
    assert texts(tmp_path) == [
        "model.layers.1: is missing, but there is a model.layers.3",
        "model.layers.2: lacks mlp.up_proj.weight, which 2 of 3 blocks have",
    ]


def test_other_kinds_of_block_and_dense_layers_are_no_gap() -> None:
    names = [f"h.{i}.attention.qweight" for i in range(3)] + [f"h.{i}.mlp.weight" for i in range(5)]
    names += ["h.3.attention.weight", "h.4.mamba.weight"]
    assert list(uneven_blocks(names)) == []


def test_convolutions_are_told_from_linear_layers(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    config.architectures = ["ViTForImageClassification"]
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = ViTForImageClassification(config)
    tensors = {
        name.replace(".weight", ".qweight") if "projection" in name or "dense" in name else name: TensorInfo(
            tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes
        )
        for name, tensor in model.state_dict().items()
    }
    found = expected(tmp_path, json.loads((tmp_path / "config.json").read_text()), tensors)
    assert found is not None
    assert found.missing == []
    conv = [name for name, kind in found.kinds.items() if kind == "conv2d"]
    assert conv == ["vit.embeddings.patch_embeddings.projection"]


# Keys of published configurations with a count in their name and a width or a size as their value.
WIDTHS = {
    "vocab_size_per_layer_input": 262_144,
    "block_ff_dim": 18_432,
    "layer_rope_theta": 1e7,
    "block_size": 32_768,
}


def test_the_configuration_of_no_architecture_is_refused() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    checked = 0
    for config_class in set(CONFIG_MAPPING.values()):
        try:
            values = config_class().to_dict()
        except (*UNBUILDABLE, ImportError):  # needs arguments, or a package that is not here
            continue
        check_numbers({**values, **WIDTHS})
        checked += 1
    assert checked > 300
