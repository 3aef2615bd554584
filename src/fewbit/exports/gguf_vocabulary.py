"""The vocabulary of a GGUF file: tokens, merges, special tokens, chat template, and how text is split before.

Two kinds of tokenizer.json have an equal in llama.cpp: byte-level BPE, whose pre-tokenizer must be one with a name
there, and BPE with byte fallback, as SentencePiece has it, where scores take the part of the merges.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ..errors import CheckpointError

FILE = "tokenizer.json"
# How tokenizer.json splits text → llama.cpp's name for it, with and without ignore_merges. "%" stands for the digits.
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {
    (_LLAMA3.replace("%", r"\p{N}{1,3}"), True): "llama-bpe",
    (_LLAMA3.replace("%", r"\p{N}{1,3}"), False): "smaug-bpe",
    (_LLAMA3.replace("%", r"\p{N}"), False): "qwen2",
}
# How BPE with byte fallback, in tokenizer.json, turns spaces into "▁".
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PREPEND = {"type": "Prepend", "prepend": "▁"}
_METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


def check_tokenizer(stated: Mapping[str, Any]) -> str | None:
    """Return llama.cpp's name of how byte-level BPE splits text; None for BPE with byte fallback.

    Args:
        stated: content of tokenizer.json.

    Raises:
        CheckpointError: llama.cpp has no equal, as far as is known here.
    """
    model = stated["model"]
    if model.get("type") != "BPE":
        raise _unknown(f"is of type {model.get('type')}")
    if model.get("byte_fallback"):
        _adds_space(stated)
        return None
    normalizer = (stated.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise _unknown(f"changes text first ({normalizer})")
    return _split_name(stated.get("pre_tokenizer"), bool(model.get("ignore_merges")))


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """Read tokenizer.json.

    Raises:
        CheckpointError: there is none.
    """
    file = folder / FILE
    if not file.exists():
        raise CheckpointError(f"{folder} has no {FILE}; copy the original model's files into it")
    stated: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return stated


def add_vocabulary(writer: Any, folder: Path, size: int, gguf: Any) -> None:
    """Add the tokenizer in `folder`, for an embedding of `size` rows.

    Raises:
        CheckpointError: there is none, or llama.cpp has no equal.
    """
    stated = read_tokenizer(folder)
    split = check_tokenizer(stated)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens, kinds = _tokens(tokenizer, size, stated["model"].get("unk_token"))
    writer.add_tokenizer_model("llama" if split is None else "gpt2")
    writer.add_tokenizer_pre(split or "default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if split is None:
        writer.add_token_scores(_scores(tokens, stated["model"]["merges"]))
        writer.add_add_space_prefix(_adds_space(stated))
    special = gguf.SpecialVocab(folder, load_merges=split is not None, n_vocab=size)
    special.add_special_token["bos"] = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    special.add_to_gguf(writer, quiet=True)


def _tokens(tokenizer: Any, size: int, unknown: str | None) -> tuple[list[str], list[int]]:
    """Token and kind of every row of the embedding; rows without a token are called unused."""
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(by_id) >= size:
        raise CheckpointError(
            f"the tokenizer has a token {max(by_id)}, and the embedding {size} rows: they do not belong to one model"
        )
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for number in range(size):
        token = by_id.get(number, f"[PAD{number}]")
        tokens.append(token)
        if number not in by_id:
            kinds.append(_UNUSED)
        elif token == unknown:
            kinds.append(_UNKNOWN)
        elif number in added:
            kinds.append(_CONTROL if added[number].special else _USER_DEFINED)
        else:
            kinds.append(_BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else _NORMAL)
    return tokens, kinds


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """Scores that order pairs as the merges do: llama.cpp joins the pair whose token has the highest score."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        left, right = pair if isinstance(pair, list) else pair.split(" ")
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _adds_space(stated: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text; it and the other spaces become "▁"."""
    normalizer, before = stated.get("normalizer") or {}, stated.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    if before.get("type") in (None, "Split"):  # Gemma's splits at spaces, which are no longer there
        if steps == [_REPLACE]:
            return False
        if steps == [_PREPEND, _REPLACE]:
            return True
    # Its prepend_scheme "first" has no equal: llama.cpp also adds a space after special tokens.
    if not steps and before == _METASPACE:
        return False
    kinds = [step["type"] for step in steps] or [before.get("type")]
    raise _unknown(f"changes text first ({', '.join(map(str, kinds))})")


def _split_name(pre_tokenizer: Any, ignore_merges: bool) -> str:
    """llama.cpp's name of a pre-tokenizer of tokenizer.json."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    kinds = [step.get("type") for step in steps]
    if not ignore_merges and not steps[-1].get("add_prefix_space"):
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
            return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        name = _PATTERNS.get((steps[0].get("pattern", {}).get("Regex", ""), ignore_merges))
        if name is not None:
            return name
    raise _unknown(f"splits text in a way without a name there ({', '.join(map(str, kinds))})")


def _unknown(what: str) -> CheckpointError:
    return CheckpointError(
        f"export to gguf knows no equal in llama.cpp for this tokenizer ({FILE}), which {what}: export with --to "
        "dense, then convert that folder with llama.cpp's own script"
    )
