"""What a run leaves: the checkpoint, its configuration, and on request a copy on the Hub."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import __version__
from . import mixed_precision as budget
from .calibration import Calibration
from .checkpoint import manifest
from .checkpoint.assemble import checkpoint_tensors, names_on_disk
from .checkpoint.layout import empty_layer
from .checkpoint.quantization_config import build
from .checkpoint.writer import CONFIG, MARKER, CheckpointWriter
from .config import QuantConfig
from .errors import OutputError
from .modeling.source import Source
from .pipeline.journal import Journal
from .pipeline.streaming import Weights
from .planning import LayerPlan, Plan, output_embedding_name
from .report.collect import PAGE_NAME, REPORT_NAME


def write_checkpoint(
    output: Path,
    source: Source,
    model: nn.Module,
    weights: Weights,
    plan: Plan,
    config: QuantConfig,
    calibration: Calibration,
    journal: Journal,
    shard_bytes: int,
    tokenizer: Any,
) -> None:
    """Write the checkpoint of a model whose layers are all in the journal.

    Raises:
        OutputError: the disk is full or fails, or files of a checkpoint that was complete are damaged.
    """
    if (output / CONFIG).exists():  # killed between the last file and the end of the journal
        manifest.require(output)
        (output / MARKER).unlink(missing_ok=True)
        return
    names = [layer.name for layer in plan.layers]
    values = source.config_dict(model)
    if output_embedding_name(model) in names:
        values["tie_word_embeddings"] = False
    extra: dict[str, Path | bytes] = dict(source.files_to_copy())
    if source.gguf is not None:
        extra.update(_saved_files(tokenizer, getattr(model, "generation_config", None)))
    packed = {layer.name: _packed(layer) for layer in plan.layers}
    planned = checkpoint_tensors(model, names, packed.__getitem__, weights.state_by_shard(), values=False)
    shards = weights.shards(without=[f"{name}.weight" for name in names])
    with CheckpointWriter(output, dict(planned), shard_bytes) as writer:
        for name, tensor in checkpoint_tensors(model, names, journal.tensors, shards):
            writer.add(name, tensor)
        writer.finish(values, quantization_config(config, model, plan, meta_of(calibration)), extra)


def _packed(layer: LayerPlan) -> dict[str, Tensor]:
    """The layer's tensors without values, in the order in which the journal returns them."""
    settings = layer.settings
    packed = empty_layer(settings.bits, settings.group_size, layer.in_features, layer.out_features)
    return dict(sorted(packed.items()))


def quantization_config(
    config: QuantConfig, model: nn.Module, plan: Plan, meta: dict[str, Any]
) -> dict[str, Any]:
    """What config.json says of a model before its layers are replaced, in the names of the original files."""
    names = [layer.name for layer in plan.layers] + [item.name for item in plan.skipped]
    on_disk = names_on_disk(model, names)
    if config.target_bits is not None:
        bits, group_size = budget.stated(plan)
        config = replace(config, bits=bits, group_size=group_size)
    return build(
        config,
        {name: layer.settings for layer in plan.layers for name in on_disk[layer.name]},
        [name for item in plan.skipped for name in on_disk[item.name]],
        meta,
    )


def meta_of(calibration: Calibration) -> dict[str, Any]:
    """What is noted about the calibration."""
    return {"calibration": calibration.fingerprint}


def upload(folder: Path, repository: str) -> None:
    """Copy a finished folder to a Hub repository.

    Raises:
        OutputError: the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    hub = HfApi()
    try:
        hub.create_repo(repository, exist_ok=True)
        hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=f"Quantized with fewbit {__version__}",
            ignore_patterns=[REPORT_NAME, PAGE_NAME],  # they tell paths of this machine
        )
    except (HfHubHTTPError, OSError) as error:
        raise OutputError(
            f"{folder} is complete, but could not be uploaded to {repository}: {error}. "
            "Log in with `hf auth login` and upload the folder, or try again."
        ) from error


def _saved_files(*parts: Any) -> dict[str, bytes]:
    """What `save_pretrained` of each part writes, for models that came without such files."""
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            if part is not None:
                part.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
