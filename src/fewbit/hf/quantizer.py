"""fewbit in transformers' own quantizer interface: configuration, loading, saving, and models quantized in memory.

`fewbit.load` names the method "fewbit" in the configuration; `offer` adds that method to transformers and replaces
nothing. `fewbit.register` (`fewbit.integration`) replaces transformers' own GPTQ quantizer.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPTQConfig as TransformersGPTQConfig
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from .. import torch_internals, transformers_internals
from ..checkpoint import layout
from ..checkpoint import quantization_config as quantization
from ..checkpoint.assemble import keep_split
from ..checkpoint.reader import layer_names
from ..checkpoint.safetensors_file import TensorInfo, read_header
from ..checkpoint.writer import CONFIG
from ..config import FORMATS
from ..errors import CheckpointError, ConfigError
from ..kernels.linear import QuantizedLayer
from ..modeling.experts import unfused_conversions, unfused_modules, why_fused
from ..modeling.layers import LAYER_TYPES
from ..planning import Plan
from .quantized_layers import (
    FileNames,
    dense,
    insert_empty_layer,
    kernel_spec,
    quantized_layers,
    quantized_like,
    untie_quantized,
)

_LOG = logging.getLogger("fewbit")

METHOD = "gptq"
OWN_METHOD = "fewbit"
TRAINABLE = "auto_trainable"  # the backend with gradients to the inputs of the layers
_FORMAT_KEYS = ("checkpoint_format", "format")


class GPTQConfig(TransformersGPTQConfig):  # type: ignore[misc]
    """A ``quantization_config`` that keeps every key it was given, known or not, and saves it again.

    It has the name of the class that it replaces, because transformers compares names.

    Attributes:
        written: all keys and values as given.
        backend: kernel name, as `fewbit.load` takes it.
        format: checkpoint format that `save_pretrained` writes, "gptq" or "gptq_v2".
    """

    def __init__(self, **values: Any) -> None:
        # transformers and `fewbit.load` add the backend; it is not part of the checkpoint.
        self.written = {key: value for key, value in values.items() if key != "backend"}
        if self.written.get("quant_method") == OWN_METHOD:
            self.written["quant_method"] = METHOD
        known = quantization.parse({"group_size": 128, **self.written}, default_method=METHOD)
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
        # "fewbit" until transformers has looked up the quantizer; `FewbitQuantizer` then sets "gptq".
        self.quant_method = values.get("quant_method", METHOD)

    @property
    def checkpoint_format(self) -> str:
        """Older name of `format`."""
        return self.format

    @checkpoint_format.setter
    def checkpoint_format(self, value: str) -> None:
        self.format = value

    def post_init(self) -> None:
        """Set the backend; `quantization_config.parse` has checked the other values."""
        self.backend: Any = self.backend or "auto"

    def to_dict(self) -> dict[str, Any]:
        """Return all keys as they were given, with the format that is saved.

        Raises:
            ConfigError: `format` was set to an unknown name.
        """
        if self.format not in FORMATS:
            raise ConfigError(f"format must be one of {', '.join(FORMATS)}; got {self.format!r}")
        result = copy.deepcopy(self.written)
        stated = [result[key] for key in _FORMAT_KEYS if result.get(key) is not None]
        if (stated or [FORMATS[0]])[0] != self.format:
            result |= {"checkpoint_format": self.format}
            if "format" in result:
                result["format"] = self.format
        return result

    def fix_rule_order(self, names: Iterable[str]) -> None:
        """Make the rules in ``dynamic`` independent of their order for the layers `names`.

        The first rule that matches decides, but transformers sorts the keys of the JSON that it writes. The rules are
        rewritten only if sorting would change a layer's settings.
        """
        dynamic = self.written.get("dynamic") or {}
        in_file = {**self.written, "group_size": self.group_size, "dynamic": dict(sorted(dynamic.items()))}
        now = quantization.parse({**in_file, "dynamic": dynamic}, default_method=METHOD)
        then = quantization.parse(in_file, default_method=METHOD)
        if any(now.layer(name) != then.layer(name) for name in names):
            self.written["dynamic"] = _exclusive(dynamic)


def _exclusive(dynamic: Mapping[str, Any]) -> dict[str, Any]:
    """Return rules whose patterns exclude what an earlier rule matches."""
    result, earlier = {}, ""
    for key, rule in dynamic.items():
        sign = key[:2] if key[:2] in ("-:", "+:") else ""
        pattern = key.removeprefix(sign)
        result[f"{sign}{earlier}(?:{pattern})"] = rule
        earlier += f"(?!{pattern})"
    return result


def kernel_name(backend: Any) -> str:
    """Return the kernel that a `backend` (a name, or a member of an enumeration) asks for; "auto" for None."""
    name = getattr(backend, "value", backend)
    if name is None:
        return "auto"
    if not isinstance(name, str):
        raise ConfigError(f"backend must be the name of a kernel, such as 'auto', not {backend!r}")
    return name.lower()


class FewbitQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts quantized layers where a checkpoint has packed tensors, and writes them back."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._loading: PreTrainedModel | None = None
        if quantization_config.quant_method == OWN_METHOD:
            quantization_config.quant_method = QuantizationMethod.GPTQ

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse disk entries in a device map."""
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise ConfigError(
                "device_map has disk entries; quantized layers cannot run from disk. Give the model more "
                "memory (max_memory) or another device. Quantizing never needs them: fewbit.quantize(MODEL, "
                "output=OUT) streams"
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
            insert_empty_layer(model, module_name, name, settings, infos)
        _refuse_merged_experts(model, infos)
        untie_quantized(model)
        self._loading = model

    def update_weight_conversions(
        self,
        weight_conversions: list[transformers_internals.WeightTransform],
        model: PreTrainedModel | None = None,
    ) -> list[transformers_internals.WeightTransform]:
        """Drop the conversions that would merge experts which are unfused in `model`.

        Older versions of transformers (5.19, which vLLM asks for) do not pass the model that is being loaded.
        """
        loading = model if model is not None else self._loading
        return weight_conversions if loading is None else unfused_conversions(loading, weight_conversions)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self._loading = None
        kernel = kernel_name(self.quantization_config.backend)
        self._warn_without_order([layer for _, layer in quantized_layers(model)])
        for name, layer in quantized_layers(model):
            missing = [
                part
                for part in layout.PARTS
                if part not in torch_internals.non_persistent_buffers(layer)
                and not transformers_internals.is_loaded(layer.get_buffer(part))
            ]
            if missing:
                raise CheckpointError(
                    f"layer {name}: {' and '.join(missing)} did not load; is the file damaged?"
                )
            layer.fill_in_g_idx()
            try:
                layer.prepare(kernel, trainable=kernel == TRAINABLE)
            except CheckpointError as error:
                raise CheckpointError(f"layer {name}: {error}") from error
        keep_split(model, [name for name, _ in quantized_layers(model)])
        self.quantization_config.format = FORMATS[0]  # the format that is saved, unless the user sets another
        return model

    def _warn_without_order(self, layers: list[QuantizedLayer]) -> None:
        """Say what is assumed where the configuration says desc_act, and the files have no g_idx."""
        count = sum(
            layout.G_IDX in torch_internals.non_persistent_buffers(layer)
            and layer.spec.act_order
            and layer.spec.group_size != -1
            for layer in layers
        )
        if count:
            _LOG.warning(
                "%d layers have no g_idx although the configuration says desc_act: their groups are taken as "
                "consecutive, which is right only if the writer used static groups",
                count,
            )

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Keep the dtype of packed tensors."""
        target = converter.target_patterns[0].rpartition(".")[2]
        return None if target in layout.PARTS else super().get_new_dtype(converter, param, dtype)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, layer in list(quantized_layers(model)):
            model.set_submodule(name, dense(layer, dtype or layer.compute_dtype))
        return model

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """Return the tensors in the format that the model's configuration says; None if they are in it already."""
        config = getattr(model.config, "quantization_config", None)
        if not isinstance(config, GPTQConfig) or transformers_internals.has_adapter(model):
            return None, {}
        # accelerate may have offloaded some layers, whose zero points cannot be converted here.
        if any(buffer.is_meta for _, layer in quantized_layers(model) for buffer in layer.buffers()):
            _, layer = next(quantized_layers(model))
            if config.format != layer.spec.format:
                _LOG.warning(
                    "some layers are kept elsewhere by accelerate, so the format stays %s; fewbit convert "
                    "rewrites the folder as %s",
                    layer.spec.format,
                    config.format,
                )
            config.format = layer.spec.format
        config.fix_rule_order(
            name for name, module in model.named_modules() if isinstance(module, LAYER_TYPES)
        )
        return _state_dict_in(model, config.format), {}

    def is_serializable(self) -> bool:
        """Return True: the saved weights equal the loaded ones."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients reach the inputs, so adapters can be trained on frozen quantized weights."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Kernels are custom operators with fake implementations."""
        return True


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
    """Refuse files that hold some experts of a module one by one and the others in one tensor."""
    for name, module in unfused_modules(model).items():
        merged = [f"{name}.{key}" for key in module.fused_parameters if f"{name}.{key}" in infos]
        if merged:
            raise CheckpointError(
                f"single experts of {name} are quantized, but {merged[0]} holds all of them: the weights of the others "
                "would be missing; write every expert by itself"
            )


def _modules_of(model: PreTrainedModel, names: list[str]) -> list[tuple[str, str]]:
    """Return (name in the file, name in the model) of every layer that the model class has.

    transformers reports the layers that the class lacks, such as the head for a bare model, as unexpected.
    """
    file_names = FileNames(model, names)
    modules = {name for name, _ in model.named_modules()}
    result = []
    for name in names:
        renamed, merged = file_names.rename(f"{name}.weight")
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


def _state_dict_in(model: PreTrainedModel, fmt: str) -> dict[str, Any] | None:
    """Return the state of `model` in checkpoint format `fmt`; None if it is in that format already.

    The dequantized weights stay bit-identical: only zero points are stored in another way, and where format "gptq"
    cannot store zero point 0, the grid is mirrored (`layout.without_zero_point_0`).
    """
    others = {name: layer for name, layer in quantized_layers(model) if layer.spec.format != fmt}
    if not others:
        return None
    state: dict[str, Any] = model.state_dict()
    for name, layer in others.items():
        parts = {part: state[f"{name}.{part}"] for part in layout.PARTS if f"{name}.{part}" in state}
        state |= {f"{name}.{part}": tensor for part, tensor in _in_format(layer, parts, fmt).items()}
    return state


def _in_format(layer: QuantizedLayer, parts: dict[str, Tensor], fmt: str) -> dict[str, Tensor]:
    spec = layer.spec
    zeros = layout.unpack_zeros(parts[layout.QZEROS], spec.bits, spec.format, spec.out_features)
    if fmt == "gptq" and bool(torch.any(zeros == 0)):
        mirrored = layout.pack(layout.without_zero_point_0(layer.codes()), fmt)
        return {part: mirrored[part] for part in parts}
    return {layout.QZEROS: layout.pack_zeros(zeros.t().contiguous(), spec.bits, fmt)}


def offer() -> None:
    """Add the method "fewbit" to transformers; nothing that exists is replaced."""
    transformers_internals.AUTO_QUANTIZER_MAPPING.setdefault(OWN_METHOD, FewbitQuantizer)
    transformers_internals.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(OWN_METHOD, GPTQConfig)


def replace_layers(
    model: nn.Module,
    plan: Plan,
    tensors_of: Callable[[str], dict[str, Tensor]],
    config_values: Mapping[str, Any],
) -> None:
    """Replace the planned layers of `model` by quantized ones, each on the device of its weight.

    Args:
        model: changed in place.
        plan: the layers that were quantized.
        tensors_of: layer name → its packed tensors by their short names.
        config_values: the ``quantization_config`` that describes them. A transformers model keeps it, so that
            `save_pretrained` writes a complete checkpoint.
    """
    fmt = config_values["checkpoint_format"]
    for layer in plan.layers:
        old = model.get_submodule(layer.name)
        weight, bias = old.get_parameter("weight"), old.bias
        new = quantized_like(
            old,
            kernel_spec(layer, fmt, "conv2d" if isinstance(old, nn.Conv2d) else "linear"),
            {part: tensor.to(weight.device) for part, tensor in tensors_of(layer.name).items()},
            bias.detach().clone() if isinstance(bias, Tensor) else None,  # it may be a view of all experts'
            weight.dtype,
        )
        new.prepare()
        model.set_submodule(layer.name, new.train(old.training))
    for experts in unfused_modules(model).values():
        experts.release_fused()
    if isinstance(model, PreTrainedModel):
        # transformers sets these attributes when it loads a quantized model.
        config = GPTQConfig(**config_values)
        model.config.quantization_config = config
        model.hf_quantizer = FewbitQuantizer(config, pre_quantized=True)
        model.is_quantized = True
        model.quantization_method = config.quant_method
        keep_split(model, [layer.name for layer in plan.layers])
        untie_quantized(model)
