"""Names in a checkpoint's files → names in a model, through transformers' own conversion."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..modeling.experts import unfuse, unfused_conversions, why_fused


class FileNames:
    """The names of one model's tensors in the files of a checkpoint.

    Args:
        model: without weights. If the files hold quantized layers of single experts, its experts are taken apart.
        layers: names of the quantized layers in the files.
    """

    def __init__(self, model: PreTrainedModel, layers: Iterable[str]) -> None:
        self._model = model
        self._read_conversions()
        fused = {name.rpartition(".")[0] for name in why_fused(model)}
        if fused and any(self._of_one_expert(layer, fused) for layer in layers) and unfuse(model):
            self._read_conversions()

    def place(self, name: str) -> tuple[str, list[str]]:
        """What the model calls the tensor `name`.

        Returns:
            The name, and the patterns of all tensors that transformers makes of it and others together; none where
            it only renames it.
        """
        renamed, merged = rename_source_key(
            name, self._renamings, self._converters, self._model.base_model_prefix, self._parameters
        )
        return renamed, self._targets[merged] if merged is not None else []

    def _of_one_expert(self, layer: str, fused: Collection[str]) -> bool:
        name, merged = self.place(f"{layer}.weight")
        # Some tools write transformers' names of modules: experts.3.gate_proj also for Mixtral.
        return bool(merged) or name.rsplit(".", 3)[0] in fused

    def _read_conversions(self) -> None:
        conversions = unfused_conversions(self._model, get_model_conversion_mapping(self._model))
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self._targets = {
            source: entry.target_patterns for entry in self._converters for source in entry.source_patterns
        }
        self._parameters = self._model.state_dict()
