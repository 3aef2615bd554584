"""Turn a model that was calibrated in memory into a quantized transformers model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modeling.experts import unfused_modules
from ..planning import Plan
from .gptq_config import GPTQConfig
from .quantized_layers import kernel_spec, kind_of, quantized_like, set_module, untie_quantized
from .quantizer import FewbitQuantizer


def replace_layers(
    model: nn.Module,
    plan: Plan,
    tensors_of: Callable[[str], dict[str, Tensor]],
    quantization: Mapping[str, Any],
) -> None:
    """Replace the planned layers of `model` by quantized ones, each on the device of its weight.

    Args:
        model: changed in place.
        plan: the layers that were quantized.
        tensors_of: layer name → its packed tensors by their short names.
        quantization: the ``quantization_config`` that describes them. A transformers model keeps it, so that
            `save_pretrained` writes a complete checkpoint.
    """
    fmt = quantization["checkpoint_format"]
    for layer in plan.layers:
        old = model.get_submodule(layer.name)
        weight, bias = old.get_parameter("weight"), old.bias
        new = quantized_like(
            old,
            kernel_spec(layer, fmt, kind_of(old)),
            {key: tensor.to(weight.device) for key, tensor in tensors_of(layer.name).items()},
            bias.detach() if isinstance(bias, Tensor) else None,
            weight.dtype,
        )
        new.prepare()
        set_module(model, layer.name, new.train(old.training))
    for experts in unfused_modules(model).values():
        experts.release_fused()
    if isinstance(model, PreTrainedModel):
        _mark_quantized(model, GPTQConfig(**quantization))


def _mark_quantized(model: PreTrainedModel, config: GPTQConfig) -> None:
    """Set what transformers would have set if it had loaded the quantized model."""
    model.config.quantization_config = config
    model.hf_quantizer = FewbitQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    untie_quantized(model)
