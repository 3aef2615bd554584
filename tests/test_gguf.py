"""A .gguf file in, a GPTQ checkpoint out."""

import json

import numpy as np
import pytest
import torch

import fewbit
from models import TEXT, tiny_model

gguf = pytest.importorskip("gguf")

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,'"


def write_gguf(path, model):
    """A llama.cpp file with the weights of a tiny llama and a tokenizer of letters."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<unk>", "<s>", "</s>", "▁", *LETTERS]
    tokens += [f"<extra{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    state = {key: value.detach().numpy().astype(np.float32) for key, value in model.state_dict().items()}
    for key, value in state.items():
        name = {
            "model.embed_tokens.weight": "token_embd.weight",
            "model.norm.weight": "output_norm.weight",
        }.get(key)
        name = name or {"lm_head.weight": "output.weight"}.get(key)
        if name is None:
            _, _, layer, rest = key.split(".", 3)
            short = {
                "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
                "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
                "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
            }[rest.removesuffix(".weight")]  # fmt: skip
            name = f"blk.{layer}.{short}.weight"
            if short in ("attn_q", "attn_k"):  # llama.cpp interleaves the rotary halves
                heads = config.num_attention_heads if short == "attn_q" else config.num_key_value_heads
                rows, columns = value.shape
                value = (
                    value.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
                )
        writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_a_checkpoint(tmp_path):
    model = tiny_model("llama")
    write_gguf(tmp_path / "tiny.gguf", model)
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 8)
    config = fewbit.QuantConfig(bits=8, group_size=16, seq_len=32, num_samples=4)
    report = fewbit.quantize(tmp_path / "tiny.gguf", config, dataset=text, output=tmp_path / "out")
    assert report.modules == 14
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["quantization_config"]["quant_method"] == "gptq"
    ids = torch.randint(4, 60, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = model(ids).logits, fewbit.load(tmp_path / "out")(ids).logits
    assert (after - before).norm() / before.norm() < 0.05


def test_a_broken_gguf_file_is_refused(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(fewbit.FewbitError, match="cannot read the configuration"):
        fewbit.quantize(tmp_path / "broken.gguf", dataset=["x"], output=tmp_path / "out")


def test_the_error_names_the_missing_package(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(fewbit.errors.DependencyError, match=r"pip install gguf sentencepiece$"):
        fewbit.quantize(tmp_path / "a.gguf", dataset=["x"], output=tmp_path / "out")
