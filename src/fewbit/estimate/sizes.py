"""How many bytes a run will leave behind, and how many it needs on the way: counted from the plan, exactly where
tensors are concerned.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ..checkpoint.assemble import checkpoint_tensors
from ..checkpoint.layout import empty_layer
from ..checkpoint.safetensors_file import TensorInfo, encode_header, read_header
from ..config import QuantConfig
from ..mixed_precision.units import Choice, stored_bytes
from ..modeling.source import Source
from ..pipeline.streaming import Weights
from ..planning import LayerPlan, Plan, output_embedding_name


@dataclass(frozen=True)
class Sizes:
    """Bytes.

    Attributes:
        quantized: the packed tensors. plain: the tensors that are not quantized. output: the finished folder.
        journal: kept beside it until it is complete.
        layers: layer → its packed tensors.
    """

    quantized: int
    plain: int
    output: int
    journal: int
    layers: dict[str, int]

    @property
    def disk(self) -> int:
        """Free space that a new run needs: result and journal at the same time."""
        return self.output + self.journal


def sizes_of(model: nn.Module, plan: Plan, config: QuantConfig, source: Source) -> Sizes:
    """Of a run over `model`, whose weights may be on the meta device.

    With `target_bits` bits are chosen later: the budget stands for the quantized tensors.
    """
    packed = {layer.name: _packed(layer) for layer in plan.layers}
    shards = Weights(model).state_by_shard()
    tensors = checkpoint_tensors(model, list(packed), packed.__getitem__, shards, values=False)
    entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors]
    layers = {layer.name: _stored(layer) for layer in plan.layers}
    quantized = sum(layers.values())
    plain = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in entries) - quantized
    if config.target_bits is not None:
        quantized = int(config.target_bits * plan.weights / 8)
    weights = quantized + plain + len(encode_header(entries))
    copied = sum(path.stat().st_size for path in source.files_to_copy().values())
    texts = 2 * len(json.dumps(source.config_dict(model))) + _report_bytes(plan)
    return Sizes(
        quantized,
        plain,
        weights + copied + texts,
        quantized + _record_bytes(plan),
        layers,
    )


def untie_head(model: nn.Module, plan: Plan, weights: Weights) -> None:
    """What the walk does first where the output embedding is to be quantized: give it a weight of its own."""
    name = output_embedding_name(model)
    if any(layer.name == name for layer in plan.layers):
        weights.untie(f"{name}.weight")


def largest_tensor(source: Source) -> tuple[Path, TensorInfo | None]:
    """The file with the largest tensor of the source, and where that lies; None in files without a header."""
    files = source.weight_files()
    found = [
        (path, info)
        for path in files
        if path.suffix == ".safetensors"
        for info in read_header(path)[0].values()
    ]
    return max(found, key=lambda item: item[1].nbytes) if found else (files[0], None)


def _stored(layer: LayerPlan) -> int:
    choice = Choice(layer.settings.bits, layer.settings.group_size)
    return stored_bytes(layer.out_features, layer.in_features, choice)


def _packed(layer: LayerPlan) -> dict[str, Tensor]:
    settings = layer.settings
    return empty_layer(settings.bits, settings.group_size, layer.in_features, layer.out_features)


def _record_bytes(plan: Plan) -> int:
    """Of the journal's lines: about 600 for a layer."""
    return 600 * len(plan.layers)


def _report_bytes(plan: Plan) -> int:
    """Of the report as JSON and as a page, the model card and the manifest, as seen with models of every size."""
    return 40_000 + 1_800 * len(plan.layers)
