"""A linear layer of vLLM whose weight stays quantized, whatever vLLM merged in it and how it spreads it.

While vLLM loads, the tensors of each part (q, k, v) are kept as they come. Where the outputs of a part belong, and
which inputs this process has, is asked of vLLM's own loader: it is given row numbers to load instead of weights.
Then the outputs are packed; parts with equal settings become one product. A part may also be unquantized.

In a compiled model a layer is one operator that finds its weights by name, so that vLLM's cache of compiled models
holds nothing of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.utils import set_weight_attrs

from ..checkpoint.layout import PARTS, SCALES
from ..errors import CheckpointError
from . import shards
from .shards import WEIGHT, DenseShard, Projection, Shard

_PART = 1 << 40  # row numbers of part i begin at i · _PART

# torch.library.custom_op would take as long as a small product.
_LIBRARY = torch.library.Library("fewbit_vllm", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("linear(Tensor x, Tensor? bias, str name, int outputs) -> Tensor")  # type: ignore[no-untyped-call]


def _linear(x: Tensor, bias: Tensor | None, name: str, outputs: int) -> Tensor:
    projection: Projection = get_forward_context().no_compile_layers[name].projection
    return projection(x, bias)


def _empty(x: Tensor, bias: Tensor | None, name: str, outputs: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


_LIBRARY.impl("linear", _linear, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("fewbit_vllm::linear", _empty, lib=_LIBRARY)


class FewbitLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """One layer.

    Args:
        formats: (bits, group size) of its parts.
        fmt: "gptq" or "gptq_v2".
        prefix: its name.
    """

    def __init__(self, formats: Sequence[tuple[int, int]], fmt: str, prefix: str) -> None:
        self._formats, self._fmt, self._prefix = formats, fmt, prefix
        self._name = f"fewbit {prefix}"  # vLLM's own layers are called `prefix`
        self._parts: dict[Any, dict[str, Tensor]] = {}
        self._sizes = (0, 0, 0)  # inputs of the whole layer, inputs here, outputs here
        self.projection: Projection | None = None

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register empty parameters, whose loaders keep what they get."""
        self._sizes = (input_size, input_size_per_partition, sum(output_partition_sizes))
        for name in (*PARTS, WEIGHT):
            parameter = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": partial(self._collect, name)})
            layer.register_parameter(name, parameter)
        get_current_vllm_config().compilation_config.static_forward_context[self._name] = self

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack the tensors that this process needs, and let go of the others.

        Raises:
            CheckpointError: the files lack a part of the layer.
        """
        del layer.weight  # other code of vLLM would take the empty one for a dense weight
        rows, columns = self._rows(layer), self._columns(layer)
        runs = [self._part(part).outputs(outputs).inputs(*columns) for part, outputs in _runs(rows)]
        self._parts = {}
        self.projection = Projection(runs)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(tokens, inputs here) → (tokens, outputs here)"""
        if torch.compiler.is_compiling():
            y: Tensor = torch.ops.fewbit_vllm.linear(x, bias, self._name, self._sizes[2])
            return y
        assert self.projection is not None
        return self.projection(x, bias)

    def _collect(self, name: str, parameter: nn.Parameter, loaded: Tensor, shard_id: Any = None) -> None:
        self._parts.setdefault(shard_id, {})[name] = shards.kept(name, loaded, parameter.dtype)

    def _rows(self, layer: Any) -> Tensor:
        """For every output here: the number of its part · _PART + its row in that part."""
        rows = nn.Parameter(torch.full((self._sizes[2],), -1), requires_grad=False)
        set_weight_attrs(rows, {"output_dim": 0})
        for number, (shard_id, tensors) in enumerate(self._parts.items()):
            outputs = tensors[SCALES].shape[1] if SCALES in tensors else len(tensors.get(WEIGHT, ()))
            given = torch.arange(outputs) + number * _PART
            layer.weight_loader(rows, given, *(() if shard_id is None else (shard_id,)))
        missing = int((rows < 0).sum())
        if missing:
            raise CheckpointError(
                f"{self._prefix}: the files have no weights for {missing} of its {len(rows)} outputs"
            )
        return rows.data

    def _columns(self, layer: Any) -> tuple[int, int]:
        """The first and after the last of the inputs here."""
        everything, here, _ = self._sizes
        if here == everything:
            return 0, everything
        columns = nn.Parameter(torch.empty(here, dtype=torch.int64), requires_grad=False)
        set_weight_attrs(columns, {"input_dim": 0})
        layer.weight_loader(columns, torch.arange(everything))
        return int(columns[0]), int(columns[-1]) + 1

    def _part(self, number: int) -> Shard | DenseShard:
        tensors = list(self._parts.values())[number]
        return shards.read(tensors, self._formats, self._fmt, self._sizes[0], self._prefix)


def _runs(rows: Tensor) -> list[tuple[int, Tensor]]:
    """Neighboring outputs of the same part: (number of the part, rows in it)."""
    numbers, counts = torch.unique_consecutive(rows // _PART, return_counts=True)
    parts = torch.split(rows % _PART, counts.tolist())
    return list(zip(numbers.tolist(), parts, strict=True))
