"""Models with encoders beside the language model, from folder to checkpoint and back."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_configs import classes, model_pairs, tiny_config
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

import fewbit
from fewbit.errors import CalibrationError
from fewbit.modeling.multimodal import parts_of
from fewbit.planning import make_plan
from models import save_tiny, tiny_model, tiny_tokenizer
from vision_models import (
    llava_samples,
    qwen2_vl_samples,
    tiny_llava,
    tiny_qwen2_vl,
    tiny_whisper,
    whisper_samples,
)

CONFIG = {"group_size": 16, "seq_len": 64}


def saved(model, folder):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def quantized(folder, samples, output, **options):
    return fewbit.quantize(
        folder, fewbit.QuantConfig(**{**CONFIG, **options}), dataset=samples, output=output
    )


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    ("family", "language", "encoders"),
    [
        ("llava", ["model.language_model"], {"model.vision_tower": "images"}),
        ("qwen3_vl", ["model.language_model"], {"model.visual": "images and videos"}),
        ("mllama", ["model.language_model"], {"model.vision_model": "images"}),
        ("blip-2", ["language_model"], {"vision_model": "images", "qformer": "images"}),
        ("kosmos-2", ["text_model"], {"vision_model": "images"}),
    ],
)
def test_parts_of_a_model_are_known_by_what_they_read(family, language, encoders):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family))
    parts = parts_of(model)
    assert list(parts.language) == language
    assert dict(parts.encoders) == encoders


def test_models_of_one_part_have_no_encoders():
    with torch.device("meta"):
        vision = AutoModel.from_config(AutoConfig.for_model("vit", num_hidden_layers=1))
    for model in (vision, tiny_whisper(), tiny_model("llama"), tiny_model("t5"), torch.nn.Linear(4, 4)):
        assert parts_of(model).encoders == ()
    assert make_plan(vision, fewbit.QuantConfig(group_size=16)).layers


def test_the_language_model_is_quantized_with_its_image_tokens_and_the_tower_stays(tmp_path):
    original, samples = tiny_llava(), llava_samples(6)
    folder = saved(original, tmp_path / "model")
    report = quantized(folder, samples, tmp_path / "out")
    assert len(report.layers) == 14
    assert all(layer["name"].startswith("model.language_model.layers.") for layer in report.layers)
    assert {(layer["tokens"], layer["held_out"]) for layer in report.layers} == {(5 * 20, 20)}
    reasons = {item["name"]: item["reason"] for item in report.skipped}
    tower = "model.vision_tower.encoder.layers.1.mlp.fc1"
    assert (
        reasons[tower] == "in model.vision_tower, which reads images (name it in an override to quantize it)"
    )
    assert "outside the language model" in reasons["model.multi_modal_projector.linear_1"]

    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "out"))
    kept = [name for name in before if "vision_tower" in name or "projector" in name]
    assert len(kept) > 40
    assert all(torch.equal(before[name], after[name]) for name in kept)

    model = fewbit.load(tmp_path / "out")
    sample = llava_samples(1, seed=5)[0]
    with torch.no_grad():
        assert 0 < relative(model(**sample).logits, original(**sample).logits) < 0.2
        tokens = model.generate(**sample, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert tokens.shape == (1, 23)
        assert torch.equal(tokens[:, -3:-2], model(**sample).logits[:, -1].argmax(-1, keepdim=True))


def test_images_are_in_the_hessians(tmp_path):
    folder, samples = saved(tiny_llava(), tmp_path / "model"), llava_samples(4)
    others = [{**sample, "pixel_values": -sample["pixel_values"]} for sample in samples]
    first, second = (quantized(folder, s, tmp_path / str(i)) for i, s in enumerate((samples, others)))
    assert first.layers[0]["loss"] != second.layers[0]["loss"]
    assert first.fingerprint["calibration data"] != second.fingerprint["calibration data"]


def test_an_override_reaches_a_tower(tmp_path):
    original, samples = tiny_llava(), llava_samples(6)
    folder = saved(original, tmp_path / "model")
    report = quantized(folder, samples, tmp_path / "out", override={r"vision_tower.*layers": {"bits": 8}})
    tower = [layer for layer in report.layers if "vision_tower" in layer["name"]]
    assert len(tower) == 18
    assert len(report.layers) == 32
    assert {(layer["bits"], layer["tokens"], layer["held_out"]) for layer in tower} == {(8, 5 * 5, 5)}
    assert all(layer["correction"] is not None for layer in report.layers)
    with torch.no_grad():
        sample = samples[0]
        logits = fewbit.load(tmp_path / "out")(**sample).logits
        assert relative(logits, original(**sample).logits) < 0.2


def test_a_broad_override_does_not_reach_encoders():
    plan = make_plan(tiny_llava(), fewbit.QuantConfig(group_size=16, override={"q_proj": {"bits": 8}}))
    assert not any("vision_tower" in layer.name for layer in plan.layers)
    assert {layer.settings.bits for layer in plan.layers if "q_proj" in layer.name} == {8}


def test_images_of_different_sizes_as_lists_of_patches(tmp_path):
    original, samples = tiny_qwen2_vl(), qwen2_vl_samples(6)
    folder = saved(original, tmp_path / "model")
    report = quantized(folder, samples, tmp_path / "out")
    assert len(report.layers) == 14
    assert {item["name"].partition(".")[0] for item in report.skipped} == {"model", "lm_head"}
    assert all("images" in item["reason"] for item in report.skipped if item["name"] != "lm_head")
    with torch.no_grad():
        logits = fewbit.load(tmp_path / "out")(**samples[2]).logits
        assert relative(logits, original(**samples[2]).logits) < 0.2


def test_an_override_reaches_patches_without_a_batch_dimension(tmp_path):
    folder, samples = saved(tiny_qwen2_vl(), tmp_path / "model"), qwen2_vl_samples(6)
    report = quantized(folder, samples, tmp_path / "out", override={r"visual\.blocks": {"bits": 8}})
    tower = [layer for layer in report.layers if "visual" in layer["name"]]
    patches = [len(sample["pixel_values"]) for sample in samples]
    assert {(layer["tokens"], layer["held_out"]) for layer in tower} == {(sum(patches[:5]), patches[5])}
    assert len(tower) == 8


def test_sound_and_what_is_said_in_it(tmp_path):
    original, samples = tiny_whisper(), whisper_samples(6)
    folder = saved(original, tmp_path / "model")
    report = quantized(folder, samples, tmp_path / "out")
    rows = {layer["name"]: (layer["tokens"], layer["held_out"]) for layer in report.layers}
    assert len(rows) == 2 * 6 + 2 * 10
    assert rows["model.encoder.layers.0.fc1"] == (5 * 30, 30)
    assert rows["model.decoder.layers.1.encoder_attn.k_proj"] == (5 * 30, 30)
    assert rows["model.decoder.layers.1.fc2"] == (5 * 12, 12)
    with torch.no_grad():
        logits = fewbit.load(tmp_path / "out")(**samples[0]).logits
        assert relative(logits, original(**samples[0]).logits) < 0.2


def test_both_inputs_of_an_encoder_decoder(tmp_path):
    folder = save_tiny(tmp_path / "model", "t5")
    generator = torch.Generator().manual_seed(0)

    def ids(length):
        return torch.randint(4, 120, (1, length), generator=generator)

    samples = [{"input_ids": ids(16), "decoder_input_ids": ids(9)} for _ in range(4)]
    rows = {layer["name"]: layer["tokens"] for layer in quantized(folder, samples, tmp_path / "out").layers}
    assert rows["encoder.block.0.layer.0.SelfAttention.q"] == 3 * 16
    assert rows["decoder.block.1.layer.0.SelfAttention.q"] == 3 * 9
    assert rows["decoder.block.1.layer.1.EncDecAttention.k"] == 3 * 16


def refused(model, samples, message):
    with pytest.raises(CalibrationError, match=message):
        fewbit.quantize(model, fewbit.QuantConfig(**CONFIG), dataset=samples, tokenizer=tiny_tokenizer())


def test_what_cannot_work_is_said():
    sample = llava_samples(1)[0]
    without = [{**sample, "pixel_values": torch.zeros(2, 3, 16, 16)}]
    refused(
        tiny_llava(), without,
        r"Llava.*forward cannot work with the calibration batch input_ids \(1, 20\), .*pixel_values \(2, 3, 16, 16\): "
        r".*own processor or tokenizer",
    )  # fmt: skip
    sound = [{"input_features": torch.zeros(1, 16, 60)}]
    refused(
        tiny_whisper(), sound, "input_features says nothing of what the decoder reads: add decoder_input_ids"
    )

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Linear(16, 16)

        def forward(self, x):
            return self.body(x)

    refused(
        Plain(), [{"y": torch.zeros(2, 16)}], r"has 'y', which Plain.forward does not take; .* It takes x"
    )


@pytest.mark.parametrize(
    ("model_type", "quantized", "left"),
    [
        ("t5gemma2", "model.decoder.layers.0", "model.encoder.vision_tower"),
        ("evolla", "model.layers.0", "model.protein_encoder.model"),
        ("gemma3n_text", "model.layers.0.mlp", "model.layers.0.altup"),
    ],
)
def test_parts_of_unusual_models(model_type, quantized, left):
    task = next(task for task, name in model_pairs() if name == model_type)
    config_class, model_class = classes(task, model_type)
    with torch.device("meta"):
        model = model_class(tiny_config(config_class))
    plan = make_plan(model, fewbit.QuantConfig(group_size=16))
    assert any(layer.name.startswith(f"{quantized}.") for layer in plan.layers)
    assert not any(layer.name.startswith(f"{left}.") for layer in plan.layers)
    assert any(item.name.startswith(f"{left}.") for item in plan.skipped)
