"""`GPTQQuantizer` and `load_quantized_model`: optimum's arguments and methods, done by fewbit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ... import __version__
from ...calibration.sources import NAMED
from ...checkpoint import layout
from ...checkpoint.safe_io import read_json
from ...checkpoint.writer import QUANTIZE_CONFIG as GPTQ_CONFIG
from ...errors import CheckpointError, ConfigError, ModelError
from ...gptq_arguments import GPTQArguments, check_exllama, warn, warn_not_needed, write_json
from ...hf.blocks import get_block_name_with_pattern, restrict
from ...hf.load import load
from ...hf.quantizer import kernel_name, replace_layers
from ...kernels.linear import QuantizedLayer, QuantLinear
from ...modeling.experts import unfuse
from ...modeling.layers import weight_matrix
from ...output import quantization_config
from ...planning import LayerPlan, Plan, Skipped, make_plan
from ...quantized_matrix import QuantizedMatrix, sequential_groups
from ..loading import check_weights_name, device_arguments


class GPTQQuantizer(GPTQArguments):
    """Quantizes a model with optimum's settings; see `GPTQArguments` for the arguments."""

    quant_linear: type[QuantizedLayer] = QuantLinear
    serialization_keys: ClassVar[list[str]] = [
        "bits",
        "dataset",
        "group_size",
        "damp_percent",
        "desc_act",
        "act_group_aware",
        "sym",
        "true_sequential",
        "quant_method",
        "modules_in_block_to_quantize",
        "format",
        "meta",
    ]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings under `serialization_keys`, and the unknown keys that `from_dict` was given."""
        meta = dict(self.meta or {})
        meta.setdefault("quantizer", [f"fewbit:{__version__}"])
        known = {key: getattr(self, key) for key in self.serialization_keys}
        return {**self.extra, **known, "meta": meta}

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> GPTQQuantizer:
        """Return the quantizer with these settings; unknown keys are kept."""
        return cls(**config_dict)

    def convert_model(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Replace the layers that `quantize_model` would quantize by empty quantized layers.

        Args:
            model: the new tensors are on its device; on the meta device they take no memory.
            **kwargs: ``device_map`` is accepted and not needed.

        Returns:
            The model, ready for `load_state_dict`; call `post_init_model` afterwards.
        """
        plan, quantization = self._planned(model)
        layers = {layer.name: layer for layer in plan.layers}
        replace_layers(model, plan, lambda name: _empty_tensors(layers[name]), quantization)
        self._complete_config(model)
        return model

    def pack_model(self, model: nn.Module, quantizers: Mapping[str, Sequence[Any]]) -> None:
        """Replace layers whose weights have been rounded to a grid by quantized layers.

        Args:
            model: has the rounded weights.
            quantizers: layer name → (anything, scales (out, groups), zero points (out, groups), g_idx (in,)).

        Raises:
            ConfigError: a name is no layer of the model that can be quantized.
        """
        plan, _ = self._planned(model)
        known = {layer.name for layer in plan.layers}
        for name in quantizers:
            if name not in known:
                raise ConfigError(
                    f"pack_model: {name!r} is no layer of {type(model).__name__} to be quantized"
                )
        plan = _only(plan, quantizers)
        quantization = quantization_config(self._config(), model, plan, self._meta())
        packed = {
            layer.name: self._pack(
                layer, weight_matrix(model.get_submodule(layer.name)), quantizers[layer.name]
            )
            for layer in plan.layers
        }
        replace_layers(model, plan, packed.__getitem__, quantization)
        self._complete_config(model)

    def select_quant_linear(self, device_map: Any = None, pack: bool = False) -> None:
        """Set `quant_linear`, the class of the quantized layers; it is the same for all kernels."""
        self.quant_linear = QuantLinear

    def get_no_split_module_classes(self, model: nn.Module) -> list[str]:
        """Return the class name of the blocks; each block should stay on one device."""
        blocks = model.get_submodule(self.block_name_to_quantize or get_block_name_with_pattern(model))
        return [type(next(blocks.children())).__name__]

    def save(
        self,
        model: nn.Module,
        save_dir: str | Path,
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write a checkpoint with `save_pretrained`, and quantize_config.json without the calibration text.

        Args:
            model: a quantized model.
            save_dir: folder, created if missing.
            max_shard_size: maximum size of each weight file.
            safe_serialization: safetensors files are always written; False is logged.

        Raises:
            ModelError: the model is not quantized, or cannot save itself.
        """
        if not hasattr(model, "save_pretrained"):
            raise ModelError(
                f"{type(model).__name__} has no save_pretrained; only transformers models can be saved as a "
                "checkpoint. Save its state_dict() yourself"
            )
        saveable: Any = model
        quantization = getattr(saveable.config, "quantization_config", None)
        if quantization is None:
            raise ModelError(f"this {type(model).__name__} is not quantized: call quantize_model first")
        if not safe_serialization:
            warn("safe_serialization=False", "safetensors files are written; opening pickles can run code")
        saveable.save_pretrained(save_dir, max_shard_size=max_shard_size)
        settings = {**self.to_dict(), **quantization.to_dict()}
        if settings["dataset"] not in NAMED:
            del settings["dataset"]  # texts and paths are private
        write_json(Path(save_dir) / GPTQ_CONFIG, settings)

    def _planned(self, model: nn.Module) -> tuple[Plan, dict[str, Any]]:
        config = self._for_model(model)
        config = restrict(config, model, self.block_name_to_quantize, self.modules_in_block_to_quantize)
        unfuse(model)
        plan = make_plan(model, config)
        return plan, quantization_config(config, model, plan, self._meta())

    def _pack(self, layer: LayerPlan, weight: Tensor, parts: Sequence[Any]) -> dict[str, Tensor]:
        """Pack a weight that is already on a grid; `parts` as in `pack_model`."""
        bits = layer.settings.bits
        scales, zeros, g_idx = (torch.as_tensor(part).cpu() for part in parts[1:4])
        groups = g_idx.long()
        codes = weight.cpu().float() / scales.float()[:, groups] + zeros.float()[:, groups]
        result = QuantizedMatrix(
            codes.round_().clamp_(0, 2**bits - 1).to(torch.uint8),
            scales.to(torch.float16),
            zeros.round().to(torch.int16),
            g_idx.to(torch.int32),
            bits,
            layer.settings.group_size,
        )
        return layout.pack(
            layout.without_zero_point_0(result) if self.format == "gptq" else result, self.format
        )


def _empty_tensors(layer: LayerPlan) -> dict[str, Tensor]:
    bits, group_size = layer.settings.bits, layer.settings.group_size
    shapes = layout.empty_layer(bits, group_size, layer.in_features, layer.out_features)
    tensors = {part: torch.zeros_like(tensor, device="cpu") for part, tensor in shapes.items()}
    return {**tensors, layout.G_IDX: sequential_groups(layer.in_features, group_size)}


def _only(plan: Plan, names: Mapping[str, Any]) -> Plan:
    """Return the plan restricted to the layers called `names`."""
    others = [layer for layer in plan.layers if layer.name not in names]
    skipped = [Skipped(o.name, (o.out_features, o.in_features), "was not packed") for o in others]
    layers = tuple(layer for layer in plan.layers if layer.name in names)
    return dataclasses.replace(plan, layers=layers, skipped=(*plan.skipped, *skipped))


def load_quantized_model(
    model: nn.Module,
    save_folder: str | Path,
    backend: Any = "auto",
    quant_config_name: str = GPTQ_CONFIG,
    state_dict_name: str | None = None,
    device_map: Any = None,
    max_memory: Mapping[Any, Any] | None = None,
    no_split_module_classes: Sequence[str] | None = None,
    offload_folder: str | None = None,
    offload_buffers: bool | None = None,
    offload_state_dict: bool = False,
    max_input_length: int | None = None,
    *,
    disable_exllama: bool = False,
    exllama_config: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Load the quantized model in a folder, given an empty model of the same class.

    Args:
        model: gives class and dtype; it may be on the meta device and is not changed.
        save_folder: folder of a GPTQ checkpoint, written by any tool.
        backend: kernel name.
        quant_config_name: file with the quantization configuration, for a folder whose config.json has none.
        state_dict_name: expected name of the weight file; None for any.
        device_map: as in transformers; None for the accelerator, or the CPU if there is none.
        max_memory: device → bytes, for a `device_map` given by name.
        no_split_module_classes, offload_folder, offload_buffers, offload_state_dict, max_input_length,
            disable_exllama, exllama_config: not needed.

    Returns:
        The quantized model, in evaluation mode.

    Raises:
        CheckpointError: the folder has no GPTQ checkpoint, or one of another model.
        ConfigError: a map has disk entries, or `model` is not a transformers model.
        KernelError: the kernel asked for cannot run a layer.
    """
    check_exllama(exllama_config)
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"load_quantized_model builds transformers models, not a {type(model).__name__}: convert_model, "
            "load_state_dict and post_init_model of GPTQQuantizer load any other"
        )
    warn_not_needed(
        no_split_module_classes=no_split_module_classes,
        offload_folder=offload_folder,
        offload_buffers=offload_buffers,
        offload_state_dict=offload_state_dict,
        max_input_length=max_input_length,
        disable_exllama=disable_exllama,
        exllama_config=exllama_config,
    )
    folder = Path(save_folder)
    if state_dict_name is not None:
        check_weights_name(folder, state_dict_name)
    own = folder / quant_config_name
    loaded = load(
        folder,
        dtype=model.dtype,
        kernel=kernel_name(backend),
        quantization_config=read_json(own) if own.exists() else None,
        **device_arguments(None, device_map, max_memory),
    )
    if type(loaded) is not type(model):
        raise CheckpointError(
            f"{folder} holds a {type(loaded).__name__}, but the empty model is a {type(model).__name__}"
        )
    return loaded
