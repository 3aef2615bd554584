"""GPTQ checkpoints in transformers, through its own interfaces: a quantizer and its configuration.

`register` puts both in the place of transformers' GPTQ ones, which need optimum and gptqmodel; `unregister`
brings those back. `fewbit.load` needs neither: its configurations name the method "fewbit", under which
`offer` adds both without touching what is there.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPTQConfig as TransformersGPTQConfig
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightTransform
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from ..checkpoint import layout, quantization
from ..checkpoint.header import TensorInfo, read_header
from ..checkpoint.reader import layer_names, layer_spec
from ..checkpoint.writer import CONFIG
from ..errors import CheckpointError, ConfigError
from ..runtime.conv import QuantConv2d
from ..runtime.kernel import KernelSpec
from ..runtime.linear import QuantizedLayer
from ..runtime.replace import quantized_like, set_module
from ..walk.experts import unfused_conversions, unfused_modules, why_fused
from ..walk.layers import LAYER_TYPES, matrix_shape
from .file_names import FileNames

METHOD = "gptq"
OWN_METHOD = "fewbit"


class GPTQConfig(TransformersGPTQConfig):  # type: ignore[misc]
    """A checkpoint's ``quantization_config``, kept as it was written: what is loaded is what is saved.

    It has the name of the class it replaces, which transformers compares. `backend` is the kernel.
    """

    def __init__(self, **values: Any) -> None:
        # What transformers adds by itself, or `fewbit.load`, is not the checkpoint's.
        self.written = {key: value for key, value in values.items() if key != "backend"}
        if self.written.get("quant_method") == OWN_METHOD:
            self.written["quant_method"] = METHOD
        known = quantization.parse(self.written, default_method=METHOD)
        super().__init__(
            bits=known.bits,
            group_size=known.group_size,
            sym=known.sym,
            desc_act=known.desc_act,
            act_group_aware=not known.desc_act,
            format=known.format,
            meta=values.get("meta"),
            backend=values.get("backend"),
        )
        self.checkpoint_format = known.format
        # "fewbit" until transformers has found the quantizer with it; `FewbitQuantizer` then says "gptq".
        self.quant_method = values.get("quant_method", METHOD)

    def post_init(self) -> None:
        """Nothing: `fewbit.checkpoint.quantization.parse` has checked the values."""
        self.backend: str = self.backend or "auto"

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it was written, unknown keys included."""
        return copy.deepcopy(self.written)


class FewbitQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts `QuantLinear` where the checkpoint has packed tensors; chooses kernels once they are loaded."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ConfigError(
                "this model is not quantized, and from_pretrained(quantization_config=GPTQConfig(...)) "
                "does not quantize with fewbit yet. Quantize it first: fewbit quantize MODEL -o OUT "
                "--dataset TEXT, or fewbit.quantize(MODEL, output=OUT); then load OUT"
            )
        if quantization_config.quant_method == OWN_METHOD:
            quantization_config.quant_method = QuantizationMethod.GPTQ

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse disk entries in a device map."""
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise ConfigError(
                "device_map has disk entries; quantized layers cannot run from disk. Give the model more "
                "memory (max_memory) or another device. Quantizing with fewbit streams: it never needs them"
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        infos = _read_headers(checkpoint_files)
        settings = quantization.parse(self.quantization_config.to_dict(), default_method=METHOD)
        names = layer_names(infos)
        if not names:
            raise CheckpointError(
                f"{_folder(checkpoint_files)} says it is quantized, "
                f"but has no tensor named *.{layout.QWEIGHT}"
            )
        for name, module_name in _modules_of(model, names):
            make_room(model, module_name, name, settings, infos)
        _refuse_merged_experts(model, infos)
        untie_quantized(model)

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel
    ) -> list[WeightTransform]:
        """Experts that are taken apart have nothing to be merged from."""
        return unfused_conversions(model, weight_conversions)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, layer in quantized_layers(model):
            missing = [
                part
                for part in layout.PARTS
                if part not in layer._non_persistent_buffers_set
                and not getattr(layer.get_buffer(part), "_is_hf_initialized", False)
            ]
            if missing:
                raise CheckpointError(
                    f"layer {name}: {' and '.join(missing)} did not load; is the file damaged?"
                )
            layer.fill_in_g_idx()
            try:
                layer.prepare(self.quantization_config.backend)
            except CheckpointError as error:
                raise CheckpointError(f"layer {name}: {error}") from error
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Never cast a quantized tensor."""
        target = converter.target_patterns[0].rpartition(".")[2]
        return None if target in layout.PARTS else super().get_new_dtype(converter, param, dtype)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, layer in list(quantized_layers(model)):
            set_module(model, name, _dense(layer, dtype or layer.compute_dtype))
        return model

    def is_serializable(self) -> bool:
        """Always: what is saved is what was loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients flow to the inputs: adapters can be trained beside the quantized weights."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Kernels are custom operators with fake implementations."""
        return True


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
    spec = KernelSpec(
        bits=found.bits,
        group_size=found.group_size,
        sym=found.sym,
        act_order=found.desc_act,
        in_features=in_features,
        out_features=out_features,
        format=found.format,
        kind="conv2d" if isinstance(old, nn.Conv2d) else "linear",
    )
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


def _dense(layer: QuantizedLayer, dtype: torch.dtype) -> nn.Module:
    weight, bias = layer.dequantize(dtype), layer.bias
    dense: nn.Module
    if isinstance(layer, QuantConv2d):
        dense = nn.Conv2d(
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
        dense = Conv1D(*weight.shape)
        weight = weight.t().contiguous()
    else:
        dense = nn.Linear(
            layer.spec.in_features, layer.spec.out_features, bias=bias is not None, device="meta"
        )
    dense.weight = nn.Parameter(weight)
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach().to(dtype))
    return dense


def _read_headers(files: list[str] | None) -> dict[str, TensorInfo]:
    infos: dict[str, TensorInfo] = {}
    folders = {Path(file).parent for file in files or ()}
    # transformers joins names from the index to the folder, wherever that leads.
    if len(folders) > 1 or not all((folder / CONFIG).exists() for folder in folders):
        raise CheckpointError(
            f"the index of {_folder(files)} names files outside its folder: {', '.join(sorted(files or ())[:3])}"
        )
    for file in files or ():
        if not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{file} is a pickle, which can run code when it is loaded. "
                f"If you trust it, rewrite it with: fewbit convert {Path(file).parent} -o OUT --allow-pickle"
            )
        infos |= read_header(Path(file))[0]
    return infos


def _folder(files: list[str] | None) -> str:
    return str(Path(files[0]).parent) if files else "the checkpoint"


def _refuse_merged_experts(model: PreTrainedModel, infos: Mapping[str, TensorInfo]) -> None:
    """Experts are taken apart because some are quantized by themselves: then all have to lie by themselves."""
    for name, module in unfused_modules(model).items():
        merged = [f"{name}.{key}" for key in module.fused_parameters if f"{name}.{key}" in infos]
        if merged:
            raise CheckpointError(
                f"single experts of {name} are quantized, but {merged[0]} holds all of them: the weights of the others "
                "would be missing; write every expert by itself"
            )


def _modules_of(model: PreTrainedModel, names: list[str]) -> list[tuple[str, str]]:
    """(name in the file, name in the model) of every layer that this class has.

    Names go through transformers' own renaming; experts that are stored one by one are taken apart. Layers that
    the class does not have (a head, for a bare model) are left to transformers, which reports them as unexpected.

    Raises:
        CheckpointError: transformers would merge the layers into one tensor.
    """
    in_model = FileNames(model, names)
    modules = {name for name, _ in model.named_modules()}
    result = []
    for name in names:
        renamed, merged = in_model.place(f"{name}.weight")
        if merged:
            reason = next(iter(why_fused(model).values()), "not experts")
            raise CheckpointError(
                f"layer {name} is stored by itself, but transformers keeps it in one tensor with others "
                f"({renamed}), which fewbit cannot take apart: {reason}"
            )
        module_name = renamed.removesuffix(".weight")
        if module_name in modules:
            result.append((name, module_name))
    return result


# Which classes transformers uses.
_replaced: dict[str, tuple[Any, Any]] = {}


def offer() -> None:
    """Make the method "fewbit" known to transformers. Changes nothing that is there."""
    AUTO_QUANTIZER_MAPPING.setdefault(OWN_METHOD, FewbitQuantizer)
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(OWN_METHOD, GPTQConfig)


def register() -> None:
    """From here on transformers loads GPTQ checkpoints with fewbit. May be called again without harm."""
    if AUTO_QUANTIZER_MAPPING[METHOD] is FewbitQuantizer:
        return
    _replaced[METHOD] = (AUTO_QUANTIZER_MAPPING[METHOD], AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD])
    AUTO_QUANTIZER_MAPPING[METHOD] = FewbitQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = GPTQConfig


def unregister() -> None:
    """Undo `register`: transformers is as it was. Models that are loaded keep working."""
    if METHOD in _replaced:
        AUTO_QUANTIZER_MAPPING[METHOD], AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = _replaced.pop(METHOD)
