"""From single sequences to padded batches: the form in which a model takes them.

A sequence is a dict of tensors with a leading dimension of 1. Keys of shape (1, length), such as
``attention_mask`` or ``token_type_ids``, go with the tokens: they are cut and padded like them. All
other keys (``decoder_input_ids`` …) pass through whole. An element with more than tokens is a batch
already: see `inputs`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import CalibrationError
from .inputs import Batch, add_decoder_inputs_from_labels, as_batch, is_input, is_more_than_tokens, to_tensor


def read_item(item: Any, position: int, tokenizer: Any) -> Iterator[Batch]:
    """The sequences of one list element: a string, a token dict (1-D or 2-D) or bare token ids; or the one batch
    of an element that holds more than tokens.

    Strings are encoded as the tokenizer does by default, with its special tokens. Masked columns at
    either end are removed, so that padding is always on the right later. Lengths may be zero.

    Raises:
        CalibrationError: the element has another type, or its tensors do not fit together.
    """
    where = f"dataset element {position}"
    if isinstance(item, str):
        if tokenizer is None:
            raise CalibrationError(
                f"{where} is a string, so a tokenizer is needed: pass tokenizer=, or token ids"
            )
        item = {"input_ids": tokenizer(item, verbose=False)["input_ids"]}
    elif isinstance(item, (Tensor, np.ndarray)) or (
        isinstance(item, (list, tuple)) and all(isinstance(i, int) for i in item)
    ):
        item = {"input_ids": item}
    if not isinstance(item, Mapping) or not ("input_ids" in item or is_input(item)):
        got = (
            f"a dict with {', '.join(map(repr, item))}" if isinstance(item, Mapping) else type(item).__name__
        )
        raise CalibrationError(f"{where} is {got}; it must be a string or a dict with input_ids")
    tensors = {key: to_tensor(value, f"{where}, {key!r}") for key, value in item.items() if value is not None}
    if is_more_than_tokens(tensors):
        batch = as_batch(tensors)
        if "input_ids" in batch:
            _check_ids_and_mask(batch, where)
        yield batch
        return
    if tensors["input_ids"].ndim == 1:
        tensors = {key: value[None] for key, value in tensors.items()}
    _check(tensors, where)
    for row in range(len(tensors["input_ids"])):
        yield _strip({key: value[row : row + 1] for key, value in tensors.items()})


def _check(tensors: Batch, where: str) -> None:
    _check_ids_and_mask(tensors, where)
    ids = tensors["input_ids"]
    for key, value in tensors.items():
        if value.ndim == 0 or len(value) != len(ids):
            raise CalibrationError(
                f"{where}: {key!r} must have {len(ids)} rows as input_ids; got {tuple(value.shape)}"
            )


def _check_ids_and_mask(tensors: Batch, where: str) -> None:
    ids = tensors["input_ids"]
    if ids.ndim != 2 or ids.dtype.is_floating_point or ids.dtype in (torch.bool, torch.complex64):
        raise CalibrationError(
            f"{where}: input_ids must be whole numbers in one or two dimensions; "
            f"got {ids.dtype} of shape {tuple(ids.shape)}"
        )
    tensors["input_ids"] = ids.long()
    mask = tensors.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        raise CalibrationError(
            f"{where}: attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}; "
            "they must be equal"
        )


def _strip(sequence: Batch) -> Batch:
    mask = sequence.get("attention_mask")
    if mask is None:
        return sequence
    seen = mask[0].nonzero()
    if len(seen) == 0:
        return _slice(sequence, 0, 0)
    sequence = _slice(sequence, int(seen[0]), int(seen[-1]) + 1)
    if bool(sequence["attention_mask"].all()):
        del sequence["attention_mask"]
    return sequence


def _slice(sequence: Batch, start: int, stop: int) -> Batch:
    return {
        key: value[:, start:stop] if _goes_with_tokens(key, sequence) else value
        for key, value in sequence.items()
    }


def _goes_with_tokens(key: str, sequence: Batch) -> bool:
    """Whether a key is cut and padded like the tokens. A decoder's input of the same length is its own sequence."""
    return sequence[key].shape == sequence["input_ids"].shape and not key.startswith("decoder_")


def truncate(sequence: Batch, seq_len: int) -> Batch:
    """The first `seq_len` tokens."""
    return _slice(sequence, 0, seq_len)


def check_ids(sequences: Sequence[Batch], vocab_size: int, placeholders: Collection[int] = ()) -> None:
    """Refuse token ids that the model has no embedding for.

    Args:
        placeholders: ids that stand for images or sound, and need none.

    Raises:
        CalibrationError: a token id lies outside 0 … vocab_size − 1.
    """
    for number, sequence in enumerate(sequences):
        ids = sequence.get("input_ids", torch.empty(0, dtype=torch.int64))
        known = torch.isin(ids, torch.tensor([*placeholders], dtype=torch.int64))
        outside = ids[((ids < 0) | (ids >= vocab_size)) & ~known]
        if len(outside):
            raise CalibrationError(
                f"calibration sequence {number} has the token id {int(outside[0])}, outside the model's "
                f"vocabulary of {vocab_size}: was it made with another model's tokenizer?"
            )


def collate(sequences: Sequence[Batch], pad_token_id: int | None) -> Batch:
    """One batch: padded on the right to the longest sequence; attention_mask only where something is masked.

    Raises:
        CalibrationError: lengths differ and there is no pad token, or the keys do not fit together.
    """
    first = sequences[0]
    keys = {key for sequence in sequences for key in sequence} - {"attention_mask"}
    lengths = [sequence["input_ids"].shape[1] for sequence in sequences]
    longest = max(lengths)
    if min(lengths) < longest and pad_token_id is None:
        raise CalibrationError(
            f"sequences of unequal length ({min(lengths)} and {longest} tokens) in one batch need a "
            "pad token, and the tokenizer has none: set tokenizer.pad_token = tokenizer.eos_token, "
            "or use batch_size 1"
        )
    padded: dict[str, list[Tensor]] = {key: [] for key in first if key in keys}
    masks = []
    for sequence, length in zip(sequences, lengths, strict=True):
        if missing := keys - sequence.keys():
            raise CalibrationError(
                "sequences in one batch must have the same keys, but one lacks "
                f"{', '.join(sorted(missing))}: use batch_size 1"
            )
        for key in keys:
            value, fill = sequence[key], (pad_token_id or 0) if key == "input_ids" else 0
            aligned = _goes_with_tokens(key, sequence)
            padded[key].append(pad(value, (0, longest - length), value=fill) if aligned else value)
        mask = sequence.get("attention_mask", torch.ones(1, length, dtype=torch.int64))
        masks.append(pad(mask.long(), (0, longest - length)))
    batch = {key: _concatenate(key, values) for key, values in padded.items()}
    mask = torch.cat(masks)
    if not bool(mask.all()):
        batch["attention_mask"] = mask
    return batch


def _concatenate(key: str, values: list[Tensor]) -> Tensor:
    if len({value.shape for value in values}) > 1:
        shapes = ", ".join(str(tuple(value.shape)) for value in values)
        raise CalibrationError(f"{key!r} has different shapes in one batch ({shapes}): use batch_size 1")
    return torch.cat(values)


def add_decoder_inputs(batch: Batch, decoder_start_token_id: int) -> None:
    """Give an encoder-decoder its second input, in place: the tokens shifted right by one, or the labels."""
    if "decoder_input_ids" in batch:
        return
    if "labels" in batch or is_more_than_tokens(batch):
        add_decoder_inputs_from_labels(batch, decoder_start_token_id)
        return
    batch["decoder_input_ids"] = _shift_right(batch["input_ids"], decoder_start_token_id)
    if "attention_mask" in batch:
        batch["decoder_attention_mask"] = _shift_right(batch["attention_mask"], 1)


def _shift_right(values: Tensor, first: int) -> Tensor:
    return pad(values[:, :-1], (1, 0), value=first)


def fingerprint(batches: Sequence[Batch]) -> str:
    """SHA-256 over the names, shapes, dtypes and bytes of all tensors of all batches, in order."""
    digest = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            value = batch[key]
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        digest.update(b"\n")
    return digest.hexdigest()
