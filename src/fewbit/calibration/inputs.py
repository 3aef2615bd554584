"""Batches that hold more than tokens: what a model's processor makes of images, sound and text.

Such a batch is one forward pass, as given. Only the model knows which pixels belong to which token, so nothing is
cut, split, or put together with others. What is missing for a forward pass is added: the batch dimension of a
single sample, and the decoder's input where labels say what it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError

Batch = dict[str, Tensor]

_IGNORED_LABEL = -100  # what transformers' losses leave out


def is_input(item: Mapping[str, Any]) -> bool:
    """Whether an element without ``input_ids`` looks like arguments for a model: tensors, arrays, lists of those."""
    values = [value for value in item.values() if value is not None]
    return bool(values) and all(
        _is_array(value) or (isinstance(value, (list, tuple)) and value and all(map(_is_array, value)))
        for value in values
    )


def to_tensor(value: Any, where: str) -> Tensor:
    """A tensor on the CPU from what a processor may return.

    Raises:
        CalibrationError: the value is no number, or its parts have different shapes.
    """
    if isinstance(value, Tensor):
        return value.detach().cpu()
    try:
        if isinstance(value, (list, tuple)) and value and all(map(_is_array, value)):
            tensor = torch.stack([torch.as_tensor(part).detach().cpu() for part in value])
        else:
            tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError(
            f"{where} cannot be made a tensor: {error}. Leave it out, or let the processor return tensors "
            "(return_tensors='pt')"
        ) from error
    return tensor.long() if tensor.numel() == 0 else tensor


def is_more_than_tokens(tensors: Batch) -> bool:
    """Whether there are images, sound or the like: real numbers or bytes that do not go with the tokens."""
    ids = tensors.get("input_ids")
    return ids is None or any(
        value.shape != ids.shape and (value.is_floating_point() or value.dtype == torch.uint8)
        for value in tensors.values()
    )


def as_batch(tensors: Batch) -> Batch:
    """The tensors of one forward pass; a single sample, whose token ids have one dimension, gets a batch's.

    Tensors of one dimension are then one sample's, and so are real numbers of two or three (an image, a spectrogram),
    unless a ``…_grid_thw`` says that images are a flat list of patches. Others are lists of images already.
    """
    ids = next((value for key, value in tensors.items() if key.endswith("input_ids")), None)
    if ids is None or ids.ndim != 1:
        return tensors
    flat = any(key.endswith("grid_thw") for key in tensors)

    def lacks_it(value: Tensor) -> bool:
        return value.ndim < 2 or (value.is_floating_point() and value.ndim < 4 and not flat)

    return {key: value[None] if lacks_it(value) else value for key, value in tensors.items()}


def add_decoder_inputs_from_labels(batch: Batch, decoder_start_token_id: int) -> None:
    """Give an encoder-decoder its second input, in place: the labels shifted right by one.

    Raises:
        CalibrationError: there are no labels.
    """
    if "labels" not in batch:
        raise CalibrationError(
            f"a batch with {', '.join(batch)} says nothing of what the decoder reads: add decoder_input_ids or labels, "
            "the tokens of the text that belongs to it"
        )
    labels = batch["labels"]
    start = torch.full_like(labels[:, :1], decoder_start_token_id)
    kept = torch.cat([torch.ones_like(start), (labels[:, :-1] != _IGNORED_LABEL).to(labels.dtype)], dim=1)
    shifted = torch.cat([start, labels[:, :-1]], dim=1)
    batch["decoder_input_ids"] = shifted.masked_fill(kept == 0, decoder_start_token_id)
    if not bool(kept.all()):
        batch["decoder_attention_mask"] = kept


def count_tokens(batch: Batch) -> int:
    """Tokens that are not masked; 0 where a batch holds none."""
    ids = batch.get("input_ids", batch.get("decoder_input_ids"))
    if ids is None:
        return 0
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None and mask.shape == ids.shape else ids.numel()


def count_sequences(batches: Sequence[Batch]) -> int:
    """Rows of all batches."""
    firsts = [batch.get("input_ids", next(iter(batch.values()))) for batch in batches]
    return sum(len(first) if first.ndim else 1 for first in firsts)


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) or hasattr(value, "__array__")
