"""From a walked model and its finished layers to the tensors of the checkpoint, under their names on disk.

Quantized layers give ``qweight, qzeros, scales, g_idx`` (and their untouched bias) in place of
``weight``. Everything else is written as it is. Tied weights are written once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..pipeline.streaming import Weights


def checkpoint_tensors(
    model: nn.Module,
    layers: Collection[str],
    layer_tensors: Callable[[str], dict[str, Tensor]],
    weights: Weights,
) -> Iterator[tuple[str, Tensor]]:
    """Every (name, tensor) of the checkpoint, in the model's order, one part of it in memory at a time.

    Args:
        model: the model after the walk. Its names are turned back into those of the original files.
        layers: names of the quantized layers.
        layer_tensors: gives a layer's packed tensors by their short names.
        weights: of the model.

    Raises:
        ModelError: the original files store a quantized layer in a form that has no GPTQ counterpart.
    """
    quantized = {f"{name}.weight": name for name in layers}
    on_disk = names_on_disk(model, layers)
    own = set(_own_names(model))
    for part in weights.shards(without=quantized):
        state = model.state_dict()
        plain: dict[str, Tensor] = {}
        for key in part:
            if key in quantized:
                name = quantized[key]
                prefix = _only_name(name, on_disk[name])
                for short, tensor in layer_tensors(name).items():
                    yield f"{prefix}.{short}", tensor
            elif key in own:
                plain[key] = state[key].detach()
        yield from _disk_layout(model, plain).items()


def _own_names(model: nn.Module) -> list[str]:
    """Names of the state without tied duplicates and without what the model itself does not save."""
    state = model.state_dict(keep_vars=True)
    for key in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(key, None)
    seen: set[object] = set()
    own = []
    for key, tensor in state.items():
        # Tensors on the meta device have no address.
        place = (
            id(tensor)
            if tensor.is_meta or not tensor.numel()
            else (tensor.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        )
        if place not in seen:
            own.append(key)
        seen.add(place)
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
    keys = {name: f"{name}.weight" if f"{name}.weight" in parameters else name for name in names}
    empty = {key: torch.empty_like(parameters[key], device="meta") for key in keys.values()}
    # What is only renamed comes out as the same tensor; the rest one by one, to see what becomes of each.
    renamed = {id(tensor): stored for stored, tensor in _disk_layout(model, dict(empty)).items()}
    found = {}
    for name, key in keys.items():
        known = renamed.get(id(empty[key]))
        stored = [known] if known is not None else list(_disk_layout(model, {key: empty[key]}))
        found[name] = [stored_key.removesuffix(".weight") for stored_key in stored]
    return found


def _only_name(name: str, on_disk: list[str]) -> str:
    if len(on_disk) != 1:
        raise ModelError(
            f"layer {name} is stored on disk as {', '.join(on_disk) or 'nothing'}, "
            "which fewbit cannot write quantized yet; exclude it with --ignore"
        )
    return on_disk[0]
