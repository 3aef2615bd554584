"""From running text to token windows, with bounded memory and the same choice for the same seed.

A text much longer than what is wanted is thinned to evenly spaced blocks while it is read, so that the
sample covers the whole of it and little is tokenised in vain; windows then never cross a gap. Special
tokens are not added.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import CalibrationError

# A text up to this length is tokenised whole: cutting it would change a token at the seam.
TOKENIZE_CHARACTERS = 1 << 22
_BLOCK_CHARACTERS = 1 << 16
_BLOCKS = 256

T = TypeVar("T")


def blocks(pieces: Iterable[str], size: int) -> Iterator[str]:
    """Re-cut text into blocks of at most `size` characters, after a line end where the last half has one."""
    waiting: list[str] = []
    length = 0
    for piece in pieces:
        waiting.append(piece)
        length += len(piece)
        if length <= size:
            continue
        text, start = "".join(waiting), 0
        while len(text) - start > size:
            cut = text.rfind("\n", start + size // 2, start + size) + 1 or start + size
            yield text[start:cut]
            start = cut
        waiting, length = [text[start:]], len(text) - start
    if length:
        yield "".join(waiting)


def thin(items: Iterable[T], limit: int) -> tuple[list[T], int, int]:
    """At most `limit` evenly spaced items, in one pass over a stream of unknown length.

    Returns:
        The items at positions 0, stride, 2·stride, …; the stride (a power of two); the stream's length.
    """
    kept: list[T] = []
    stride, count = 1, 0
    for item in items:
        if count % stride == 0:
            kept.append(item)
            if len(kept) > limit:
                kept, stride = kept[::2], 2 * stride
        count += 1
    return kept, stride, count


def choose(count: int, wanted: int | None, seed: int) -> list[int]:
    """Ascending positions, one out of each of `wanted` equal parts of ``range(count)``; all if too few."""
    if wanted is None or wanted >= count:
        return list(range(count))
    # random() is the one method whose sequence Python guarantees for a seed.
    draw = random.Random(seed).random
    bounds = [part * count // wanted for part in range(wanted + 1)]
    return [start + int(draw() * (stop - start)) for start, stop in itertools.pairwise(bounds)]


def tokenize(text: Iterable[str], tokenizer: Any) -> Iterator[Tensor]:
    """Token ids, int64 (count,), of each piece of `text`, without special tokens.

    Raises:
        CalibrationError: there is no tokenizer.
    """
    if tokenizer is None:
        raise CalibrationError("the dataset is text, so a tokenizer is needed: pass tokenizer=, or token ids")
    for piece in blocks(text, TOKENIZE_CHARACTERS):
        ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        yield torch.tensor(ids, dtype=torch.int64)


def cut_windows(ids: Tensor, seq_len: int) -> list[Tensor]:
    """Adjoining windows of `seq_len` tokens; the incomplete last one only if there is no other."""
    whole = len(ids) // seq_len
    if whole == 0:
        return [ids] if len(ids) else []
    return list(ids[: whole * seq_len].view(whole, seq_len))


def sample_windows(
    pieces: Iterable[str], tokenizer: Any, *, num_samples: int | None, seq_len: int, seed: int
) -> tuple[list[Tensor], list[str]]:
    """Windows spread over the whole text, and notes on what the caller did not ask for.

    Returns:
        int64 tensors of shape (seq_len,), at most `num_samples` (None: as many as there are); only where
        the text is shorter than one window, a single shorter one. Empty if the text has no tokens.
    """
    if num_samples is None:
        size, limit = max(_BLOCK_CHARACTERS, 32 * seq_len), _BLOCKS
    else:  # blocks of a few windows each, so that little more is tokenised than is used
        size, limit = 16 * seq_len, 2 * num_samples
    kept, stride, count = thin(blocks(pieces, size), limit)
    notes = []
    if stride > 1 and num_samples is None:
        notes.append(
            f"the text is long: every {stride}th of its {count:,} blocks of {size:,} characters was read"
        )
    segments = kept if stride > 1 else ["".join(kept)]
    windows = []
    for segment in segments:
        parts = list(tokenize([segment], tokenizer))
        windows += cut_windows(torch.cat(parts), seq_len) if parts else []
    if len(windows) > 1:  # thinned blocks may be shorter than a window
        windows = [window for window in windows if len(window) == seq_len] or windows[:1]
    chosen = [windows[i] for i in choose(len(windows), num_samples, seed)]
    if num_samples is not None and 0 < len(chosen) < num_samples:
        notes.append(
            f"the text gives {len(chosen)} windows of {seq_len} tokens; {num_samples} were asked for"
        )
    return chosen, notes
