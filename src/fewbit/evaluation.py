"""Evaluate a model on a text: perplexity, and KL divergence and top-1 agreement with a second model.

The protocol, so that numbers can be compared (docs/evaluation.md says why):

- the text is tokenised whole, without special tokens, and cut into adjoining windows of `seq_len` tokens;
  an incomplete last window is dropped, unless it is the only one;
- every window is scored alone: its first token is given, the other seq_len − 1 are predicted;
- nll is the mean over all predicted tokens, perplexity = exp(nll);
- KL is the mean over the same positions of KL(against ‖ model), in nats.

Log-softmax is computed in float32 on a few positions at a time, sums are kept in float64.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .calibration.sampling import tokenize
from .calibration.sources import Corpus, joined, open_source
from .errors import CalibrationError, ModelError
from .resources import rows_at_once


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model on one set of windows.

    Attributes:
        perplexity: exp(nll); infinite where that overflows.
        nll: mean negative log-likelihood of a predicted token, in nats.
        stderr: standard error of the perplexity (perplexity · nll_stderr); None with a single window.
        nll_stderr: standard error of nll, from the spread over windows; None with a single window.
        tokens: predicted tokens.
        windows: number of windows.
        seq_len: tokens per window.
        seconds: wall time, both models.
        kl: mean KL(against ‖ model) per token, in nats; None without a second model, as the next three.
        kl_stderr: standard error of `kl` over windows.
        top1_agreement: share of positions at which both models rank the same token first.
        base_perplexity: perplexity of the second model.
    """

    perplexity: float
    nll: float
    stderr: float | None
    nll_stderr: float | None
    tokens: int
    windows: int
    seq_len: int
    seconds: float
    kl: float | None = None
    kl_stderr: float | None = None
    top1_agreement: float | None = None
    base_perplexity: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; an infinite perplexity becomes None."""
        result = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in result.items()}


def windows(
    dataset: Any, tokenizer: Any, seq_len: int = 512, num_windows: int | None = None, *, bos: bool = False
) -> Tensor:
    """Cut an evaluation text into windows.

    Args:
        dataset: a file, a named set (its test split) or "-", as in `calibration.prepare`; or a list of
            texts, which are joined by blank lines. ``[text]`` evaluates one text exactly as it is.
        tokenizer: a transformers tokenizer.
        seq_len: tokens per window, at least 2.
        num_windows: maximum number of windows, from the start; None for all.
        bos: put the tokenizer's BOS token first in every window, in place of its last text token.

    Returns:
        int64 (windows, seq_len); (1, fewer) if the text is shorter than one window.

    Raises:
        CalibrationError: the dataset cannot be read, is not text or has fewer than two tokens; or
            the tokenizer has no BOS token and `bos` asks for one.
    """
    if seq_len < 2 + bos:
        raise CalibrationError(f"seq_len must be at least {2 + bos}, to predict one token; got {seq_len}")
    if num_windows is not None and num_windows < 1:
        raise CalibrationError(f"the number of evaluation windows must be at least 1; got {num_windows}")
    bos_id = getattr(tokenizer, "bos_token_id", None)
    if bos and bos_id is None:
        raise CalibrationError("bos=True, but the tokenizer has no BOS token: evaluate without it")
    width = seq_len - bos
    ids = _first_tokens(tokenize(_text(dataset, tokenizer), tokenizer), num_windows and num_windows * width)
    whole = len(ids) // width
    result = ids[: whole * width].view(whole, width) if whole else ids[None]
    if result.shape[1] < 2:
        raise CalibrationError(f"the evaluation text has only {len(ids)} tokens; at least 2 are needed")
    if not bos:
        return result
    return torch.nn.functional.pad(result, (1, 0), value=bos_id)


def _text(dataset: Any, tokenizer: Any) -> Iterator[str]:
    source = open_source(dataset, tokenizer, split="test")
    if isinstance(source, Corpus):
        return source.pieces
    return joined(_strings(source.items), "\n\n")


def _strings(items: Iterable[Any]) -> Iterator[str]:
    for item in items:
        if not isinstance(item, str):
            raise CalibrationError(
                f"evaluation needs text to cut into windows, not {type(item).__name__} elements: pass a text "
                "file or a list of strings (token ids can go to evaluate() directly, as a tensor of windows)"
            )
        yield item


def _first_tokens(parts: Iterable[Tensor], wanted: int | None) -> Tensor:
    kept = [torch.empty(0, dtype=torch.int64)]
    count = 0
    for part in parts:
        kept.append(part)
        count += len(part)
        if wanted is not None and count >= wanted:
            break
    return torch.cat(kept)[:wanted]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    windows: Tensor,
    *,
    against: nn.Module | None = None,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score `model` on windows, and compare it with `against` if given.

    Args:
        model: a causal language model of transformers, on any device.
        windows: token ids (count, seq_len), seq_len ≥ 2, as `windows()` makes them.
        against: usually the original; same vocabulary. Both are run on every batch in turn, so that no
            logits are kept.
        batch_size: windows per forward pass; it changes no score beyond rounding.
        progress: called with (windows done, windows in all) after every batch.

    Raises:
        ModelError: a model is an encoder-decoder, has no language head, has too few positions, gives
            non-finite logits, or the vocabularies differ.
        CalibrationError: `windows` has no row, or rows of fewer than two tokens.
    """
    if windows.ndim != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
        raise CalibrationError(
            "evaluation windows must be of shape (count, seq_len) with seq_len ≥ 2; "
            f"got {tuple(windows.shape)}"
        )
    models = [model] if against is None else [model, against]
    for one in models:
        _check_model(one, windows)
    started = time.perf_counter()
    per_window: list[Tensor] = []
    with _eval_mode(models):
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            logits = [_logits(one, batch) for one in models]
            per_window.append(_scores(batch, *logits))
            del logits
            if progress is not None:
                progress(sum(map(len, per_window)), len(windows))
    scores = torch.cat(per_window)
    if not bool(scores.isfinite().all()):
        bad = int((~scores.isfinite().all(dim=1)).nonzero()[0])
        raise ModelError(
            f"the model gives logits that are not finite (first in window {bad}): it cannot be scored"
        )
    return _summary(scores, windows, against is not None, time.perf_counter() - started)


def _check_model(model: nn.Module, windows: Tensor) -> None:
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} is an encoder-decoder model; perplexity is defined here for causal "
            "language models only. Evaluate it on its own task"
        )
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and windows.shape[1] > positions:
        raise ModelError(
            f"windows of {windows.shape[1]} tokens do not fit {type(model).__name__}, which has {positions} "
            f"positions: use a seq_len of at most {positions}"
        )


@contextmanager
def _eval_mode(models: list[nn.Module]) -> Iterator[None]:
    training = [one for one in models if one.training]
    for one in training:
        one.eval()
    try:
        yield
    finally:
        for one in training:
            one.train()


def _logits(model: nn.Module, batch: Tensor) -> Tensor:
    """Logits (batch, seq_len − 1, vocabulary) in the model's dtype."""
    output = model(input_ids=batch.to(next(model.parameters()).device), use_cache=False)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise ModelError(f"{type(model).__name__} gives no logits: load it with its language-model head")
    return logits[:, :-1]


def _scores(batch: Tensor, logits: Tensor, base: Tensor | None = None) -> Tensor:
    """Means per window, float64 (batch, 1) or (batch, 4): nll; and KL(base ‖ model), top-1 agreement, nll of base."""
    if base is not None and base.shape[-1] != logits.shape[-1]:
        raise ModelError(
            f"the two models have vocabularies of {logits.shape[-1]} and {base.shape[-1]}; "
            "they can only be compared with the same one"
        )
    rows, positions, vocabulary = logits.shape
    totals = torch.zeros(rows, 1 if base is None else 4, dtype=torch.float64)
    step = rows_at_once(rows * vocabulary, logits.device)
    for start in range(0, positions, step):
        part = slice(start, start + step)
        log_q = logits[:, part].float().log_softmax(-1)
        targets = batch[:, 1:][:, part].to(log_q.device)
        columns = [-log_q.gather(-1, targets[..., None])[..., 0]]
        if base is not None:
            log_p = base[:, part].to(log_q.device).float().log_softmax(-1)
            columns.append(nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1))
            columns.append((log_p.argmax(-1) == log_q.argmax(-1)).float())
            columns.append(-log_p.gather(-1, targets[..., None])[..., 0])
        totals += torch.stack([column.cpu().double().sum(1) for column in columns], dim=1)
    return totals / positions


def _summary(scores: Tensor, windows: Tensor, compared: bool, seconds: float) -> Evaluation:
    count, seq_len = windows.shape
    means = scores.mean(0).tolist()
    errors = (scores.std(0) / math.sqrt(count)).tolist() if count > 1 else [None] * len(means)
    perplexity = _perplexity(means[0])
    return Evaluation(
        perplexity=perplexity,
        nll=means[0],
        stderr=None if errors[0] is None else perplexity * errors[0],
        nll_stderr=errors[0],
        tokens=count * (seq_len - 1),
        windows=count,
        seq_len=seq_len,
        seconds=seconds,
        kl=means[1] if compared else None,
        kl_stderr=errors[1] if compared else None,
        top1_agreement=means[2] if compared else None,
        base_perplexity=_perplexity(means[3]) if compared else None,
    )


def _perplexity(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
