"""From a quantized model to the tensors of the checkpoint, under the names of the original files.

Quantized layers give ``qweight, qzeros, scales, g_idx`` (and their unchanged bias) in place of ``weight``. Everything
else is written as it is. Tied weights are written once.

Some files hold several layers in one tensor (q, k and v; gate and up), which transformers splits when it loads them.
Packed tensors cannot be merged again. So if such a layer is quantized, it and the others of its kind are written one by
one, with the names of the model's own modules.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import transformers_internals


def checkpoint_tensors(
    model: nn.Module,
    layers: Collection[str],
    layer_tensors: Callable[[str], dict[str, Tensor]],
    shards: Iterable[list[str]],
    *,
    values: bool = True,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield every (name, tensor) of the checkpoint, in the order of `shards`.

    Args:
        model: Model whose layers are quantized. Its names are turned back into the names of the original files.
        layers: Names of the quantized layers.
        layer_tensors: Returns a layer's packed tensors by their short names.
        shards: Names of the model's state in parts; while a part is the current one, its tensors are in memory.
        values: False for tensors on the meta device: dtypes and shapes of the checkpoint, without reading weights.
        dtypes: Dtypes of tensors of the model's state in the checkpoint, where they differ from the model's.
    """
    quantized = {f"{name}.weight": name for name in layers}
    split = separate_layers(model, layers)
    on_disk = names_on_disk(model, layers, split)
    saved = _saved_names(model)
    for shard in shards:
        state = model.state_dict()
        plain: dict[str, Tensor] = {}
        for key in shard:
            if key in quantized:
                name = quantized[key]
                (prefix,) = on_disk[name]
                for short, tensor in layer_tensors(name).items():
                    yield f"{prefix}.{short}", tensor
            elif key in saved:
                tensor = state[key].detach() if values else torch.empty_like(state[key], device="meta")
                plain[key] = tensor.to((dtypes or {}).get(key, tensor.dtype))
        yield from _disk_layout(model, plain, split).items()


def _saved_names(model: nn.Module) -> set[str]:
    """Names of the state without tied duplicates and without tensors that the model itself does not save."""
    state = model.state_dict(keep_vars=True)
    for key in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(key, None)
    seen: set[object] = set()
    saved = set()
    # Of tied names, the one that the model class names as the source: those tied to it come last here.
    tied = getattr(model, "all_tied_weights_keys", {})
    for key, tensor in sorted(state.items(), key=lambda item: item[0] in tied):
        # Tensors on the meta device have no address.
        address = (
            id(tensor)
            if tensor.is_meta or not tensor.numel()
            else (tensor.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        )
        if address not in seen:
            saved.add(key)
        seen.add(address)
    return saved


def _disk_layout(
    model: nn.Module, state: dict[str, Tensor], split: Collection[str] = ()
) -> dict[str, Tensor]:
    """Restore the names and layouts of the original files, where transformers changed them at load.

    The layers `split`, and others of their kind, keep the layout that they have in the model.
    """
    if not isinstance(model, PreTrainedModel):
        return state
    with ExitStack() as stack:
        if split:
            stack.callback(
                transformers_internals.set_conversions, model, transformers_internals.conversions(model)
            )
            keep_split(model, split)
        reverted: dict[str, Tensor] = transformers_internals.revert_weight_conversion(model, state)
    return reverted


def keep_split(model: PreTrainedModel, layers: Iterable[str]) -> None:
    """Make ``save_pretrained`` write `layers`, and others of their kind, one by one."""
    used = transformers_internals.conversions_of(model)
    dropped = transformers_internals.converters_of((f"{name}.weight" for name in layers), used)
    if dropped:
        transformers_internals.set_conversions(model, [entry for entry in used if entry not in dropped])


def separate_layers(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Find the layers among `names` that have no own tensor in the original files."""
    on_disk = _tensors_on_disk(model, names, ())
    return {
        name for name, (stored, renamed) in on_disk.items() if not (renamed and stored[0].endswith(".weight"))
    }


def names_on_disk(
    model: nn.Module, names: Iterable[str], split: Collection[str] = ()
) -> dict[str, list[str]]:
    """Find the names that modules or bare parameters get in a checkpoint: several where transformers merged them.

    Args:
        model: may be on the meta device.
        names: the modules or parameters.
        split: quantized layers that are written one by one (`separate_layers`); () for the original files.
    """
    found = _tensors_on_disk(model, names, split)
    return {name: [key.removesuffix(".weight") for key in stored] for name, (stored, _) in found.items()}


def _tensors_on_disk(
    model: nn.Module, names: Iterable[str], split: Collection[str]
) -> dict[str, tuple[list[str], bool]]:
    """Find the tensors of the files that hold the weights of modules, or bare parameters, and if they are equal."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    keys = {name: f"{name}.weight" if f"{name}.weight" in parameters else name for name in names}
    empty = {key: torch.empty_like(parameters[key], device="meta") for key in keys.values()}
    # A renamed tensor comes out as the same object. Others are converted one by one, to see what becomes of each.
    renamed = {id(tensor): stored for stored, tensor in _disk_layout(model, dict(empty), split).items()}
    found = {}
    for name, key in keys.items():
        known = renamed.get(id(empty[key]))
        alone = [known] if known is not None else _converted_alone(model, key, empty[key], split)
        found[name] = (alone, known is not None)
    return found


def _converted_alone(model: nn.Module, key: str, tensor: Tensor, split: Collection[str]) -> list[str]:
    """Names of the tensors that one tensor becomes; none if the conversion needs others together with it."""
    try:
        return list(_disk_layout(model, {key: tensor}, split))
    except ValueError:
        return []
