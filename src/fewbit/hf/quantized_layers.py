"""Quantized layers in a transformers model: find them, insert them while a checkpoint loads, turn them back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .. import transformers_internals
from ..checkpoint import quantization_config as quantization
from ..checkpoint.reader import layer_spec
from ..checkpoint.safetensors_file import TensorInfo
from ..errors import CheckpointError
from ..kernels.conv import QuantConv2d
from ..kernels.linear import QuantizedLayer, QuantLinear
from ..kernels.spec import KernelSpec
from ..modeling.experts import fused_modules, unfuse, unfused_conversions
from ..modeling.layers import LAYER_TYPES, matrix_shape
from ..planning import LayerPlan


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """Yield every quantized layer of a model with its name."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            yield name, module


def prepare_layers(model: nn.Module, kernel: str, *, trainable: bool = False) -> None:
    """Choose the kernel of every quantized layer again; `trainable` asks for gradients to the inputs.

    Raises:
        KernelError: the requested kernel cannot run a layer.
    """
    for _, layer in quantized_layers(model):
        layer.fill_in_g_idx()
        layer.prepare(kernel, trainable=trainable)


def kernel_spec(layer: LayerPlan, fmt: str, kind: str = "linear") -> KernelSpec:
    shape = (layer.out_features, layer.in_features)
    return KernelSpec.of(quantization.LayerFormat.of(layer.settings), shape, fmt, kind)


def quantized_like(
    old: nn.Module, spec: KernelSpec, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype
) -> QuantizedLayer:
    """Build the quantized counterpart of a Linear, Conv1D or Conv2d."""
    if isinstance(old, nn.Conv2d):
        return QuantConv2d(spec, tensors, old, bias, dtype)
    layer = QuantLinear(spec, tensors, bias, dtype)
    layer.transposed_weight = isinstance(old, Conv1D)
    return layer


def insert_empty_layer(
    model: nn.Module,
    module_name: str,
    layer_name: str,
    settings: quantization.CheckpointSettings,
    infos: Mapping[str, TensorInfo],
) -> None:
    """Replace the layer `module_name`, called `layer_name` in the files, by an empty quantized one on the meta device.

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
    dtype = old.get_parameter("weight").dtype
    bias = torch.empty(out_features, dtype=dtype, device="meta") if has_bias else None
    model.set_submodule(module_name, quantized_like(old, spec, tensors, bias, dtype))


def untie_quantized(model: PreTrainedModel) -> None:
    """Untie a quantized output embedding, which has its own tensors, from the input embedding."""
    transformers_internals.untie(model, {f"{name}.weight" for name, _ in quantized_layers(model)})


def dense(layer: QuantizedLayer, dtype: torch.dtype) -> nn.Module:
    """Build the dense layer with the dequantized weight of `layer`."""
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


class FileNames:
    """Names of a checkpoint's tensors → names in a model, through transformers' own conversion.

    If the files hold quantized `layers` of single experts, the experts of `model` are unfused.
    """

    def __init__(self, model: PreTrainedModel, layers: Iterable[str]) -> None:
        self._names = _weight_names(model)
        fused = fused_modules(model)
        if fused and any(self._is_single_expert(layer, fused) for layer in layers) and unfuse(model):
            self._names = _weight_names(model)

    def rename(self, name: str) -> tuple[str, list[str]]:
        """See `transformers_internals.WeightNames.rename`."""
        return self._names.rename(name)

    def _is_single_expert(self, layer: str, fused: set[str]) -> bool:
        name, merged = self.rename(f"{layer}.weight")
        # Some tools write transformers' module names: experts.3.gate_proj also for Mixtral.
        return bool(merged) or not fused.isdisjoint((name.rsplit(".", 3)[0], name.rsplit(".", 2)[0]))


def _weight_names(model: PreTrainedModel) -> transformers_internals.WeightNames:
    default = transformers_internals.get_model_conversion_mapping(model)
    return transformers_internals.WeightNames(model, unfused_conversions(model, default))
