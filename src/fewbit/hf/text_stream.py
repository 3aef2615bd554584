"""Tokens in, text out: as early as it is certain, in the order of the prompts.

A token may hold part of a character, and how a token reads can depend on the one before it. So a row is decoded from a
little before its last printed token, and text is held back while it ends inside a character.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextOf:
    """The text of one row of tokens, piece by piece.

    Args:
        tokenizer: of transformers, fast or slow.
        ends: tokens after which nothing follows.
    """

    def __init__(self, tokenizer: Any, ends: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._ends = ends
        self._tokens: list[int] = []
        self._from = 0  # where decoding begins: tokens before it are printed, and cannot change what follows
        self._printed = 0  # tokens whose text is out
        self.done = False

    def add(self, token: int) -> str:
        """The text that is certain now and was not before."""
        if self.done:
            return ""
        self._tokens.append(token)
        self.done = token in self._ends
        return self._new_text(finished=self.done)

    def finish(self) -> str:
        """What was held back, when no token will follow."""
        self.done = True
        return self._new_text(finished=True)

    def _new_text(self, *, finished: bool) -> str:
        before = self._decode(self._tokens[self._from : self._printed])
        now = self._decode(self._tokens[self._from :])
        if len(now) <= len(before) or (now.endswith(_UNFINISHED) and not finished):
            return ""
        self._from, self._printed = self._printed, len(self._tokens)
        return now[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


class OrderedStream(BaseStreamer):  # type: ignore[misc]
    """Writes the texts of all prompts one after the other: the first as it comes, others when their turn comes.

    Args:
        write: takes pieces of text; after each text but the last it gets `between`.
        skip_prompt: whether what `put` gets first are the prompts.
    """

    def __init__(
        self,
        tokenizer: Any,
        write: Callable[[str], object],
        ends: Collection[int],
        *,
        between: str = "\n\n",
        skip_prompt: bool = True,
    ) -> None:
        self._make_row = functools.partial(TextOf, tokenizer, ends)
        self._write = write
        self._between = between
        self._skip = skip_prompt
        self._rows: list[TextOf] = []
        self._waiting: list[str] = []
        self._turn = 0

    def put(self, value: Tensor) -> None:
        """One token per prompt, (batch,); the first call may bring the prompts, (batch, tokens)."""
        if self._skip:
            self._skip = False
            return
        tokens = value.flatten().tolist()
        if not self._rows:
            self._rows = [self._make_row() for _ in tokens]
            self._waiting = [""] * len(tokens)
        for index, (row, token) in enumerate(zip(self._rows, tokens, strict=True)):
            self._waiting[index] += row.add(token)
        self._flush()

    def end(self) -> None:
        """No more tokens: everything that was held back."""
        for index, row in enumerate(self._rows):
            if not row.done:
                self._waiting[index] += row.finish()
        self._flush()

    def _flush(self) -> None:
        while self._turn < len(self._rows):
            text, self._waiting[self._turn] = self._waiting[self._turn], ""
            if text:
                self._write(text)
            if not self._rows[self._turn].done:
                return
            self._turn += 1
            if self._turn < len(self._rows):
                self._write(self._between)
