"""The quantized layers of a model: found, put in the place of dense ones while a checkpoint loads, and turned back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..checkpoint import quantization_config as quantization
from ..checkpoint.reader import layer_spec
from ..checkpoint.safetensors_file import TensorInfo
from ..errors import CheckpointError
from ..kernels.conv import QuantConv2d
from ..kernels.linear import QuantizedLayer
from ..kernels.spec import KernelSpec
from ..modeling.layers import LAYER_TYPES, matrix_shape
from .replace import quantized_like, set_module


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """Every quantized layer of a model with its name."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            yield name, module


def make_room(
    model: nn.Module,
    module_name: str,
    layer_name: str,
    settings: quantization.CheckpointSettings,
    infos: Mapping[str, TensorInfo],
) -> None:
    """Put an empty quantized layer, on the meta device, in the place of a dense one.

    Raises:
        CheckpointError: the module is not linear, or the tensors do not fit its shape.
    """
    old = model.get_submodule(module_name)
    if not isinstance(old, LAYER_TYPES):
        raise CheckpointError(
            f"the checkpoint has quantized tensors for {module_name}, which is a {type(old).__name__} in this "
            "model; only linear layers, Conv1D and Conv2d can be quantized"
        )
    out_features, in_features = matrix_shape(old)
    found = layer_spec(layer_name, settings, infos)
    # Without g_idx, padding hides the number of inputs; the model knows it.
    padded = not found.has_g_idx and found.in_features >= in_features
    if found.out_features != out_features or (found.in_features != in_features and not padded):
        raise CheckpointError(
            f"layer {layer_name} of the checkpoint is {found.out_features} x {found.in_features} (out x in), "
            f"but the model has {out_features} x {in_features} there; config.json belongs to another model"
        )
    kind = "conv2d" if isinstance(old, nn.Conv2d) else "linear"
    spec = KernelSpec.of(found.layer_format, (out_features, in_features), found.format, kind)
    tensors = {
        part: torch.empty(info.shape, dtype=info.dtype, device="meta")
        for part in found.parts
        if part != "bias" and (info := infos[f"{layer_name}.{part}"])
    }
    has_bias = "bias" in found.parts or old.bias is not None
    dtype = _weight_of(old).dtype
    bias = torch.empty(out_features, dtype=dtype, device="meta") if has_bias else None
    set_module(model, module_name, quantized_like(old, spec, tensors, bias, dtype))


def untie_quantized(model: PreTrainedModel) -> None:
    """A quantized output embedding has its own tensors: do not tie it to the input embedding."""
    own = {f"{name}.weight" for name, _ in quantized_layers(model)}
    tied = set(model.all_tied_weights_keys) & own
    for name in tied:
        del model.all_tied_weights_keys[name]
    if tied and isinstance(model._tied_weights_keys, Mapping):
        model._tied_weights_keys = {
            target: source
            for target, source in model._tied_weights_keys.items()
            if not any(re.search(target, name) for name in tied)
        }


def _weight_of(module: nn.Module) -> Tensor:
    return module.get_parameter("weight")


def dense(layer: QuantizedLayer, dtype: torch.dtype) -> nn.Module:
    """The ordinary layer with the weight that `layer` has, in `dtype`."""
    weight, bias = layer.dequantize(dtype), layer.bias
    result: nn.Module
    if isinstance(layer, QuantConv2d):
        result = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            bias=bias is not None,
            padding_mode=layer.padding_mode,
            device="meta",
        )
        weight = weight.view(layer._weight_shape())
    elif layer.transposed_weight:
        result = Conv1D(*weight.shape)
        weight = weight.t().contiguous()
    else:
        result = nn.Linear(
            layer.spec.in_features, layer.spec.out_features, bias=bias is not None, device="meta"
        )
    result.weight = nn.Parameter(weight)
    if bias is not None:
        result.bias = nn.Parameter(bias.detach().to(dtype))
    return result
