"""Calibration data: whatever the user has → batches of token ids on the CPU, with a fingerprint.

`prepare` is the whole story; where text comes from is in `sources`, how a text becomes windows in
`sampling`, how sequences become batches in `sequences`. Nothing here knows a model: what it needs of
one (positions, vocabulary, decoder start token) is passed in as numbers. The same inputs and the same
seed give the same batches.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import CalibrationError
from .inputs import Batch, count_sequences, count_tokens, is_more_than_tokens
from .sampling import choose, sample_windows, thin
from .sequences import add_decoder_inputs, check_ids, collate, fingerprint, read_item, truncate
from .sources import NAMED, Corpus, RetiredDatasetError, Sequences, open_source

__all__ = ["NAMED", "Calibration", "RetiredDatasetError", "prepare"]

_ITEMS_HELD = 4096


@dataclass(frozen=True)
class Calibration:
    """Batches ready for a model's forward.

    Attributes:
        batches: dicts of CPU tensors: input_ids int64 (batch, length); attention_mask int64 of the same
            shape (0 = padding, on the right) only where something is masked; further keys as given. Batches
            with more than tokens are as given altogether.
        fingerprint: SHA-256 over all of it.
        tokens: unmasked tokens in all batches; 0 where batches hold no tokens but images, say.
        sequences: rows in all batches.
        source: where they came from, in words (file names without folders).
        notes: what was done that the caller did not ask for, one sentence each.
    """

    batches: list[dict[str, Tensor]]
    fingerprint: str
    tokens: int
    sequences: int
    source: str
    notes: tuple[str, ...] = ()


def prepare(
    dataset: Any,
    tokenizer: Any = None,
    *,
    num_samples: int | None = 128,
    seq_len: int = 2048,
    batch_size: int = 1,
    seed: int = 0,
    max_positions: int | None = None,
    vocab_size: int | None = None,
    placeholders: Collection[int] = (),
    decoder_start_token_id: int | None = None,
) -> Calibration:
    """Turn a dataset into calibration batches.

    Running text (files, named sets, a `datasets.Dataset` with text) is tokenised without special tokens
    and cut into windows of `seq_len`; list elements and rows with ``input_ids`` stay one sequence each
    and are cut to `seq_len`. Of more windows or sequences than `num_samples`, one is drawn from each of
    `num_samples` equal parts.

    Args:
        dataset: see `sources.open_source`. Elements of a list may be what the model's processor makes of images
            or sound, with or without text: each one is a batch that the model's forward accepts.
        tokenizer: a transformers tokenizer; not needed for token ids.
        num_samples: sequences to use; None for all.
        seq_len: tokens per window, and the most per sequence.
        batch_size: sequences per batch.
        seed: of the choice.
        max_positions: the model's longest sequence; `seq_len` is capped to it.
        vocab_size: size of the model's vocabulary; larger ids are refused, except `placeholders` for images and sound.
        decoder_start_token_id: given for encoder-decoder models: batches get ``decoder_input_ids``.

    Raises:
        CalibrationError: no dataset, an unknown one, no tokens in it, or elements that cannot be used.
        DependencyError: an optional package is missing.
    """
    notes: list[str] = []
    if max_positions is not None and seq_len > max_positions:
        notes.append(
            f"seq_len {seq_len} is more than the model's {max_positions} positions: {max_positions} used"
        )
        seq_len = max_positions
    source = open_source(dataset, tokenizer)
    if isinstance(source, Corpus):
        windows, more = sample_windows(
            source.pieces, tokenizer, num_samples=num_samples, seq_len=seq_len, seed=seed
        )
        sequences: list[Batch] = [{"input_ids": window[None]} for window in windows]
    else:
        sequences, more = _sample_sequences(source, tokenizer, num_samples, seq_len, seed)
    notes += more
    if not sequences:
        raise CalibrationError(f"{source.label}: the dataset is empty, there is not one token in it")
    if vocab_size is not None:
        check_ids(sequences, vocab_size, placeholders)

    pad_token_id = getattr(tokenizer, "pad_token_id", None)
    batches = list(_batches(sequences, batch_size, pad_token_id))
    if decoder_start_token_id is not None:
        for batch in batches:
            add_decoder_inputs(batch, decoder_start_token_id)
    return Calibration(
        batches=batches,
        fingerprint=fingerprint(batches),
        tokens=sum(map(count_tokens, batches)),
        sequences=count_sequences(batches),
        source=source.label,
        notes=tuple(notes),
    )


def _sample_sequences(
    source: Sequences, tokenizer: Any, num_samples: int | None, seq_len: int, seed: int
) -> tuple[list[Batch], list[str]]:
    if num_samples is None:
        items, count = list(enumerate(source.items)), 0
    else:
        items, _, count = thin(enumerate(source.items), max(_ITEMS_HELD, num_samples))
    read = [sequence for position, item in items for sequence in read_item(item, position, tokenizer)]
    full = [sequence for sequence in read if "input_ids" not in sequence or sequence["input_ids"].shape[1]]
    chosen = [full[i] for i in choose(len(full), num_samples, seed)]
    notes = list(_sequence_notes(chosen, len(read) - len(full), max(count, len(full)), seq_len))
    cut = [s if is_more_than_tokens(s) else truncate(s, seq_len) for s in chosen]
    return cut, [*notes, *_shortfall(cut, num_samples, seq_len)]


def _batches(sequences: list[Batch], batch_size: int, pad_token_id: int | None) -> Iterator[Batch]:
    """Batches of sequences; what is a batch already stays one."""
    waiting: list[Batch] = []
    for sequence in sequences:
        if is_more_than_tokens(sequence):
            yield sequence
            continue
        waiting.append(sequence)
        if len(waiting) == batch_size:
            yield collate(waiting, pad_token_id)
            waiting = []
    if waiting:
        yield collate(waiting, pad_token_id)


def _shortfall(sequences: list[Batch], num_samples: int | None, seq_len: int) -> Iterator[str]:
    """Fewer than half of the tokens that were asked for."""
    tokens = sum(map(count_tokens, sequences))
    if num_samples is not None and 0 < tokens < num_samples * seq_len / 2:
        yield (
            f"the dataset gives {len(sequences)} sequences of {round(tokens / len(sequences))} tokens on average; "
            f"{num_samples} of {seq_len} were asked for. More or longer text makes the result more accurate"
        )


def _sequence_notes(chosen: list[Batch], empty: int, count: int, seq_len: int) -> Iterator[str]:
    if empty:
        yield f"{empty} empty sequences were left out"
    if len(chosen) + empty < count:
        yield f"{len(chosen)} of {count} sequences were used: raise num_samples to use more"
    longer = [s for s in chosen if "input_ids" in s and s["input_ids"].shape[1] > seq_len]
    whole = sum(map(is_more_than_tokens, longer))
    if len(longer) > whole:
        yield f"{len(longer) - whole} of {len(chosen)} sequences were longer than {seq_len} tokens and were cut"
    if whole:
        yield (
            f"{whole} of {len(chosen)} sequences were longer than {seq_len} tokens and were not cut, because they "
            "hold more than tokens"
        )
