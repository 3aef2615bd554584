"""GPTQ in transformers, through its own interfaces: a quantizer that loads checkpoints and quantizes models.

`register` puts it and its configuration in the place of transformers' GPTQ ones, which need optimum and gptqmodel,
makes transformers' `GPTQConfig` as lenient, and has `save_pretrained` write quantize_config.json too; `unregister`
brings back what was there. `fewbit.load` needs neither:
its configurations name the method "fewbit", under which `offer` adds both without touching what is there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GPTQConfig as TransformersGPTQConfig
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightTransform
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from ..checkpoint import layout
from ..checkpoint import quantization_config as quantization
from ..checkpoint.reader import layer_names
from ..checkpoint.safetensors_file import TensorInfo, read_header
from ..checkpoint.writer import CONFIG
from ..compat.settings import kernel_name, needs_gradients
from ..config import FORMATS
from ..errors import CheckpointError, ConfigError
from ..modeling.experts import unfused_conversions, unfused_modules, why_fused
from ..modeling.layers import LAYER_TYPES
from .file_names import FileNames
from .gptq_config import METHOD, OWN_METHOD, GPTQConfig, checking, keeping, request
from .layers import dense, make_room, quantized_layers, untie_quantized
from .replace import set_module
from .saving import all_at_hand, state_dict_in, with_quantize_config

_LOG = logging.getLogger("fewbit")


class FewbitQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts `QuantLinear` where a checkpoint has packed tensors, or quantizes a model that was just read."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._job = None
        if not self.pre_quantized:
            from .on_the_fly import Job  # it needs the tools' surfaces, which need this module

            self._job = Job(request(quantization_config))
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
        if self._job is not None:
            return
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
        if self._job is not None:
            del model.config.quantization_config  # what was asked; quantizing leaves what was done
            self._job.run(model)
            model.config.quantization_config.backend = self.quantization_config.backend
            model.hf_quantizer = FewbitQuantizer(model.config.quantization_config, pre_quantized=True)
            return model
        backend = self.quantization_config.backend
        kernel, trainable = kernel_name(backend), needs_gradients(backend)
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
                layer.prepare(kernel, trainable=trainable)
            except CheckpointError as error:
                raise CheckpointError(f"layer {name}: {error}") from error
        self.quantization_config.format = FORMATS[0]  # what is saved, unless somebody sets another
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Never cast a quantized tensor."""
        target = converter.target_patterns[0].rpartition(".")[2]
        return None if target in layout.PARTS else super().get_new_dtype(converter, param, dtype)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, layer in list(quantized_layers(model)):
            set_module(model, name, dense(layer, dtype or layer.compute_dtype))
        return model

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """The tensors in the format that the model's configuration says; None where they are as they are."""
        config = getattr(model.config, "quantization_config", None)
        if not isinstance(config, GPTQConfig) or getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        if not all_at_hand(model):
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
        return state_dict_in(model, config.format), {}

    def is_serializable(self) -> bool:
        """Always: what is saved has the weights that were loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients flow to the inputs: adapters can be trained beside the quantized weights."""
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


def offer() -> None:
    """Make the method "fewbit" known to transformers. Changes nothing that is there."""
    AUTO_QUANTIZER_MAPPING.setdefault(OWN_METHOD, FewbitQuantizer)
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(OWN_METHOD, GPTQConfig)


@dataclass(frozen=True)
class _Replaced:
    """One thing of transformers that `register` replaced: an entry of a dict or an attribute of a class."""

    place: dict[str, Any] | type
    name: str
    theirs: Any
    ours: Any

    @classmethod
    def by(cls, place: dict[str, Any] | type, name: str, make: Callable[[Any], Any]) -> _Replaced:
        """Put what `make` gives for what is there in its place."""
        theirs = place[name] if isinstance(place, dict) else getattr(place, name)
        replaced = cls(place, name, theirs, make(theirs))
        replaced._put(replaced.ours)
        return replaced

    def undo(self) -> None:
        """Put back what was there, unless somebody else has put a third thing in its place."""
        now = self.place[self.name] if isinstance(self.place, dict) else getattr(self.place, self.name)
        if now is self.ours:
            self._put(self.theirs)

    def _put(self, value: Any) -> None:
        if isinstance(self.place, dict):
            self.place[self.name] = value
        else:
            setattr(self.place, self.name, value)


# What `unregister` has to bring back.
_replaced: list[_Replaced] = []


def register() -> None:
    """From here on transformers quantizes and loads GPTQ with fewbit. May be called again without harm."""
    unregister()
    _replaced.extend(
        [
            _Replaced.by(AUTO_QUANTIZER_MAPPING, METHOD, lambda _: FewbitQuantizer),
            _Replaced.by(AUTO_QUANTIZATION_CONFIG_MAPPING, METHOD, lambda _: GPTQConfig),
            _Replaced.by(TransformersGPTQConfig, "__init__", keeping),
            _Replaced.by(TransformersGPTQConfig, "post_init", checking),
            _Replaced.by(PreTrainedModel, "save_pretrained", with_quantize_config),
        ]
    )


def unregister() -> None:
    """Undo `register`: transformers is as it was. Models that are loaded keep working."""
    while _replaced:
        _replaced.pop().undo()
