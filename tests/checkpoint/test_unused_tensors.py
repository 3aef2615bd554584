"""Tensors of the source that the model class has no parameter for are in the checkpoint, bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import fewbit
from fewbit.estimate import estimate
from fewbit.verification import verify

UNUSED = {
    "mtp.layers.0.self_attn.q_proj.weight": torch.randn(8, 8).bfloat16(),
    "mtp.norm.weight": torch.ones(8, dtype=torch.float64),
    "model.layers.7.eh_proj.weight": torch.randn(4, 4).half(),
}


@pytest.mark.parametrize("ignored", [None, [r"mtp.*", r"model\.layers\.7.*"]], ids=["reported", "ignored"])
def test_they_are_copied_and_noted(model_folder, text_file, tmp_path, monkeypatch, ignored):
    """Whether transformers reports them, or ignores them as it does the extra layers of DeepSeek-V3 and GLM-4."""
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", ignored)
    path = model_folder / "model.safetensors"
    save_file({**load_file(path), **UNUSED}, path, metadata={"format": "pt"})
    config = fewbit.QuantConfig(group_size=16, seq_len=32, num_samples=4)
    expected = estimate(model_folder, config, dataset=text_file, output=tmp_path / "out")
    report = fewbit.quantize(model_folder, config, dataset=text_file, output=tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert expected.sizes.quantized + expected.sizes.plain == sum(
        tensor.nbytes for tensor in written.values()
    )
    assert report.result_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    for name, tensor in UNUSED.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor)
    (note,) = (note for note in report.notes if "copied" in note)
    assert note.startswith("3 tensors of the source belong to no layer of LlamaForCausalLM")
    rules = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["dynamic"]
    assert len(rules) == 2  # other engines must not look for packed tensors there
    assert all(rule.startswith("-:") for rule in rules)
    assert not verify(tmp_path / "out").problems
    fewbit.load(tmp_path / "out")
