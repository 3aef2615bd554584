"""GGUF: the blocks decode to the same weights with the package gguf, and transformers runs the file."""

import json

import numpy as np
import pytest
import torch
from test_exports import grid_of, ids, matrix
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import fewbit
from fewbit.errors import CheckpointError, ConfigError, OutputError
from fewbit.exports import export
from fewbit.exports.gguf_blocks import blocks_of, judge, type_of
from tiny_gptq import llama, logits

gguf = pytest.importorskip("gguf")

CASES = [
    (2, 64, True, "Q4_0"),
    (2, 32, False, "Q4_0"),
    (3, 32, True, "Q4_0"),
    (3, 128, False, "Q4_0"),
    (4, 32, True, "Q4_0"),
    (4, -1, True, "Q4_0"),
    (4, 64, False, "Q5_0"),
    (8, 64, True, "Q8_0"),
]


@pytest.mark.parametrize(("bits", "group_size", "sym", "kind"), CASES)
def test_blocks_decode_to_the_same_weight(bits, group_size, sym, kind):
    codes = matrix(bits, group_size, sym)
    assert judge(grid_of(codes)).refused is None
    assert judge(grid_of(codes)).error == 0
    assert type_of(grid_of(codes)) == kind
    blocks = blocks_of(codes, kind).numpy()
    found = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(found, codes.dequantize().numpy())


def test_what_blocks_cannot_hold():
    assert "asymmetric grid" in judge(grid_of(matrix(8, 64, False))).refused
    assert "no multiple of 32" in judge(grid_of(matrix(4, 16, True))).refused


def byte_level_tokenizer(pattern=None):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters[:180])}
    vocabulary |= {"he": 180, "ll": 181}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("h", "e"), ("l", "l")]))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [pre_tokenizers.Digits(individual_digits=True)] if pattern == "smollm" else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level]) if split else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


MODELS = {
    "llama": lambda: llama(num_key_value_heads=2),
    "llama3 rope": lambda: llama(
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    ),
    "qwen2": lambda: of_config(Qwen2Config),
    "qwen3": lambda: of_config(Qwen3Config),
}


def of_config(kind, **changes):
    torch.manual_seed(0)
    config = kind(
        vocab_size=200,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128 if kind is Qwen3Config else 24,  # transformers does not read it from the file
        max_position_embeddings=64,
        tie_word_embeddings=kind is Qwen3Config,
        **changes,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def quantized(folder, name, tokenizer=None, **settings):
    MODELS[name]().save_pretrained(folder / "model")
    (tokenizer or byte_level_tokenizer()).save_pretrained(folder / "model")
    config = fewbit.QuantConfig(**{"bits": 4, "group_size": 32, "dtype": "float32", **settings})
    fewbit.quantize(folder / "model", config, dataset=ids(), output=folder / "in")
    return folder / "in"


@pytest.mark.parametrize(
    "settings", [{}, {"sym": False}, {"bits": 8, "override": {"down_proj": {"bits": 3}}}]
)
@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same_from_the_file(name, settings, tmp_path):
    if settings and name != "llama":
        pytest.skip("grids are the same in every family")
    folder = quantized(tmp_path, name, **settings)
    result = export(folder, tmp_path / "out.gguf", "gguf")
    assert result.error == 0
    truth = fewbit.load(folder, dtype="float32", kernel="reference")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf", dtype=torch.float32)
    if name == "llama3 rope":  # transformers does not read rope_freqs: compare what is written
        reader = gguf.GGUFReader(tmp_path / "out.gguf")
        factors = next(t.data for t in reader.tensors if t.name == "rope_freqs.weight")
        own = truth.model.rotary_emb.inv_freq.double()
        plain = 500.0 ** -(torch.arange(0, 24, 2).double() / 24)
        assert torch.allclose(plain / torch.tensor(factors).double(), own, rtol=1e-5)
        return
    assert (logits(model) - logits(truth)).norm() < 1e-4 * logits(truth).norm()


def test_the_vocabulary(tmp_path):
    folder = quantized(tmp_path, "llama", byte_level_tokenizer("smollm"))
    export(folder, tmp_path / "out.gguf", "gguf")
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    tokens, kinds = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    assert len(tokens) == len(kinds) == 200
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokens[180] == "he"
    assert kinds[tokenizer.bos_token_id] == gguf.TokenType.CONTROL
    assert tokens[-1] == "[PAD199]"
    assert kinds[-1] == gguf.TokenType.UNUSED
    assert fields["tokenizer.ggml.merges"].contents() == ["h e", "l l"]
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id


def test_what_is_refused_leaves_no_file(tmp_path):
    folder = quantized(tmp_path, "llama", bits=8, sym=False)
    with pytest.raises(CheckpointError, match="14 of 14 layers: 8 bits with an asymmetric grid"):
        export(folder, tmp_path / "out.gguf", "gguf")
    with pytest.raises(OutputError, match=r"ends with \.gguf"):
        export(folder, tmp_path / "out", "gguf")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"model_type": "llama"', '"model_type": "bloom"'))
    with pytest.raises(CheckpointError, match="knows the model types llama, mistral"):
        export(folder, tmp_path / "out.gguf", "gguf")
    assert not list(tmp_path.glob("*out*"))


def test_an_unknown_way_to_split_text_is_refused(tmp_path):
    from models import tiny_tokenizer

    folder = quantized(tmp_path, "llama", tiny_tokenizer())
    with pytest.raises(CheckpointError, match="splits text in a way"):
        export(folder, tmp_path / "out.gguf", "gguf")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"rope_type": "default"', '"rope_type": "yarn"', "the rope scaling 'yarn' in a model of type llama"),
        ('"hidden_act": "silu"', '"hidden_act": "relu"', "the activation 'relu'"),
        (
            '"rope_type": "default"',
            '"rope_type": "default", "partial_rotary_factor": 0.5',
            "partial rotary embeddings",
        ),
    ],
)
def test_settings_that_llama_cpp_computes_otherwise_are_refused(old, new, words, tmp_path):
    folder = quantized(tmp_path, "llama")
    text = (folder / "config.json").read_text()
    assert old in text
    (folder / "config.json").write_text(text.replace(old, new))
    with pytest.raises(CheckpointError, match=words):
        export(folder, tmp_path / "out.gguf", "gguf")


@pytest.mark.parametrize(("dtype", "kind"), [("float16", "F16"), ("float32", "F32"), ("q8_0", "Q8_0")])
def test_embeddings_in_another_type(dtype, kind, tmp_path):
    folder = quantized(tmp_path, "qwen2")
    export(folder, tmp_path / "out.gguf", "gguf", dtype=dtype)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    for name in ("token_embd.weight", "output.weight"):
        assert found[name].tensor_type.name == kind
    assert found["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    truth = fewbit.load(folder, dtype="float32", kernel="reference").get_input_embeddings().weight
    values = gguf.quants.dequantize(found["token_embd.weight"].data, found["token_embd.weight"].tensor_type)
    step = float(truth.detach().abs().max()) / (127 if dtype == "q8_0" else 2048)
    assert float((torch.from_numpy(values.astype("float32")) - truth.detach()).abs().max()) <= step
    with pytest.raises(ConfigError, match="float32, q8_0; got 'int8'"):
        export(folder, tmp_path / "again.gguf", "gguf", dtype="int8")


def test_a_window_that_llama_cpp_does_not_have_limits_the_context(tmp_path):
    MODELS["mistral"] = lambda: of_config(MistralConfig, sliding_window=32)
    folder = quantized(tmp_path, "mistral")
    result = export(folder, tmp_path / "out.gguf", "gguf")
    assert any("context limited to 32 of 64 tokens" in note for note in result.notes)
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["llama.context_length"].contents() == 32


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_a_space_that_llama_cpp_adds_elsewhere_is_refused(scheme, tmp_path):
    folder = quantized(tmp_path, "llama")
    stated = json.loads((folder / "tokenizer.json").read_text())
    stated["model"]["byte_fallback"] = True
    stated["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": scheme,
        "split": False,
    }
    (folder / "tokenizer.json").write_text(json.dumps(stated))
    with pytest.raises(CheckpointError, match=r"changes text first \(Metaspace\)"):
        export(folder, tmp_path / "out.gguf", "gguf")
