"""Tiny random models of many architectures. Weights are spread so that layers differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
)

VOCAB = 120

_COMMON = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128,
    },
    "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "opt": {
        "hidden_size": 48, "ffn_dim": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 128, "word_embed_proj_dim": 32,
    },
    "gpt_neox": {
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
    "bloom": {"hidden_size": 48, "n_layer": 2, "n_head": 4},
    "falcon": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "new_decoder_architecture": False},
    "phi3": {
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128,
    },
    "t5": {"d_model": 48, "d_ff": 80, "d_kv": 12, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
}  # fmt: skip
FAMILIES = tuple(_SHAPES)


def tiny_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of `family` in float32, in evaluation mode."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**_COMMON, **_SHAPES.get(family, {}), **changes})
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config).float().eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.6 / parameter.shape[-1] ** 0.5)
        elif "bias" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes and a few words, with VOCAB entries."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"-()\n"
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    for letter in letters:
        vocab[letter] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save_tiny(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A model folder with its tokenizer, as `save_pretrained` writes it."""
    tiny_model(family, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def random_sequences(
    count: int = 6, length: int = 24, seed: int = 1, vocab: int = VOCAB
) -> list[dict[str, Any]]:
    """Token dicts of equal length."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(4, vocab, (length,), generator=generator)} for _ in range(count)]


TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want "
    "of a wife. However little known the feelings or views of such a man may be on his first entering a "
    "neighbourhood, this truth is so well fixed in the minds of the surrounding families, that he is considered "
    "the rightful property of some one or other of their daughters. "
)

SMALL = {"group_size": 16, "seq_len": 32, "num_samples": 6}  # settings that quantize a tiny model in a second
