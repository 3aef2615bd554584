"""The step of one token as one compiled graph.

torch.compile takes the model's own ``forward`` whole. In the place of the model's cache it gets one of `_Place`: room
up to and including the new token, and where that token belongs as a tensor, so that one graph does for every length.
Compiled arithmetic rounds where the plain one does (``emulate_precision_casts``).

torch would check the state of every submodule before each call, which takes longer than what compiling saves. These
checks are dropped; instead a graph belongs to one model in one state, which `_state` describes.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.callback import callback_handler
from torch._dynamo.exc import TorchDynamoException
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..kernels.cpu.fused_ops import ATTENTION
from .static_cache import ReservedCache

_KEPT_CHECKS = ("SHAPE_ENV", "GRAD_MODE", "GLOBAL_STATE", "DETERMINISTIC_ALGORITHMS")
_ARGUMENTS = ("ids", "positions", "mask", "keys", "values", "place", "state")


class _Place(DynamicLayer):  # type: ignore[misc]
    """What a compiled block takes for its part of the cache: keys and values of all tokens, the new one included."""

    def __init__(self, keys: Tensor, values: Tensor, place: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.place = keys, values, place
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Put the new token in place."""
        self.keys.index_copy_(2, self.place, key_states)
        self.values.index_copy_(2, self.place, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens before the new one."""
        length: int = self.keys.shape[2] - 1
        return length


def _step(
    model: PreTrainedModel,
    ids: Tensor,
    positions: Tensor | None,
    mask: Tensor | None,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    place: Tensor,
    state: str,
) -> Tensor:
    """Logits (batch, 1, vocabulary)."""
    cache = Cache(layers=[_Place(key, value, place) for key, value in zip(keys, values, strict=True)])
    output = type(model).forward(
        model,
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=state != "",
    )
    logits: Tensor = output.logits
    return logits


@functools.cache
def _compiled_step() -> Callable[..., Tensor]:
    """One for the process: torch keeps its graphs with the function that was compiled."""

    def of_arguments(checks: Sequence[Any]) -> list[bool]:
        return [
            check.guard_type in _KEPT_CHECKS or check.name.partition("[")[0] in _ARGUMENTS for check in checks
        ]

    options: dict[str, Any] = {"emulate_precision_casts": True, "guard_filter_fn": of_arguments}
    compiled: Callable[..., Tensor] = torch.compile(_step, fullgraph=True, options=options)
    return compiled


def _state(model: PreTrainedModel) -> str:
    """Everything about a model that its graph depends on: two models, or one before and after a change, differ."""
    kinds = [type(module).__qualname__ for module in model.modules()]
    kernels = [layer.kernel.name for layer in model.modules() if hasattr(layer, "kernel_reasons")]
    tensors = [(*t.shape, t.dtype) for t in itertools.chain(model.parameters(), model.buffers())]
    described = hash((model.config.to_json_string(), *kinds, *kernels, *tensors))
    return f"{id(model)} {model.dtype} {model.training} {described}"


def compiled_model(model: PreTrainedModel) -> tuple[CompiledModel | None, str]:
    """`model` for steps of one token, to be used in a ``with``; or None and why it cannot be compiled."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < (2, 8):
        return (
            None,
            f"torch {torch.__version__} checks every module at every step; compiling wins from 2.8 on",
        )
    if model.device.type != "cpu":
        return None, f"the model is on {model.device}, and only CPUs have been tried"
    if model.config._attn_implementation not in ("sdpa", ATTENTION):
        return None, f"its attention is {model.config._attn_implementation}, not sdpa"
    if "forward" in vars(model):
        return None, "another library has replaced its forward"
    return CompiledModel(model), ""


class CompiledModel:
    """While entered, the model runs compiled where it gets one token per text and a `ReservedCache`.

    Attributes:
        why_not: why it went back to running plainly; empty if it did not.
        seconds: of the steps in which it was compiled.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._state = _state(model)
        self._graphs = 0
        self.why_not = ""
        self.seconds = 0.0

    def __enter__(self) -> CompiledModel:
        callback_handler.register_start_callback(self._compiling)
        self._model.forward = self._forward
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._model.forward
        callback_handler.remove_start_callback(self._compiling)

    def _forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        reserved = cache if isinstance(cache, ReservedCache) and cache.get_seq_length() > 0 else None
        if reserved is None or input_ids.shape[1] > 1 or self.why_not:
            return type(self._model).forward(self._model, input_ids, **kwargs)
        start, graphs = time.perf_counter(), self._graphs
        try:
            logits = self._compiled_logits(input_ids, reserved, **kwargs)
        except TorchDynamoException as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            self.why_not = lines[0] if lines else type(error).__name__
            return type(self._model).forward(self._model, input_ids, **kwargs)
        finally:
            self.seconds += time.perf_counter() - start if self._graphs > graphs else 0.0
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _compiled_logits(
        self,
        ids: Tensor,
        cache: ReservedCache,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        length = cache.get_seq_length()
        views = [layer.view(length + 1) for layer in cache.layers]
        mask = cache.mask(attention_mask)
        keys, values = [view[0] for view in views], [view[1] for view in views]
        for tensor, dim in [(t, 2) for t in (*keys, *values)] + ([(mask, 3)] if mask is not None else []):
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
        place = torch.tensor([length])
        logits = _compiled_step()(self._model, ids, position_ids, mask, keys, values, place, self._state)
        for layer in cache.layers:
            layer.length += 1
        return logits

    def _compiling(self, *_: Any) -> None:
        self._graphs += 1
