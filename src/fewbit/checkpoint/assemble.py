"""From a walked model and its finished layers to the tensors of the checkpoint, under their names on disk.

Quantized layers give ``qweight, qzeros, scales, g_idx`` (and their untouched bias) in place of
``weight``. Everything else is written as it is. Tied weights are written once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

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
    on_disk = names_on_disk(model, layers)
    plain: dict[str, Tensor] = {}
    for key, tensor in _own_tensors(model).items():
        if key not in quantized:
            plain[key] = tensor
            continue
        name = quantized[key]
        prefix = _only_name(name, on_disk[name])
        for short, part in layer_tensors(name).items():
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


def names_on_disk(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """What the original files call each module or bare parameter; several names where transformers merged them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    for name in names:
        key = f"{name}.weight" if f"{name}.weight" in parameters else name
        stored = _disk_layout(model, {key: torch.empty_like(parameters[key], device="meta")})
        found[name] = [key.removesuffix(".weight") for key in stored]
    return found


def _only_name(name: str, on_disk: list[str]) -> str:
    if len(on_disk) != 1:
        raise ModelError(
            f"layer {name} is stored on disk as {', '.join(on_disk) or 'nothing'}, "
            "which fewbit cannot write quantized yet; exclude it with --ignore"
        )
    return on_disk[0]
