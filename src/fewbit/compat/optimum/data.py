"""Calibration data in the form that optimum's scripts pass around: a list of dicts of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...calibration.sampling import sample_windows
from ...calibration.sequences import collate, read_item
from ...calibration.sources import NAMED, RETIRED, Corpus, open_source
from ...errors import CalibrationError
from ...gptq_arguments import LOG, require_pad_token

_SPLITS = {"train": "train", "validation": "test"}


def get_dataset(
    dataset_name: str,
    tokenizer: Any,
    nsamples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    split: str = "train",
) -> list[dict[str, Tensor]]:
    """Draw token windows from a known data set, as `fewbit.quantize` does.

    Args:
        dataset_name: wikitext2, c4 or c4-new.
        tokenizer: a transformers tokenizer.
        nsamples: number of windows.
        seqlen: tokens per window.
        seed: seed of the choice.
        split: "train" or "validation".

    Returns:
        Dicts of ``input_ids`` and ``attention_mask``, int64 (1, seqlen).

    Raises:
        CalibrationError: the name or split is unknown; for ptb and ptb-new it is also a RuntimeError.
        DependencyError: the package datasets is missing.
    """
    if split not in _SPLITS:
        raise CalibrationError(f"split must be 'train' or 'validation'; got {split!r}")
    if dataset_name not in (*NAMED, *RETIRED):
        raise CalibrationError(f"there is no dataset {dataset_name!r}: use one of {', '.join(NAMED)}")
    source = open_source(dataset_name, tokenizer, split=_SPLITS[split])
    assert isinstance(source, Corpus)
    windows, notes = sample_windows(source.pieces, tokenizer, num_samples=nsamples, seq_len=seqlen, seed=seed)
    for note in notes:
        LOG.warning(note)
    return [_masked({"input_ids": window[None]}) for window in windows]


def prepare_dataset(
    examples: Sequence[Mapping[str, Any]], batch_size: int = 1, pad_token_id: int | None = None
) -> list[dict[str, Tensor]]:
    """Make batches of token dicts, padded on the right.

    Args:
        examples: dicts of ``input_ids`` and ``attention_mask``, lists or tensors of one or two dimensions.
        batch_size: sequences per batch.
        pad_token_id: needed for a `batch_size` above 1.

    Raises:
        CalibrationError: there is no pad token, or an example cannot be read.
    """
    require_pad_token(batch_size, pad_token_id)
    sequences = [s for position, example in enumerate(examples) for s in read_item(example, position, None)]
    batches = [sequences[i : i + batch_size] for i in range(0, len(sequences), batch_size)]
    return [_masked(collate(batch, pad_token_id)) for batch in batches]


def _masked(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"attention_mask": torch.ones_like(batch["input_ids"]), **batch}
