"""A key-value cache with room for the whole text, written in place.

transformers' own grows by concatenation: every token copies all keys and values. This one holds the same numbers and
gives the same views, so that results do not change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


class ReservedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one block, (batch, heads, capacity, head size), of which `length` tokens are filled in."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room, once the shapes are known."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.all_keys = _room(key_states, self.capacity)
        self.all_values = _room(value_states, self.capacity)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Put new tokens in place; all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[-2]
        self.keys, self.values = self.view(self.length)
        self.keys[:, :, start:] = key_states
        self.values[:, :, start:] = value_states
        return self.keys, self.values

    def view(self, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `length` tokens, without a copy."""
        return self.all_keys[:, :, :length], self.all_values[:, :, :length]

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.length


class ReservedCache(Cache):  # type: ignore[misc]
    """One `ReservedLayer` per block."""

    def __init__(self, blocks: int, capacity: int) -> None:
        super().__init__(layers=[ReservedLayer(capacity) for _ in range(blocks)])
        self._padded: bool | None = None

    def mask(self, attention_mask: Tensor | None) -> Tensor | None:
        """For one new token: bool (batch, 1, 1, tokens), or None where no text is padded.

        Only prompts are padded, so the answer stays what it was for the first mask.
        """
        if attention_mask is None:
            return None
        if self._padded is None:
            self._padded = not bool(attention_mask.all())
        return attention_mask[:, None, None, :].bool() if self._padded else None


def reserved_cache(model: PreTrainedModel, capacity: int) -> tuple[ReservedCache | None, str]:
    """A cache for `capacity` tokens, or None and the reason why this model keeps transformers' own."""
    if model.config.is_encoder_decoder:
        return None, "the model is an encoder and a decoder"
    if model.generation_config.cache_implementation is not None or not model.generation_config.use_cache:
        return None, "the model's generation_config.json asks for a cache of its own"
    layers = DynamicCache(config=model.config).layers
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return None, "not all blocks of the model attend to the whole text"
    return ReservedCache(len(layers), capacity), ""


def _room(states: Tensor, capacity: int) -> Tensor:
    batch, heads, _, size = states.shape
    return torch.zeros((batch, heads, capacity, size), dtype=states.dtype, device=states.device)
