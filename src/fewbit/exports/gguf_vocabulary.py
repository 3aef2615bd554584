"""The vocabulary of a GGUF file: tokens, merges, special tokens, chat template, and how text is split before."""

from __future__ import annotations

import json
from typing import Any

from transformers import AutoTokenizer

from ..checkpoint.reader import Checkpoint
from ..errors import CheckpointError

# How tokenizer.json splits text → llama.cpp's name for it. "%" stands for the digits.
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {
    _LLAMA3.replace("%", r"\p{N}{1,3}"): "llama-bpe",
    _LLAMA3.replace("%", r"\p{N}"): "qwen2",
}
_TOKEN_NORMAL, _TOKEN_CONTROL, _TOKEN_USER_DEFINED, _TOKEN_UNUSED = 1, 3, 4, 5


def add_vocabulary(writer: Any, checkpoint: Checkpoint, gguf: Any) -> None:
    """Add the tokenizer of a checkpoint.

    Raises:
        CheckpointError: there is none, or it splits text in a way that has no known name in llama.cpp.
    """
    file = checkpoint.path / "tokenizer.json"
    if not file.exists():
        raise CheckpointError(
            f"{checkpoint.path} has no tokenizer.json; copy the original model's files into it"
        )
    stated = json.loads(file.read_text(encoding="utf-8"))
    if stated["model"].get("type") != "BPE":
        raise CheckpointError(
            f"export to gguf does not know tokenizers of type {stated['model'].get('type')}"
        )
    size = checkpoint.config["vocab_size"]
    if stated["model"].get("byte_fallback"):
        _add_sentencepiece(writer, checkpoint, gguf, size)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_name(stated.get("pre_tokenizer"), file))
        tokens, kinds = _tokens(checkpoint, size)
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
    special = gguf.SpecialVocab(
        checkpoint.path, load_merges=not stated["model"].get("byte_fallback"), n_vocab=size
    )
    special.add_to_gguf(writer, quiet=True)


def _tokens(checkpoint: Checkpoint, size: int) -> tuple[list[str], list[int]]:
    """Token and kind of every row of the embedding; rows without a token are called unused."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for number in range(size):
        tokens.append(by_id.get(number, f"[PAD{number}]"))
        if number not in by_id:
            kinds.append(_TOKEN_UNUSED)
        elif number in added:
            kinds.append(_TOKEN_CONTROL if added[number].special else _TOKEN_USER_DEFINED)
        else:
            kinds.append(_TOKEN_NORMAL)
    return tokens, kinds


def _add_sentencepiece(writer: Any, checkpoint: Checkpoint, gguf: Any, size: int) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    found = list(gguf.LlamaHfVocab(checkpoint.path).all_tokens())
    found += [(f"[PAD{number}]".encode(), -1000.0, _TOKEN_UNUSED) for number in range(len(found), size)]
    writer.add_token_list([token for token, _, _ in found])
    writer.add_token_scores([score for _, score, _ in found])
    writer.add_token_types([kind for _, _, kind in found])


def _split_name(pre_tokenizer: Any, file: Any) -> str:
    """llama.cpp's name of a pre-tokenizer of tokenizer.json."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        name = _PATTERNS.get(steps[0].get("pattern", {}).get("Regex", ""))
        if name is not None:
            return name
    raise CheckpointError(
        f"{file} splits text in a way that export to gguf has no name for ({', '.join(map(str, kinds))}): export with "
        "--to dense, then convert that folder with llama.cpp's own script"
    )
