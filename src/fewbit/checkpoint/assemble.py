"""From a walked model and its finished layers to the tensors of the checkpoint, under their names on disk.

Quantized layers give ``qweight, qzeros, scales, g_idx`` (and their untouched bias) in place of
``weight``. Everything else is written as it is. Tied weights are written once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn

from ..errors import ModelError


def checkpoint_tensors(
    model: nn.Module, layers: Collection[str], layer_tensors: Callable[[str], dict[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Every (name, tensor) of the checkpoint, in the model's order, one layer in memory at a time.

    Args:
        model: the model after the walk. Its names are turned back into those of the original files.
        layers: names of the quantized layers.
        layer_tensors: gives a layer's packed tensors by their short names.

    Raises:
        ModelError: the original files store a quantized layer in a form that has no GPTQ counterpart.
    """
    quantized = {f"{name}.weight": name for name in layers}
    plain: dict[str, Tensor] = {}
    for key, tensor in _own_tensors(model).items():
        if key not in quantized:
            plain[key] = tensor
            continue
        prefix = _layer_name_on_disk(model, key)
        for short, part in layer_tensors(quantized[key]).items():
            yield f"{prefix}.{short}", part
    yield from _disk_layout(model, plain).items()


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without tied duplicates and without what the model itself does not save."""
    state = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    for key in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(key, None)
    seen: dict[tuple[int, int, torch.Size, tuple[int, ...]], str] = {}
    own: dict[str, Tensor] = {}
    for key, tensor in state.items():
        place = (tensor.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if tensor.numel() and place in seen:
            continue
        seen[place] = key
        own[key] = tensor
    return own


def _disk_layout(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names and layouts of the original files, where transformers changed them at load."""
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    if not isinstance(model, PreTrainedModel):
        return state
    reverted: dict[str, Tensor] = revert_weight_conversion(model, state)
    return reverted


def names_on_disk(model: nn.Module, name: str) -> list[str]:
    """What the original files call the module `name`: one name, or several where transformers merged them."""
    state = model.state_dict(keep_vars=True)
    key = f"{name}.weight"
    if key not in state:  # a parameter of its own, such as fused experts
        return [name]
    found = _disk_layout(model, {key: torch.empty_like(state[key], device="meta")})
    return [key.removesuffix(".weight") for key in found]


def _layer_name_on_disk(model: nn.Module, key: str) -> str:
    name = key.removesuffix(".weight")
    names = names_on_disk(model, name)
    if len(names) != 1:
        raise ModelError(
            f"layer {name} is stored on disk as {', '.join(names) or 'nothing'}, "
            "which fewbit cannot write quantized yet; exclude it with --ignore"
        )
    return names[0]
