"""Quantized layers in the place of dense ones: by the loader, and after a model was quantized in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..checkpoint.quantization_config import LayerFormat
from ..kernels.conv import QuantConv2d
from ..kernels.linear import QuantizedLayer, QuantLinear
from ..kernels.spec import KernelSpec
from ..modeling.experts import unfused_modules
from ..planning import LayerPlan, Plan


def quantized_like(
    old: nn.Module, spec: KernelSpec, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype
) -> QuantizedLayer:
    """The quantized counterpart of a Linear, Conv1D or Conv2d.

    Raises:
        CheckpointError: the tensors do not fit the spec.
    """
    if isinstance(old, nn.Conv2d):
        return QuantConv2d(spec, tensors, old, bias, dtype)
    layer = QuantLinear(spec, tensors, bias, dtype)
    layer.transposed_weight = isinstance(old, Conv1D)
    return layer


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def kernel_spec(layer: LayerPlan, fmt: str, kind: str = "linear") -> KernelSpec:
    """The kernel spec of a planned layer."""
    shape = (layer.out_features, layer.in_features)
    return KernelSpec.of(LayerFormat.of(layer.settings), shape, fmt, kind)


def replace_layers(
    model: nn.Module,
    plan: Plan,
    tensors_of: Callable[[str], dict[str, Tensor]],
    quantization: Mapping[str, Any],
) -> None:
    """Turn a walked model into a quantized one, on the device it is on.

    Args:
        plan: the layers that were quantized.
        tensors_of: gives a layer's packed tensors by their short names.
        quantization: the ``quantization_config`` that describes them; a transformers model keeps it, so
            that `save_pretrained` writes a complete checkpoint.
    """
    fmt = quantization["checkpoint_format"]
    for layer in plan.layers:
        old = model.get_submodule(layer.name)
        spec = kernel_spec(layer, fmt, "conv2d" if isinstance(old, nn.Conv2d) else "linear")
        weight = old.get_parameter("weight")
        tensors = {key: tensor.to(weight.device) for key, tensor in tensors_of(layer.name).items()}
        bias = old.bias
        new = quantized_like(
            old, spec, tensors, bias.detach() if isinstance(bias, Tensor) else None, weight.dtype
        )
        new.prepare()
        set_module(model, layer.name, new.train(old.training))
    for experts in unfused_modules(model).values():
        experts.release_fused()
    if isinstance(model, PreTrainedModel):
        _adopt(model, quantization)


def _adopt(model: PreTrainedModel, quantization: Mapping[str, Any]) -> None:
    """Tell transformers what it would know had it loaded this model."""
    from .gptq_config import GPTQConfig
    from .layers import untie_quantized
    from .quantizer import FewbitQuantizer

    config = GPTQConfig(**quantization)
    model.config.quantization_config = config
    model.hf_quantizer = FewbitQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    untie_quantized(model)
