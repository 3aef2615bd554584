"""Perplexity of a model on the test text of wikitext2, by fewbit's protocol (docs/evaluation.md)."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...evaluation import evaluate, windows

_SEQ_LEN = 512


def evaluate_perplexity(model: nn.Module, tokenizer: Any) -> float:
    """Perplexity on windows of 512 tokens.

    Raises:
        CalibrationError: wikitext2 cannot be read.
        ModelError: the model is no causal language model.
    """
    return evaluate(model, windows("wikitext2", tokenizer, _SEQ_LEN)).perplexity
