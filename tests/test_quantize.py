"""`fewbit.quantize` from path to folder, and on a model in memory."""

import json
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fewbit
from fewbit import native
from fewbit.checkpoint.convert import convert
from fewbit.checkpoint.layout import unpack
from fewbit.context import computing_dtype
from fewbit.errors import CalibrationError, ConfigError, ModelError, OutputError, SolverError
from models import FAMILIES, SMALL, TEXT, random_sequences, save_tiny, tiny_model, tiny_tokenizer
from moe_models import tiny_moe


def logits(model, seed=3):
    ids = random_sequences(1, 16, seed)[0]["input_ids"][None]
    extra = {"decoder_input_ids": ids[:, :9]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **extra).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_becomes_a_checkpoint_that_loads(tmp_path, text_file, family):
    source = save_tiny(tmp_path / "model", family)
    config = fewbit.QuantConfig(bits=8, **SMALL)
    report = fewbit.quantize(source, config, dataset=text_file, output=tmp_path / "out")
    assert report.modules == len(report.layers) > 0
    assert report.fallbacks == {}
    assert all(layer["output_error"] < 0.02 for layer in report.layers)
    model = fewbit.load(tmp_path / "out")
    original = tiny_model(family)
    error = (logits(model) - logits(original)).norm() / logits(original).norm()
    assert error < 0.05
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "quantize_config.json", "fewbit_manifest.json", "fewbit_report.json"} <= names
    assert {"tokenizer.json", "tokenizer_config.json", "model.safetensors"} <= names
    assert ".fewbit" not in names
    assert ".fewbit-incomplete" not in names


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group_size", "act_order"), [(-1, "none"), (32, "group"), (20, "full")])
@pytest.mark.parametrize("sym", [True, False])
def test_every_setting(tmp_path, text_file, model_folder, bits, group_size, act_order, sym):
    config = fewbit.QuantConfig(
        bits=bits, group_size=group_size, act_order=act_order, sym=sym, seq_len=32, num_samples=6
    )
    report = fewbit.quantize(model_folder, config, dataset=text_file, output=tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    parts = {key: stored[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")}
    codes = unpack(parts, bits, group_size, "gptq", 80, 48)
    assert codes.has_act_order == (act_order == "full")
    assert int(codes.zeros.min()) >= 1
    assert not sym or bool((codes.zeros == 2 ** (bits - 1)).all())
    W = tiny_model("llama").get_submodule(name).weight.detach()
    error = float((codes.dequantize() - W).norm() / W.norm())
    assert error < {2: 0.75, 3: 0.35, 4: 0.2, 8: 0.02}[bits]
    assert report.layers[-1]["bits"] == bits
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert quantization["desc_act"] == (act_order == "full")
    assert (quantization["bits"], quantization["group_size"], quantization["sym"]) == (bits, group_size, sym)


def test_overrides_ignore_and_lm_head(tmp_path, text_file, model_folder):
    config = fewbit.QuantConfig(
        **SMALL, lm_head=True, ignore=("k_proj",), override={"down_proj": {"bits": 8, "group_size": -1}}
    )
    report = fewbit.quantize(model_folder, config, dataset=text_file, output=tmp_path / "out")
    layers = {layer["name"]: layer for layer in report.layers}
    assert "lm_head" in layers
    assert (layers["model.layers.0.mlp.down_proj"]["bits"], layers["model.layers.0.mlp.up_proj"]["bits"]) == (
        8,
        4,
    )
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.layers.0.self_attn.k_proj.weight" in stored
    assert "lm_head.qweight" in stored
    model = fewbit.load(tmp_path / "out")
    assert torch.isfinite(logits(model)).all()


def test_quantizing_a_tied_head_keeps_the_embedding(tmp_path, text_file):
    source = save_tiny(tmp_path / "model", "llama", tie_word_embeddings=True)
    config = fewbit.QuantConfig(bits=8, lm_head=True, **SMALL)
    fewbit.quantize(source, config, dataset=text_file, output=tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(source / "model.safetensors")
    assert torch.equal(stored["model.embed_tokens.weight"], original["model.embed_tokens.weight"])
    assert "lm_head.qweight" in stored
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    tied = tiny_model("llama", tie_word_embeddings=True)
    model = fewbit.load(tmp_path / "out")
    assert (logits(model) - logits(tied)).norm() / logits(tied).norm() < 0.05


def test_same_inputs_give_the_same_bytes(tmp_path, text_file, model_folder):
    config = fewbit.QuantConfig(**SMALL)
    for name in ("a", "b"):
        fewbit.quantize(model_folder, config, dataset=text_file, output=tmp_path / name)
    files = {path.name for path in (tmp_path / "a").iterdir()} - {"fewbit_report.json", "fewbit_report.html"}
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize("make", [partial(tiny_model, "llama"), partial(tiny_moe, "mixtral")])
def test_a_cpu_that_multiplies_16_bits_slowly_computes_in_float32(tmp_path, text_file, monkeypatch, make):
    folder, original = tmp_path / "model", make().bfloat16()
    original.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    monkeypatch.setattr(native, "instruction_sets", lambda: ("avx2",))
    found = {}
    for dtype in ("auto", "float32", "bfloat16"):
        report = fewbit.quantize(
            folder, dtype=dtype, dataset=text_file, output=tmp_path / dtype, evaluate_on=text_file, **SMALL
        )
        found[dtype] = load_file(tmp_path / dtype / "model.safetensors")
        slow = [note for note in report.notes if "this CPU multiplies bfloat16 slowly" in note]
        assert len(slow) == (dtype != "float32")
        assert any("dtype auto reads" in note for note in slow) is (dtype == "bfloat16")
        assert report.model["dtype"] == ("float32" if dtype == "float32" else "bfloat16")
        assert json.loads((tmp_path / dtype / "config.json").read_text())["dtype"] == report.model["dtype"]
    state = original.state_dict()
    assert found["auto"].keys() == found["float32"].keys()
    for name, tensor in found["auto"].items():
        if name in state:  # what is not quantized is the original's
            assert tensor.dtype is torch.bfloat16
            assert torch.equal(tensor, state[name])
        else:
            assert torch.equal(tensor, found["float32"][name]), name


def test_a_model_in_memory_that_is_multiplied_slowly_is_noted(monkeypatch):
    monkeypatch.setattr(native, "instruction_sets", lambda: ("avx2",))
    model = fewbit.quantize(tiny_model("llama").bfloat16(), dataset=random_sequences(2), fast=True, bits=8)
    assert "this CPU multiplies bfloat16 slowly: a model in float32" in str(model.fewbit_report.notes)


@pytest.mark.parametrize(
    ("sets", "dtype", "device", "expected"),
    [
        (("avx2",), "bfloat16", "cpu", "float32"),
        (("avx512", "avx512_bf16"), "bfloat16", "cpu", "bfloat16"),
        (("avx512", "avx512_bf16"), "float16", "cpu", "float32"),
        (("avx2",), "float32", "cpu", "float32"),
        (("avx2",), "float16", "cuda", "float16"),
    ],
)
def test_the_dtype_to_compute_in(sets, dtype, device, expected, monkeypatch):
    monkeypatch.setattr(native, "instruction_sets", lambda: sets)
    assert computing_dtype(getattr(torch, dtype), torch.device(device)) is getattr(torch, expected)


def test_shards_have_an_index(tmp_path, text_file, model_folder):
    fewbit.quantize(
        model_folder,
        fewbit.QuantConfig(**SMALL),
        dataset=text_file,
        output=tmp_path / "out",
        max_shard_size="20KB",
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert torch.isfinite(logits(fewbit.load(tmp_path / "out"))).all()


def test_padding_never_counts(tmp_path, model_folder):
    """Short sequences padded in a batch give the codes that they give one by one."""
    sequences = [{"input_ids": s["input_ids"][: 9 + 5 * i]} for i, s in enumerate(random_sequences(3))]
    codes = []
    for batch_size in (1, 3):
        out = tmp_path / f"out{batch_size}"
        config = fewbit.QuantConfig(**SMALL, batch_size=batch_size)
        report = fewbit.quantize(model_folder, config, dataset=sequences, output=out)
        assert (report.layers[0]["tokens"], report.layers[0]["held_out"]) == (9 + 14, 19)
        assert report.layers[0]["masked"] == (0 if batch_size == 1 else 10 + 5)
        codes.append(load_file(out / "model.safetensors"))
    first = "model.layers.0.self_attn.q_proj.qweight"
    assert torch.equal(codes[0][first], codes[1][first])


def test_padding_never_counts_in_an_encoder_decoder():
    """Encoder, decoder and cross-attention each have their own mask; cross-attention keys see the encoder."""
    lengths = (14, 9)
    sequences = [{"input_ids": s["input_ids"][:n]} for s, n in zip(random_sequences(2), lengths, strict=True)]
    model = tiny_model("t5")
    config = fewbit.QuantConfig(**SMALL, batch_size=2, fast=True)
    fewbit.quantize(model, config, dataset=sequences, tokenizer=tiny_tokenizer())
    tokens = {layer["name"]: (layer["tokens"], layer["masked"]) for layer in model.fewbit_report.layers}
    # The decoder's input is shifted right: its padding begins one later, and is cut off at the batch's length.
    decoder = min(lengths[0], 14) + lengths[1] + 1
    assert tokens["encoder.block.0.layer.0.SelfAttention.q"] == (sum(lengths), 5)
    assert tokens["decoder.block.0.layer.0.SelfAttention.q"] == (decoder, 4)
    assert tokens["decoder.block.0.layer.1.EncDecAttention.q"] == (decoder, 4)
    assert tokens["decoder.block.0.layer.1.EncDecAttention.k"] == (sum(lengths), 5)
    assert tokens["decoder.block.1.layer.1.EncDecAttention.v"] == (sum(lengths), 5)


def test_the_encoder_mask_does_not_apply_to_the_decoder():
    ids = torch.randint(4, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids}
    model = tiny_model("t5")
    config = fewbit.QuantConfig(**SMALL, batch_size=2, fast=True)
    fewbit.quantize(model, config, dataset=[batch], tokenizer=tiny_tokenizer())
    tokens = {layer["name"]: layer["tokens"] for layer in model.fewbit_report.layers}
    assert tokens["encoder.block.0.layer.0.SelfAttention.q"] == 20
    assert tokens["decoder.block.0.layer.0.SelfAttention.q"] == 24


class Partial(nn.Module):
    """`second` receives the tensor of `first`, changed in place between; `never` is not reached."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.never = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        y = self.first(x)
        x.mul_(torch.linspace(0.01, 10, 32))
        return y + self.second(x)


def test_a_tensor_changed_in_place_gets_its_own_hessian():
    torch.manual_seed(0)
    x = torch.randn(64, 32)
    changed = x * torch.linspace(0.01, 10, 32)
    model = Partial()
    W = model.second.weight.detach().clone()
    fewbit.quantize(model, fewbit.QuantConfig(bits=2, group_size=32, fast=True), dataset=[{"x": x.clone()}])
    from fewbit.gptq import Hessian, InputGroup, quantize_weight

    H = Hessian(32)
    H.add(changed)
    expected = quantize_weight(W, InputGroup(H), fewbit.QuantConfig(bits=2, group_size=32).defaults).codes
    assert torch.equal(model.second.codes().codes, expected.codes)


def test_a_layer_without_inputs_is_a_fallback():
    batches = [{"x": torch.randn(64, 32)}]
    model = Partial()
    fewbit.quantize(model, fewbit.QuantConfig(group_size=32), dataset=batches)
    assert model.fewbit_report.fallbacks["no calibration tokens"] == 1
    assert any("no calibration token reached 1 layers" in note for note in model.fewbit_report.notes)
    with pytest.raises(SolverError, match=r"layer never needed a fallback"):
        fewbit.quantize(Partial(), fewbit.QuantConfig(group_size=32, strict=True), dataset=batches)


class Undecided(nn.Module):
    """Runs a layer as often as the values say."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(32, 32)
        self.last = nn.Linear(32, 32)

    def forward(self, x):
        return self.last(self.shared(self.shared(x) if x.sum().item() > -1e9 else x))


def test_late_inputs_are_noted_and_refused_by_strict():
    batches = [{"x": torch.randn(9, 32)}] * 2
    model = fewbit.quantize(Undecided(), fewbit.QuantConfig(group_size=32), dataset=batches)
    assert any(
        "2 inputs reached 1 layers after they were solved" in note for note in model.fewbit_report.notes
    )
    with pytest.raises(SolverError, match="reached 1 layers after they were solved"):
        fewbit.quantize(Undecided(), fewbit.QuantConfig(group_size=32, strict=True), dataset=batches)


def test_rules_use_the_names_of_the_files(tmp_path):
    """transformers renames what a vision-language model stores; the overrides must follow the stored names."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text_config = LlamaConfig(
        vocab_size=120, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    torch.manual_seed(0)
    llava = LlavaConfig(vision_config=vision, text_config=text_config, image_token_id=119)
    model = LlavaForConditionalGeneration(llava)
    model.save_pretrained(tmp_path / "model")
    W = model.model.language_model.layers[0].mlp.down_proj.weight.detach().clone()
    config = fewbit.QuantConfig(
        group_size=16,
        seq_len=24,
        ignore=("vision_tower", "multi_modal"),
        override={"down_proj": {"bits": 8}},
        fast=True,  # the correction moves weights on purpose
    )
    fewbit.quantize(tmp_path / "model", config, dataset=random_sequences(vocab=100), output=tmp_path / "out")
    loaded = fewbit.load(tmp_path / "out")
    Wq = loaded.model.language_model.layers[0].mlp.down_proj.dequantize(torch.float32)
    assert (Wq - W).norm() / W.norm() < 0.02
    assert loaded.model.language_model.layers[1].mlp.up_proj.bits == 4


def test_a_model_in_memory_is_quantized_in_place():
    model = tiny_model("llama")
    before = logits(model)
    result = fewbit.quantize(
        model, fewbit.QuantConfig(bits=8, **SMALL), dataset=[TEXT, TEXT[40:]], tokenizer=tiny_tokenizer()
    )
    assert result is model
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "QuantLinear"
    assert (logits(model) - before).norm() / before.norm() < 0.05


def test_a_model_in_memory_saves_and_reloads(tmp_path):
    model = tiny_model("gpt2")
    fewbit.quantize(model, fewbit.QuantConfig(**SMALL), dataset=random_sequences())
    model.save_pretrained(tmp_path / "out")
    again = fewbit.load(tmp_path / "out", fuse=False, lm_head_runtime=16)
    assert torch.equal(logits(model), logits(again))


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.body = nn.Conv2d(8, 16, 3, padding="same", padding_mode="reflect")
        self.head = nn.Linear(16, 10)

    def forward(self, pixel_values):
        x = self.body(torch.relu(self.stem(pixel_values)))
        return self.head(torch.relu(x).mean(dim=(2, 3)))


def test_convolutions_in_a_plain_module():
    torch.manual_seed(0)
    model = Convolutions().eval()
    images = [{"pixel_values": torch.randn(2, 3, 12, 12)} for _ in range(4)]
    with torch.no_grad():
        before = model(**images[0])
        fewbit.quantize(model, fewbit.QuantConfig(bits=8, group_size=-1), dataset=images)
        after = model(**images[0])
    assert type(model.stem).__name__ == "QuantConv2d"
    assert (after - before).norm() / before.norm() < 0.05


def test_rtn_needs_no_dataset(tmp_path, model_folder):
    report = fewbit.quantize(model_folder, fewbit.QuantConfig(method="rtn", **SMALL), output=tmp_path / "out")
    assert {layer["method"] for layer in report.layers} == {"rtn"}
    assert report.fallbacks == {}


def test_the_group_size_is_chosen_for_the_model_and_settings_may_be_keywords(tmp_path):
    folder = save_tiny(tmp_path / "model", hidden_size=64, intermediate_size=96)
    report = fewbit.quantize(folder, method="rtn", output=tmp_path / "out")
    assert {layer["group_size"] for layer in report.layers} == {32}
    assert report.config["group_size"] == 32
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["group_size"] == 32
    )
    assert (
        report.notes[0] == "group size 32: the largest of 128, 64, 32 that divides the inputs of every layer"
    )
    assert fewbit.plan(folder, {"method": "rtn"}).plan.layers[0].settings.group_size == 32


def test_layers_with_the_same_input_share_a_hessian(monkeypatch):
    from fewbit.pipeline import statistics as hessians

    made = []
    original = hessians.Hessian

    def counted(*args, **kwargs):
        made.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(hessians, "Hessian", counted)
    fewbit.quantize(tiny_model("llama"), fewbit.QuantConfig(**SMALL), dataset=random_sequences())
    assert len(made) == 2 * 4  # q/k/v, o, gate/up, down in each of two blocks


def test_a_dead_column_keeps_its_rounded_weight():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[5] = 0  # input 5 of q/k/v is always zero
    W = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    fewbit.quantize(model, fewbit.QuantConfig(**SMALL), dataset=random_sequences())
    Wq = model.model.layers[0].self_attn.q_proj.codes().dequantize()
    assert float(Wq[:, 5].abs().max()) > 0
    scale = (
        model.model.layers[0].self_attn.codes
        if False
        else model.model.layers[0].self_attn.q_proj.codes().scales
    )
    assert bool(((Wq[:, 5] - W[:, 5]).abs() <= scale[:, 0].float().abs() / 2 + 1e-6).float().mean() > 0.9)


# Bad input: a clear error, and nothing written.


def refused(error, message, tmp_path, source, config=None, **options):
    with pytest.raises(error, match=message):
        fewbit.quantize(source, config or fewbit.QuantConfig(**SMALL), output=tmp_path / "out", **options)
    assert not (tmp_path / "out" / "config.json").exists()


def test_nan_weights(tmp_path, text_file):
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    refused(
        ModelError, "weight model.layers.1.mlp.up_proj.weight holds NaN values: the model is damaged",
        tmp_path, tmp_path / "model", dataset=text_file,
    )  # fmt: skip


def test_no_dataset(tmp_path, model_folder):
    refused(CalibrationError, "no dataset was given", tmp_path, model_folder)


def test_no_output(model_folder):
    with pytest.raises(ConfigError, match="no output folder was given"):
        fewbit.quantize(model_folder)


def test_no_tokenizer(tmp_path, text_file):
    tiny_model("llama").save_pretrained(tmp_path / "bare")
    refused(CalibrationError, "tokenizer", tmp_path, tmp_path / "bare", dataset=text_file)
    with pytest.raises(CalibrationError, match="tokenizer"):
        fewbit.quantize(tiny_model("llama"), fewbit.QuantConfig(**SMALL), dataset=[TEXT])


def test_a_folder_without_config(tmp_path, text_file):
    (tmp_path / "empty").mkdir()
    refused(ModelError, "has no config.json", tmp_path, tmp_path / "empty", dataset=text_file)


def test_a_folder_without_weights(tmp_path, text_file, model_folder):
    (model_folder / "model.safetensors").unlink()
    refused(ModelError, "no .safetensors files", tmp_path, model_folder, dataset=text_file)
    (model_folder / "pytorch_model.bin").write_bytes(b"x")
    refused(ModelError, "only pickle files.*pass --allow-pickle", tmp_path, model_folder, dataset=text_file)


def test_an_unreadable_shard(tmp_path, text_file, model_folder):
    path = model_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(ModelError, "cannot load the weights in .*model", tmp_path, model_folder, dataset=text_file)


def test_missing_weights(tmp_path, text_file, model_folder):
    from safetensors.torch import save_file

    stored = load_file(model_folder / "model.safetensors")
    del stored["model.layers.1.mlp.up_proj.weight"]
    save_file(stored, model_folder / "model.safetensors", metadata={"format": "pt"})
    refused(
        ModelError,
        "lacks 1 weights .* model.layers.1.mlp.up_proj.weight",
        tmp_path,
        model_folder,
        dataset=text_file,
    )


def test_an_unknown_architecture(tmp_path, text_file, model_folder):
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps({**config, "model_type": "llama9000"}))
    refused(ModelError, "cannot read the configuration", tmp_path, model_folder, dataset=text_file)


def test_a_hub_id_is_downloaded_and_quantized(tmp_path, text_file, model_folder, monkeypatch):
    asked = []

    def stand_in(name, ignore_patterns):
        asked.append((name, ignore_patterns))
        return str(model_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", stand_in)
    report = fewbit.quantize(
        "someone/model", fewbit.QuantConfig(**SMALL), dataset=text_file, output=tmp_path / "out"
    )
    assert report.modules == 14
    assert asked[0][0] == "someone/model"
    assert {"*.bin", "*.gguf"} <= set(asked[0][1])
    assert "*.safetensors" not in asked[0][1]
    fewbit.quantize(
        "someone/model",
        fewbit.QuantConfig(**SMALL),
        dataset=text_file,
        output=tmp_path / "two",
        allow_pickle=True,
    )
    assert "*.bin" not in asked[1][1]


def test_no_network(tmp_path, text_file, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    message = "someone/model is no local folder and cannot be downloaded from the Hub: no network"
    refused(ModelError, message, tmp_path, "someone/model", dataset=text_file)


def test_ignored_experts_keep_their_names(tmp_path, text_file):
    """What serving engines read: one file name per expert, each excluded from quantization by a rule."""
    source = save_tiny(
        tmp_path / "model", "mixtral", hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    config = fewbit.QuantConfig(**SMALL, ignore=(r"\.experts\.",))
    fewbit.quantize(source, config, dataset=text_file, output=tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    experts = {name for name in stored if ".experts." in name}
    assert (
        experts == {name for name in load_file(source / "model.safetensors") if ".experts." in name} != set()
    )
    dynamic = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["dynamic"]
    rules = [rule.removeprefix("-:") for rule in dynamic]
    assert all(any(re.match(rule, name.removesuffix(".weight")) for rule in rules) for name in experts)
    assert not any(re.match(rule, "model.layers.0.self_attn.q_proj") for rule in rules)


def test_the_evaluation_rounds_nothing_but_weights(tmp_path, text_file, model_folder, monkeypatch):
    """It runs the kernel of `fewbit eval`, without 8-bit activations or an 8-bit output layer."""
    from fewbit.hf import load as loading

    seen, load = [], loading.load
    monkeypatch.setattr(loading, "load", lambda *arguments: seen.append(load(*arguments)) or seen[-1])
    config = fewbit.QuantConfig(**{**SMALL, "dtype": "bfloat16"})
    fewbit.quantize(model_folder, config, dataset=text_file, output=tmp_path / "out", evaluate_on=text_file)
    [model] = seen
    assert type(model.lm_head) is nn.Linear
    assert {m.kernel.name for m in model.modules() if hasattr(m, "kernel")} <= {
        "cpu_a16",
        "reference",
        "triton",
    }


@pytest.mark.parametrize(("tokens", "windows", "seq_len"), [(100, 1, 100), (140, 2, 64), (2, 1, 2)])
def test_the_evaluation_takes_so_many_tokens(
    tmp_path, text_file, model_folder, tokens, windows, seq_len, monkeypatch
):
    if seq_len == 64:
        monkeypatch.setattr("fewbit.preparation.EVALUATION_SEQ_LEN", seq_len)
    report = fewbit.quantize(
        model_folder,
        dataset=text_file,
        output=tmp_path / "out",
        evaluate_on=text_file,
        evaluate_tokens=tokens,
        **SMALL,
    )
    found = report.evaluation["quantized"]
    assert (found["windows"], found["seq_len"], found["tokens"]) == (
        windows,
        seq_len,
        windows * (seq_len - 1),
    )
    assert f"--eval-tokens {tokens}" in report.command


def test_an_evaluation_of_no_tokens_is_refused(tmp_path, text_file, model_folder):
    arguments = {"dataset": text_file, "evaluate_on": text_file, "evaluate_tokens": 1}
    refused(ConfigError, "at least 2 tokens; got 1", tmp_path, model_folder, **arguments)


def test_a_bad_evaluation_text_is_refused_first(tmp_path, text_file, model_folder):
    refused(
        CalibrationError,
        "there is no dataset",
        tmp_path,
        model_folder,
        dataset=text_file,
        evaluate_on=tmp_path / "nothing.txt",
    )
    t5 = save_tiny(tmp_path / "t5", "t5")
    refused(
        ConfigError, "this one is an encoder-decoder", tmp_path, t5, dataset=text_file, evaluate_on=text_file
    )


def test_a_path_that_does_not_exist(tmp_path, text_file):
    refused(
        ModelError,
        "neither a folder, a .gguf file nor a Hub id",
        tmp_path,
        "no/such/folder/here",
        dataset=text_file,
    )
    refused(ModelError, "is a file but not a .gguf file", tmp_path, text_file, dataset=text_file)


def test_an_already_quantized_model(tmp_path, text_file, model_folder):
    fewbit.quantize(model_folder, fewbit.QuantConfig(**SMALL), dataset=text_file, output=tmp_path / "once")
    refused(ModelError, r"is already quantized \(gptq\)", tmp_path, tmp_path / "once", dataset=text_file)


def test_an_output_folder_with_other_files(tmp_path, text_file, model_folder):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years")
    with pytest.raises(OutputError, match="already holds something else"):
        fewbit.quantize(model_folder, fewbit.QuantConfig(**SMALL), dataset=text_file, output=out)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_a_finished_checkpoint_is_not_overwritten(tmp_path, text_file, model_folder):
    fewbit.quantize(model_folder, fewbit.QuantConfig(**SMALL), dataset=text_file, output=tmp_path / "out")
    with pytest.raises(OutputError, match="already holds something else"):
        fewbit.quantize(model_folder, fewbit.QuantConfig(**SMALL), dataset=text_file, output=tmp_path / "out")


@pytest.mark.parametrize("option", [{"output": "x"}, {"evaluate_on": "x"}, {"push_to_hub": "x"}])
def test_path_options_with_a_model_in_memory(option):
    with pytest.raises(ConfigError, match=r"are for models on disk; this one is in memory"):
        fewbit.quantize(tiny_model("llama"), dataset=random_sequences(), **option)


def test_the_shard_size_is_checked_first(tmp_path, text_file, model_folder):
    steps = []
    refused(
        ConfigError, "max_shard_size '0' is no size", tmp_path, model_folder, dataset=text_file, max_shard_size="0",
        progress=lambda *step: steps.append(step),
    )  # fmt: skip
    assert steps == []


def test_standard_input_cannot_be_both_texts(tmp_path, model_folder):
    refused(
        ConfigError, "standard input cannot be both", tmp_path, model_folder, dataset="-", evaluate_on="-"
    )


def test_a_tokenizer_by_path(tmp_path, text_file, model_folder):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (model_folder / "tokenizer.json").unlink()
    (model_folder / "tokenizer_config.json").unlink()
    options = {"dataset": text_file, "tokenizer": tmp_path / "tokenizer"}
    report = fewbit.quantize(model_folder, fewbit.QuantConfig(**SMALL), output=tmp_path / "other", **options)
    assert report.calibration["tokens"] == 192
    (tmp_path / "bare").mkdir()
    options["tokenizer"] = tmp_path / "bare"
    refused(ModelError, "no tokenizer can be loaded from .*bare", tmp_path, model_folder, **options)


def test_files_that_go_along(tmp_path, text_file, model_folder):
    along = [
        "LICENSE", "tekken.json", "modules.json", "1_Pooling/config.json",
        "additional_chat_templates/tool_use.jinja",
    ]  # fmt: skip
    own = ["notes.txt", "modeling_own.py", "trainer_state.json"]
    hidden = [".git/config.json", "__pycache__/x.json", "onnx/model.onnx", "2_Dense/model.safetensors"]
    for name in (*along, *own, *hidden):
        (model_folder / name).parent.mkdir(exist_ok=True)
        (model_folder / name).write_text("content")
    report = fewbit.quantize(
        model_folder, fewbit.QuantConfig(**SMALL), dataset=text_file, output=tmp_path / "out"
    )
    assert all((tmp_path / "out" / name).read_text() == "content" for name in along)
    assert not any((tmp_path / "out" / name).exists() for name in (*own, *hidden))
    assert any(note.startswith("3 files beside the weights are not copied") for note in report.notes)
    convert(tmp_path / "out", tmp_path / "converted", "gptq_v2")
    assert all((tmp_path / "converted" / name).exists() for name in along)


def test_pickled_weights_when_asked(tmp_path, text_file, model_folder):
    stored = load_file(model_folder / "model.safetensors")
    (model_folder / "model.safetensors").unlink()
    torch.save(stored, model_folder / "pytorch_model.bin")
    config = fewbit.QuantConfig(**SMALL)
    report = fewbit.quantize(
        model_folder, config, dataset=text_file, output=tmp_path / "out", allow_pickle=True
    )
    assert report.modules == 14


def test_upload(tmp_path, text_file, model_folder, monkeypatch):
    calls = []

    def create(self, repo, **k):
        calls.append(("create", repo))
        return SimpleNamespace(repo_id=repo)

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.upload_folder",
        lambda self, **k: calls.append(("upload", k["repo_id"], k["folder_path"])),
    )
    out = tmp_path / "out"
    fewbit.quantize(
        model_folder, fewbit.QuantConfig(**SMALL), dataset=text_file, output=out, push_to_hub="me/model"
    )
    assert calls == [("create", "me/model"), ("upload", "me/model", out)]

    def offline(self, repo, **k):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", offline)
    with pytest.raises(OutputError, match=r"is complete, but could not be uploaded to me/model: no network"):
        fewbit.quantize(
            model_folder,
            fewbit.QuantConfig(**SMALL),
            dataset=text_file,
            output=tmp_path / "again",
            push_to_hub="me/model",
        )


@pytest.mark.parametrize("device", ["gpu", "cuda:77", "meta-physics"])
def test_a_device_that_does_not_exist(tmp_path, text_file, model_folder, device):
    refused(ConfigError, "cannot be used here", tmp_path, model_folder, dataset=text_file, device=device)


def test_strict_refuses_fallbacks(tmp_path, model_folder):
    one_token = [{"input_ids": torch.tensor([5])}]
    report = fewbit.quantize(
        model_folder, fewbit.QuantConfig(**SMALL), dataset=one_token, output=tmp_path / "soft"
    )
    assert report.layers[0]["tokens"] == 1
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.zero_()  # the inputs of q/k/v are zeros
    with pytest.raises(SolverError, match=r"q_proj needed a fallback .*strict mode refuses it"):
        fewbit.quantize(model, fewbit.QuantConfig(strict=True, **SMALL), dataset=random_sequences())


def test_seq_len_is_capped_with_a_note(tmp_path, text_file):
    source = save_tiny(tmp_path / "model", "gpt2")
    config = fewbit.QuantConfig(group_size=16, seq_len=4096, num_samples=2)
    report = fewbit.quantize(source, config, dataset=text_file, output=tmp_path / "out")
    assert any("seq_len 4096 is more than the model's 128 positions" in note for note in report.notes)


def test_a_model_in_memory_has_a_report(caplog):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.zero_()
    with caplog.at_level("WARNING", logger="fewbit"):
        fewbit.quantize(
            model, fewbit.QuantConfig(bits=3, group_size=32, seq_len=32), dataset=random_sequences()
        )
    assert model.fewbit_report.modules == 14
    assert model.fewbit_report.fallbacks["no calibration tokens"] == 4  # q, k, v and o
    logged = caplog.text
    assert "4 layers needed a fallback: no calibration tokens" in logged
    assert logged.count("which group size 32 does not divide") == 2


def test_one_warning_without_the_compiled_solver(caplog, monkeypatch, tmp_path, text_file, model_folder):
    from fewbit import native

    monkeypatch.setattr(native, "_load", lambda: (None, "no compiler was found at install time"))
    with caplog.at_level("WARNING", logger="fewbit"):
        report = fewbit.quantize(
            model_folder, fewbit.QuantConfig(**SMALL), dataset=text_file, output=tmp_path / "out"
        )
    assert report.fallbacks == {}
    assert caplog.text.count("the compiled solver is not in use (no compiler was found") == 1
