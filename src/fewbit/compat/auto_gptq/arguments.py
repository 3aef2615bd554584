"""AutoGPTQ's arguments: what is checked, what they become, and why some are not needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...checkpoint.safe_io import read_json
from ...errors import CalibrationError, ConfigError
from ..settings import PadToken, say
from .config import QUANTIZE_CONFIG, BaseQuantizeConfig

_NOT_NEEDED = {
    "use_triton": "the kernel is chosen from those that can run here",
    "use_qigen": "fewbit has CPU kernels of its own",
    "use_cuda_fp16": "kernels follow the dtype of the activations",
    "inject_fused_attention": "fewbit does not replace attention; the result is the same",
    "inject_fused_mlp": "fewbit does not replace feed-forward layers; the result is the same",
    "warmup_triton": "kernels need no warm-up",
    "autotune_warmup_after_quantized": "kernels need no warm-up",
    "cache_examples_on_gpu": "examples stay on the model's device; every batch runs through the model once",
    "low_cpu_mem_usage": "weights are read from mapped files straight to their device",
    "disable_exllama": "a kernel of another package runs only where it is asked for",
    "disable_exllamav2": "a kernel of another package runs only where it is asked for",
}


def dataset_of(examples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The examples with what calibration needs of them.

    Raises:
        CalibrationError: there are none, or one is no dict of token ids.
    """
    if not isinstance(examples, Sequence) or not examples:
        raise CalibrationError(
            "no examples were given: pass a list of dicts with input_ids and attention_mask"
        )
    for number, example in enumerate(examples):
        if not isinstance(example, Mapping) or "input_ids" not in example:
            raise CalibrationError(
                f"example {number} must be a dict with input_ids and attention_mask, as a tokenizer returns it, not "
                f"{type(example).__name__}"
            )
    return [{key: e[key] for key in ("input_ids", "attention_mask") if key in e} for e in examples]


def settings_of(folder: Path, given: BaseQuantizeConfig | None) -> BaseQuantizeConfig:
    """The checkpoint's own settings; those given where it has none.

    Raises:
        ConfigError: both are there and contradict each other.
    """
    if given is None:
        return BaseQuantizeConfig.from_pretrained(folder)
    file = folder / "config.json"
    stated = file.exists() and "quantization_config" in read_json(file)
    if not stated and not (folder / QUANTIZE_CONFIG).exists():
        return given
    own = BaseQuantizeConfig.from_pretrained(folder)
    for name in ("bits", "group_size"):
        if getattr(own, name) != getattr(given, name):
            raise ConfigError(
                f"quantize_config says {name} {getattr(given, name)}, but the checkpoint in {folder} has "
                f"{getattr(own, name)}: leave quantize_config out"
            )
    return given


def rename_token(options: dict[str, Any]) -> None:
    """transformers no longer knows `use_auth_token` and `resume_download`."""
    token = options.pop("use_auth_token", None)
    if token is not None:
        options.setdefault("token", token)
    options.pop("resume_download", None)


def say_not_needed(names: Iterable[str]) -> None:
    """Log why the arguments called `names` have nothing to do."""
    say({name: f"not needed: {_NOT_NEEDED[name]}" for name in names})


def pad_token_of(config: Any) -> PadToken:
    """The pad token of a model's configuration, or its end token."""
    pad, end = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    end = end[0] if isinstance(end, (list, tuple)) else end
    return PadToken(end if pad is None else pad)
