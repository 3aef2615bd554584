"""Tensors of the source that the model class has no parameter for are in the checkpoint, bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import fewbit
from fewbit.checkpoint.layout import unpack
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


MTP = {
    "mtp.layers.0.mlp.up_proj.weight": torch.randn(24, 40).bfloat16(),
    "mtp.layers.0.mlp.gate.weight": torch.randn(4, 40).bfloat16(),
    "mtp.embed_tokens.weight": torch.randn(30, 40).bfloat16(),
    "mtp.norm.weight": torch.ones(40).bfloat16(),
    "mtp.layers.0.up_proj.bias": torch.ones(24).bfloat16(),
}


@pytest.mark.parametrize(("bits", "sym"), [(2, True), (3, False), (4, True), (8, False)])
def test_matrices_for_multi_token_prediction_are_rounded_if_asked(
    bits, sym, model_folder, text_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"mtp.*"])
    path = model_folder / "model.safetensors"
    save_file({**load_file(path), **MTP}, path, metadata={"format": "pt"})
    config = fewbit.QuantConfig(bits=bits, sym=sym, group_size=16, seq_len=32, num_samples=4, mtp=True)
    expected = estimate(model_folder, config, dataset=text_file, output=tmp_path / "out")
    report = fewbit.quantize(model_folder, config, dataset=text_file, output=tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert expected.sizes.quantized + expected.sizes.plain == sum(t.nbytes for t in written.values())
    name = "mtp.layers.0.mlp.up_proj"
    assert f"{name}.weight" not in written
    parts = {part: written[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
    W, W_hat = MTP[f"{name}.weight"].float(), unpack(parts, bits, 16, "gptq", 40, 24).dequantize()
    step = parts["scales"].float().abs().t().repeat_interleave(16, 1)[:, :40]
    assert ((W - W_hat).abs() < 1.01 * step).float().mean() > 0.9
    assert float((W - W_hat).norm() / W.norm()) < {2: 0.6, 3: 0.3, 4: 0.13, 8: 0.01}[bits]
    for other in set(MTP) - {f"{name}.weight"}:
        assert torch.equal(written[other], MTP[other])
    assert any("1 of them are rounded to nearest instead (mtp)" in note for note in report.notes)
    rules = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["dynamic"]
    assert not any("up_proj" in rule and "mtp" in rule and rule.startswith("-:") for rule in rules)
    assert not verify(tmp_path / "out").problems
    fewbit.load(tmp_path / "out")
