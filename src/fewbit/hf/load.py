"""``fewbit.load``: load a quantized checkpoint as a transformers model.

The folder and its config.json are checked first. transformers then builds the model and reads the memory-mapped files
tensor by tensor, so the checkpoint is in memory only once.
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..checkpoint import layout
from ..checkpoint.reader import Checkpoint, open_checkpoint
from ..config import Dtype, dtype_name
from ..errors import CheckpointError, ConfigError, DependencyError, FewbitError
from ..kernels import registry
from ..modeling.source import download
from .fuse import make_fast
from .model_check import UNBUILDABLE, check_numbers, expected, is_model_class
from .quantized_layers import quantized_layers
from .quantizer import offer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | Dtype | None = None,
    kernel: str = "auto",
    trust_remote_code: bool = False,
    *,
    device_map: Any = None,
    max_memory: Mapping[Any, Any] | None = None,
    quantization_config: Mapping[str, Any] | None = None,
    fuse: bool = True,
    lm_head_runtime: Literal[8, 16, "auto"] | None = "auto",
) -> PreTrainedModel:
    """Load a GPTQ checkpoint, written by any tool.

    Args:
        path: folder or Hub id of the checkpoint.
        device: device of the model.
        dtype: dtype of the activations and of weights that are not quantized; None or "auto" keeps the checkpoint's.
            On CPUs, bfloat16 is the fastest.
        kernel: "auto", "auto_a16" (activations keep 16 bits), "auto_trainable" (gradients to the inputs), or the
            name of a kernel that all layers must use (`fewbit.kernels.registry`).
        trust_remote_code: run Python code that comes with the checkpoint.
        device_map: distributes the model over several devices instead of `device`, as in transformers; needs
            accelerate.
        max_memory: device → bytes, for a `device_map` given by name.
        quantization_config: settings of an old checkpoint that has none.
        fuse: on CPUs, make fewer calls per token: layers that share an input (q, k, v; gate, up) become one product,
            and each norm, gated MLP and attention one call. Results change by rounding only; parameter names and saved
            checkpoints do not change.
        lm_head_runtime: 8 runs the output embedding in 8 bits, which dominates a decoding step of small models; 16
            leaves it as it is. "auto" takes 8 in bfloat16 and float16 where its squared error is below a tenth of the
            quantized layers' own. The model keeps and saves the original weight.

    Returns:
        A model of the class that config.json names, in eval mode. `kernels` lists the kernels of its layers.

    Raises:
        CheckpointError: the checkpoint is not quantized, damaged or incomplete, or does not match its config.json.
        KernelError: the kernel asked for does not exist or cannot run here.
        ConfigError: the dtype is unknown, the `device_map` has disk entries, or the output embedding cannot run in 8
            bits.
        DependencyError: a `device_map` is given and accelerate is not installed.
    """
    registry.resolve(kernel)
    folder = Path(path)
    folder = folder if folder.exists() else download(str(path), CheckpointError)
    checkpoint = open_checkpoint(folder, quantization_config)
    compute_dtype = _dtype(dtype, checkpoint)
    offer()
    config = _config(checkpoint, kernel, trust_remote_code)
    _check_fit(checkpoint)
    model_class = _model_class(checkpoint, config, trust_remote_code)
    options: dict[str, Any] = {"config": config, "dtype": compute_dtype}
    if trust_remote_code:
        options["trust_remote_code"] = True
    if device_map is not None:
        if importlib.util.find_spec("accelerate") is None:
            raise DependencyError("a device_map needs the package accelerate: pip install accelerate")
        options |= {"device_map": device_map, "max_memory": max_memory}
    model = _build(checkpoint, model_class, options)
    if hasattr(model.config, "transformers_weights"):
        del model.config.transformers_weights
    if device_map is None:
        model = model.to(device)
    make_fast(model, kernel, fuse=fuse, lm_head=lm_head_runtime)
    return model


def _build(checkpoint: Checkpoint, model_class: Any, options: Mapping[str, Any]) -> PreTrainedModel:
    try:
        model, info = model_class.from_pretrained(str(checkpoint.path), output_loading_info=True, **options)
    except FewbitError:
        raise
    except UNBUILDABLE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"transformers cannot load {checkpoint.path}: {reason}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointError(
            f"{checkpoint.path} lacks {len(missing)} weights of {type(model).__name__}, for example {missing[0]}: "
            "get it again; `fewbit verify` lists what is wrong"
        )
    loaded: PreTrainedModel = model
    return loaded


def _check_fit(checkpoint: Checkpoint) -> None:
    """Refuse a config.json of another model before transformers allocates that model."""
    model = expected(checkpoint.path, checkpoint.config, checkpoint.tensors)
    for name, what in model.mismatches.items() if model else ():
        raise CheckpointError(
            f"{checkpoint.path} and its config.json do not fit together: {name} {what}; get both again"
        )


def kernels(model: nn.Module) -> list[str]:
    """Return the kernels of the quantized layers of `model`, one line per kernel and reason, most layers first."""
    counts: Counter[str] = Counter()
    for _, layer in quantized_layers(model):
        refused = "; ".join(f"{name}: {reason}" for name, reason in layer.kernel_reasons if reason)
        counts[layer.kernel.name + (f" ({refused})" if refused else "")] += 1
    return [f"{count} layers: {line}" for line, count in counts.most_common()]


def _dtype(dtype: torch.dtype | str | None, checkpoint: Checkpoint) -> torch.dtype | str:
    if dtype is None or dtype == "auto":
        if checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"):
            return "auto"
        # transformers would take the dtype of the first tensor, which may hold quantized scales.
        dense = (i.dtype for n, i in checkpoint.tensors.items() if n.rpartition(".")[2] not in layout.PARTS)
        return next((found for found in dense if found.is_floating_point), "auto")
    if isinstance(dtype, torch.dtype):
        return dtype
    dtype = dtype_name(dtype)
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype must be auto, {', '.join(_DTYPES)} or a torch.dtype; got {dtype!r}")
    return _DTYPES[dtype]


def _config(checkpoint: Checkpoint, kernel: str, trust_remote_code: bool) -> Any:
    """Return the model's configuration, with quant_method "fewbit" so that transformers uses fewbit's quantizer."""
    if not isinstance(checkpoint.config.get("model_type"), str):
        raise CheckpointError(
            f"{checkpoint.path} has no config.json that names a model_type: copy the original model's into it"
        )
    check_numbers(checkpoint.config)
    try:
        config = AutoConfig.from_pretrained(str(checkpoint.path), trust_remote_code=trust_remote_code)
    except (*UNBUILDABLE, ImportError) as error:
        raise CheckpointError(_config_advice(checkpoint, trust_remote_code, error)) from error
    quantization = json.loads(json.dumps(checkpoint.quantization))
    config.quantization_config = {**quantization, "quant_method": "fewbit", "backend": kernel}
    weights = checkpoint.weights
    config.transformers_weights = (weights.index or weights.files[0]).name
    return config


def _config_advice(checkpoint: Checkpoint, trust_remote_code: bool, error: Exception) -> str:
    model_type = checkpoint.config["model_type"]
    if checkpoint.config.get("auto_map") and not trust_remote_code:
        return (
            f"{checkpoint.path} needs its own code for model_type {model_type!r}; "
            "if you trust it, pass trust_remote_code=True (--trust-remote-code)"
        )
    if model_type not in CONFIG_MAPPING and not trust_remote_code:
        return (
            f"transformers {transformers.__version__} does not know model_type {model_type!r}, "
            f"which {checkpoint.path} needs; a newer transformers may"
        )
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"cannot read the configuration in {checkpoint.path}: {reason}"


def _model_class(checkpoint: Checkpoint, config: Any, trust_remote_code: bool) -> Any:
    """Return the class that ``architectures`` names, from transformers or from the checkpoint's code."""
    stated = getattr(config, "architectures", None)
    names = [str(name) for name in stated] if isinstance(stated, list) else []
    auto_map = getattr(config, "auto_map", None) or {}
    if trust_remote_code and names:
        for auto_class, reference in auto_map.items():
            if str(reference).rpartition(".")[2] == names[0]:
                return getattr(transformers, auto_class)
    known = [getattr(transformers, name, None) for name in names]
    if any(map(is_model_class, known)):
        return next(filter(is_model_class, known))
    if names and auto_map:
        raise CheckpointError(
            f"{checkpoint.path} needs its own code for {names[0]}; "
            "if you trust it, pass trust_remote_code=True"
        )
    if names:
        raise CheckpointError(
            f"transformers {transformers.__version__} has no model class {names[0]}, "
            f"which {checkpoint.path} needs"
        )
    return transformers.AutoModelForCausalLM
