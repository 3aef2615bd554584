"""What `save_pretrained` writes: the tensors as they are, or the same weights in the other format.

And, between `register` and `unregister`, what older readers need beside them: quantize_config.json, and config.json's
former keys.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint import layout
from ..checkpoint.writer import CONFIG, QUANTIZE_CONFIG, for_older_readers
from ..kernels.linear import QuantizedLayer
from .gptq_config import GPTQConfig
from .layers import quantized_layers


def state_dict_in(model: PreTrainedModel, fmt: str) -> dict[str, Any] | None:
    """The model's state in format `fmt`; None if it is in that format.

    The weights stay the same to the last bit. Only zero points are stored otherwise, and where format "gptq" cannot
    say zero point 0, the grid is turned round (`layout.without_zero_point_0`).
    """
    others = {name: layer for name, layer in quantized_layers(model) if layer.spec.format != fmt}
    if not others:
        return None
    state: dict[str, Any] = model.state_dict()
    for name, layer in others.items():
        parts = {part: state[f"{name}.{part}"] for part in layout.PARTS if f"{name}.{part}" in state}
        state |= {f"{name}.{part}": tensor for part, tensor in _in_format(layer, parts, fmt).items()}
    return state


def all_at_hand(model: PreTrainedModel) -> bool:
    """Whether all quantized tensors are at hand; accelerate may keep some elsewhere."""
    return not any(buffer.is_meta for _, layer in quantized_layers(model) for buffer in layer.buffers())


def with_quantize_config(original: Callable[..., None]) -> Callable[..., None]:
    """A `save_pretrained` for transformers' models: `original`, and what older readers look for."""

    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        original(self, save_directory, *args, **kwargs)
        config = getattr(self.config, "quantization_config", None)
        saved = not getattr(self, "_hf_peft_config_loaded", False) and kwargs.get("is_main_process", True)
        if isinstance(config, GPTQConfig) and saved:
            _write(Path(save_directory) / QUANTIZE_CONFIG, config.to_dict())
            saved_config = json.loads((Path(save_directory) / CONFIG).read_text(encoding="utf-8"))
            _write(Path(save_directory) / CONFIG, for_older_readers(saved_config))

    return save_pretrained


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _in_format(layer: QuantizedLayer, parts: dict[str, Tensor], fmt: str) -> dict[str, Tensor]:
    spec = layer.spec
    zeros = layout.unpack_zeros(parts[layout.QZEROS], spec.bits, spec.format, spec.out_features)
    if fmt == "gptq" and bool(torch.any(zeros == 0)):
        turned = layout.pack(layout.without_zero_point_0(layer.codes()), fmt)
        return {part: turned[part] for part in parts}
    return {layout.QZEROS: layout.pack_zeros(zeros.t().contiguous(), spec.bits, fmt)}
