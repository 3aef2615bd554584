"""`evaluate_perplexity`: perplexity on the test text of wikitext2, by fewbit's protocol (docs/evaluation.md)."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...evaluation import evaluate, windows

_SEQ_LEN = 512


def evaluate_perplexity(model: nn.Module, tokenizer: Any) -> float:
    """Return the perplexity on windows of 512 tokens.

    Raises:
        CalibrationError: wikitext2 cannot be read.
        ModelError: the model is not a causal language model.
    """
    return evaluate(model, windows("wikitext2", tokenizer, _SEQ_LEN)).perplexity
