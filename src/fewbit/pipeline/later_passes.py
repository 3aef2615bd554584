"""Layers that a model runs several times in one forward pass, such as the layers of looped transformers.

The pass of `quantize_layers` solves a layer at its first use; what reaches it later went through its quantized weight.
So for models with such layers, a pass through the unchanged model comes first. It sums H = Σ x xᵀ over the inputs of
all later uses. `HessianPool` adds the sum to the sum of the first use.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..gptq import Hessian
from ..modeling.experts import unfused_modules
from ..modeling.layers import NEEDS_VALUES, empty_state, forward_replaced


def uses_per_pass(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Mapping[str, Tensor]
) -> dict[str, int]:
    """Count how often a forward pass runs each layer, without weights: on the meta device.

    Experts are not run, and masks are left out, because both make the model look at values.

    Returns:
        The layers that run more than once; empty if the model's code needs values all the same. The inputs of later
        uses are then late inputs (`ScheduleStats`).
    """
    uses: Counter[str] = Counter()
    empty = empty_state(model)
    inputs = {key: value.to("meta") for key, value in batch.items() if not key.endswith("attention_mask")}
    with ExitStack() as stack, torch.no_grad():
        for name, module in layers.items():
            handle = module.register_forward_pre_hook(lambda module, args, name=name: uses.update([name]))
            stack.callback(handle.remove)
        for experts in unfused_modules(model).values():
            stack.enter_context(forward_replaced(experts, lambda x, *args, **kwargs: torch.empty_like(x)))
        stack.enter_context(torch.device("meta"))  # for tensors that the model makes itself
        try:
            functional_call(model, empty, kwargs=inputs)
        except NEEDS_VALUES:
            return {}
    return {name: count for name, count in uses.items() if count > 1}


@dataclass
class LaterInputs:
    """Sums of H over the inputs of later uses, by layer. They are on disk, because all layers have one at once.

    Args:
        uses: layer → number of uses in a forward pass, for layers with more than one.
        folder: where a temporary folder is made; None for the system's own.
    """

    uses: Mapping[str, int]
    folder: Path | None = None
    _tokens: dict[str, tuple[int, int]] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)
    _path: Path | None = None

    def __enter__(self) -> LaterInputs:
        if self.uses:
            made = tempfile.TemporaryDirectory(dir=self.folder, prefix="fewbit-")
            self._path = Path(self._stack.enter_context(made))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, name: str, hessian: Hessian) -> None:
        """Add the inputs of one more use."""
        matrix = hessian.matrix().cpu().numpy()
        tokens, dropped = self._tokens.get(name, (0, 0))
        if tokens:
            matrix = matrix + np.load(self._file(name))
        np.save(self._file(name), matrix)
        self._tokens[name] = (tokens + hessian.tokens, dropped + hessian.dropped)

    def include(self, name: str, hessian: Hessian) -> None:
        """Add the sum of a layer to the Hessian of its first use."""
        if name in self._tokens:
            hessian.include(torch.from_numpy(np.load(self._file(name))), *self._tokens[name])

    def _file(self, name: str) -> Path:
        assert self._path is not None
        return self._path / f"{name}.npy"
