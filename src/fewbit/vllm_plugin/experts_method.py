"""The experts of one layer of vLLM, each with its own quantized projections.

vLLM's router has chosen the experts of each token. The tokens of one expert are gathered and multiplied together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.activation import ApplyMoEActivationConfig, apply_moe_activation
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG, FusedMoEQuantConfig
from vllm.model_executor.utils import set_weight_attrs

from ..checkpoint.layout import PARTS
from ..errors import CheckpointError, ConfigError
from . import shards
from .shards import WEIGHT, DenseShard, Projection, Shard

_GATE, _UP, _DOWN = "w1", "w3", "w2"  # vLLM's names of the projections


class FewbitExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """All experts of one layer that live in this process.

    Args:
        moe: vLLM's configuration of the layer.
        formats: (bits, group size) of the projections.
        fmt: "gptq" or "gptq_v2".
        prefix: name of the layer.

    Raises:
        ConfigError: the experts have biases.
    """

    def __init__(
        self, moe: FusedMoEConfig, formats: Sequence[tuple[int, int]], fmt: str, prefix: str
    ) -> None:
        super().__init__(moe)
        if moe.has_bias:
            raise ConfigError(f"{prefix}: experts with biases are not supported by fewbit's plugin for vLLM")
        self._formats, self._fmt, self._prefix = formats, fmt, prefix
        self._tensors: dict[tuple[int, str], dict[str, Tensor]] = {}
        self._experts: list[tuple[Projection, Projection]] = []  # gate and up; down

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register empty parameters, whose loaders keep what they get."""
        for stem in ("w13", "w2"):
            for name in (*PARTS, WEIGHT):
                parameter = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
                set_weight_attrs(parameter, {"weight_loader": partial(self._collect, layer, name)})
                layer.register_parameter(f"{stem}_{name}", parameter)

    def get_fused_moe_quant_config(self, layer: Any) -> FusedMoEQuantConfig:
        return FUSED_MOE_UNQUANTIZED_CONFIG

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack the tensors that this process needs, and let go of the others.

        Raises:
            CheckpointError: the files lack an expert.
        """
        size = layer.intermediate_size_per_partition
        first, last = self.moe.tp_rank * size, (self.moe.tp_rank + 1) * size
        gated = (_GATE, _UP) if self.moe.is_act_and_mul else (_GATE,)
        for expert in range(layer.local_num_experts):
            rows = torch.arange(first, last)
            up = [self._whole(expert, name, layer.hidden_size).outputs(rows) for name in gated]
            down = self._whole(expert, _DOWN, self.moe.intermediate_size).inputs(first, last)
            self._experts.append((Projection(up), Projection([down])))
        self._tensors = {}

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """(tokens, hidden) → (tokens, hidden), summed over the experts of each token that live here."""
        local = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids.long()]
        config = ApplyMoEActivationConfig.from_configs(self.moe, FUSED_MOE_UNQUANTIZED_CONFIG)
        result = torch.zeros_like(x, dtype=torch.float32)
        for expert in local.unique().tolist():
            if expert < 0:  # in another process
                continue
            tokens, choices = torch.where(local == expert)
            weights = topk_weights[tokens, choices].unsqueeze(1)
            inputs = x[tokens]
            if layer.apply_router_weight_on_input:
                inputs, weights = (inputs * weights).to(x.dtype), torch.ones_like(weights)
            gate_up, down = self._experts[expert]
            projected = gate_up(inputs)
            activated = x.new_empty(len(tokens), layer.intermediate_size_per_partition)
            apply_moe_activation(layer.activation, activated, projected, activation_config=config)
            result.index_add_(0, tokens, down(activated).float() * weights)
        return result.to(x.dtype)

    def _collect(
        self,
        layer: Any,
        name: str,
        param: nn.Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        expert = layer._map_global_expert_id_to_local_expert_id(expert_id)
        if expert >= 0:
            tensors = self._tensors.setdefault((expert, shard_id), {})
            tensors[name] = shards.kept(name, loaded_weight, param.dtype)
        return expert >= 0 if return_success else None

    def _whole(self, expert: int, name: str, in_features: int) -> Shard | DenseShard:
        where = f"{self._prefix}, expert {expert}, {name}"
        tensors = self._tensors.get((expert, name))
        if tensors is None:
            raise CheckpointError(f"{where}: the files have no weights")
        return shards.read(tensors, self._formats, self._fmt, in_features, where)
