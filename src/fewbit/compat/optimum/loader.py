"""`load_quantized_model`: a checkpoint for an empty model, over `fewbit.load`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...checkpoint.safe_io import read_json
from ...errors import CheckpointError, ConfigError
from ..loading import check_weights_name, load_quantized, placement
from ..settings import kernel_name, say
from .arguments import NOT_NEEDED, check_exllama
from .constants import GPTQ_CONFIG


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
    """The quantized model in a folder, for an empty one of the same class.

    Args:
        model: tells class and dtype. It may be on the meta device, and stays as it is.
        save_folder: of a GPTQ checkpoint, from any tool.
        backend: the kernel.
        quant_config_name: file with the quantization configuration, for a folder whose config.json has none.
        state_dict_name: weight file, if it is to be checked.
        device_map: as in transformers; None for the accelerator, or the CPU where there is none.
        max_memory: device → bytes, for a `device_map` by name.
        no_split_module_classes, offload_folder, offload_buffers, offload_state_dict, max_input_length,
            disable_exllama, exllama_config: not needed.

    Returns:
        The quantized model, in evaluation mode.

    Raises:
        CheckpointError: no GPTQ checkpoint, or one of another model.
        ConfigError: disk entries in a map, or a model that is not transformers'.
        KernelError: the kernel asked for cannot run a layer.
    """
    check_exllama(exllama_config)
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"load_quantized_model builds transformers models, not a {type(model).__name__}: convert_model, "
            "load_state_dict and post_init_model of GPTQQuantizer load any other"
        )
    once = "weights are read from mapped files straight to their device"
    given = {
        "no_split_module_classes": (no_split_module_classes, "transformers knows them for its models"),
        "offload_folder": (offload_folder, once),
        "offload_buffers": (offload_buffers, once),
        "offload_state_dict": (offload_state_dict, once),
        "max_input_length": (max_input_length, NOT_NEEDED["max_input_length"]),
        "disable_exllama": (disable_exllama, NOT_NEEDED["disable_exllama"]),
        "exllama_config": (exllama_config, NOT_NEEDED["exllama_config"]),
    }
    say({name: f"not needed: {reason}" for name, (value, reason) in given.items() if value})
    folder = Path(save_folder)
    if state_dict_name is not None:
        check_weights_name(folder, state_dict_name, ())
    own = folder / quant_config_name
    loaded = load_quantized(
        folder,
        placement(None, device_map, max_memory),
        kernel=kernel_name(backend),
        trainable=backend == "auto_trainable",
        dtype=model.dtype,
        quantization_config=read_json(own) if own.exists() else None,
    )
    if type(loaded) is not type(model):
        raise CheckpointError(
            f"{folder} holds a {type(loaded).__name__}, but the empty model is a {type(model).__name__}"
        )
    return loaded
