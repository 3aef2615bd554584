"""Where the result of a run goes: a checkpoint folder, or the model itself.

Both destinations have the same methods, in the order of a run: `check`, `open`, `write`, `publish`, `complete`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor, nn

from . import __version__
from .checkpoint.assemble import checkpoint_tensors, names_on_disk, separate_layers
from .checkpoint.layout import Shaped, pack
from .checkpoint.quantization_config import build
from .checkpoint.safetensors_file import check_finite
from .checkpoint.writer import CheckpointWriter, is_written, parse_size
from .config import QuantConfig
from .distillation import Distillation, distill_into
from .distillation.data import DistillData, fingerprint_of_run, settings_of, text_of_run
from .distributed import Communicator
from .errors import ConfigError, OutputError
from .gptq import quantize_weight
from .mixed_precision import BudgetStore, base_settings
from .modeling.source import Source
from .pipeline.journal import FOLDER, Journal, check_output
from .pipeline.layer_quantizer import MemorySink, NonLeaderSink, ResultSink
from .pipeline.output_hessians import OutputHessianStore
from .planning import LayerPlan, Plan, output_embedding_name, plan_copied
from .preparation import Preparation
from .report.model_card import CARD_NAME, model_card
from .report.report import Report, write_text

_UNDISTILLED = "undistilled"  # the checkpoint before distillation, in the journal's folder


class InPlace:
    """The model in memory, whose layers are replaced. An error midway leaves it partly changed."""

    folder: Path | None = None
    budget: BudgetStore | None = None
    output_hessians: OutputHessianStore | None = None
    distillation: Distillation | None = None
    notes: tuple[str, ...] = ()

    def check(self, comm: Communicator) -> None:
        """Nothing can be wrong with it."""

    @contextmanager
    def open(self, run: Preparation) -> Iterator[ResultSink]:
        """Collect the packed tensors in memory, with the model in evaluation mode."""
        was_training = run.model.training
        run.model.eval()
        yield MemorySink()
        run.model.train(was_training)

    def write(self, run: Preparation, plan: Plan, sink: ResultSink) -> None:
        from .hf.quantizer import replace_layers

        settings = quantization_config(run.ctx.config, run.model, plan, run.meta)
        replace_layers(run.model, plan, sink.tensors, settings)

    def publish(self, report: Report) -> None:
        """The report becomes an attribute of the model."""

    def complete(self) -> None:
        """Nothing is left to do."""


class CheckpointFolder:
    """A folder on disk: the journal while the run lasts, then the checkpoint, its report and its model card.

    Rank 0 writes; the other ranks follow its journal.

    Attributes:
        folder: path of the folder.
        budget: store of the chosen bits, beside the journal; None before `open` and on the other ranks.
        output_hessians: store of the Hessians of the outputs, beside the journal, in the same way.
        distillation: what distillation did; None without it.
        notes: sentences about damaged parts of an interrupted run.
    """

    def __init__(
        self,
        folder: str | Path | None,
        max_shard_size: int | str,
        resume: bool,
        repository: str | None = None,
    ) -> None:
        if folder is None:
            raise ConfigError("no output folder was given: pass output=…")
        self.folder = Path(folder)
        self.budget: BudgetStore | None = None
        self.output_hessians: OutputHessianStore | None = None
        self.distillation: Distillation | None = None
        self._data: DistillData | None = None
        self.notes: tuple[str, ...] = ()
        self._shard_bytes = parse_size(max_shard_size)
        self._resume = resume
        self._repository = repository
        self._journal: Journal | None = None

    def check(self, comm: Communicator) -> None:
        """Raises OutputError if the folder holds anything but an interrupted run."""
        if comm.is_leader:
            check_output(self.folder)

    @contextmanager
    def open(self, run: Preparation) -> Iterator[ResultSink]:
        """Open the journal, or start it. It stays on disk until `complete`."""
        comm = run.ctx.comm
        self._data = text_of_run(run)
        if not comm.is_leader:
            yield NonLeaderSink(comm.broadcast_object({}))
            return
        fingerprint = fingerprint_of_run(run, self._data)
        self._journal = journal = Journal(self.folder, fingerprint, self._resume)
        try:
            comm.broadcast_object(journal.records)
            self.budget = BudgetStore(journal.folder, run.fingerprint, journal.records)
            self.output_hessians = OutputHessianStore(journal.folder, run.fingerprint)
            self.notes = tuple(journal.notes)
            yield journal
        finally:
            journal.close()

    def write(self, run: Preparation, plan: Plan, sink: ResultSink) -> None:
        """Write the checkpoint; all layers of the plan are in the journal.

        Raises:
            OutputError: the disk is full or fails, or files of a checkpoint that was complete are damaged.
        """
        folder = self.folder if self._data is None else self.folder / FOLDER / _UNDISTILLED
        if run.ctx.comm.is_leader:
            with run.ctx.profiler.time("write"):
                self._write(folder, run, plan, sink)
        if self._data is not None:
            self._distill(folder, self._data, run)

    def _distill(self, folder: Path, data: DistillData, run: Preparation) -> None:
        """Distill the checkpoint in `folder`, which is complete, into the output folder."""
        run.ctx.comm.broadcast_object(None)  # all files are there
        run.release()  # two other models are loaded
        assert isinstance(run.source, Source)
        with run.ctx.profiler.time("distill"):
            self.distillation = distill_into(
                self.folder,
                folder,
                run.source,
                data,
                settings_of(run.ctx.config),
                run.ctx,
                self._shard_bytes,
            )

    def _write(self, folder: Path, run: Preparation, plan: Plan, sink: ResultSink) -> None:
        source, model = run.source, run.model
        assert isinstance(source, Source)
        if is_written(folder):  # killed between the last file and the end of the journal
            return
        names = [layer.name for layer in plan.layers]
        dtypes = run.weights.stored_dtypes
        values = source.config_dict(model)
        values["torch_dtype" if "torch_dtype" in values else "dtype"] = run.origin.dtype
        if run.weights.untied or output_embedding_name(model) in names:
            values["tie_word_embeddings"] = False
        extra: dict[str, Path | bytes] = dict(source.files_to_copy())
        if source.gguf is not None:
            extra.update(_saved_files(run.text_tokenizer, getattr(model, "generation_config", None)))
        packed = {layer.name: layer.packed() for layer in plan.layers}
        states = run.weights.state_by_shard()
        planned: dict[str, Shaped] = dict(
            checkpoint_tensors(model, names, packed.__getitem__, states, values=False, dtypes=dtypes)
        )
        copied = {name: tensor for name, tensor in run.weights.unused.items() if name not in planned}
        extra_layers = plan_copied({name: t.info.shape for name, t in copied.items()}, run.ctx.config)
        rounded = {f"{layer.name}.weight": layer for layer in extra_layers}
        planned |= {name: tensor.info for name, tensor in copied.items() if name not in rounded}
        planned |= {f"{layer.name}.{s}": t for layer in extra_layers for s, t in layer.packed().items()}
        shards = run.weights.shards(without=[f"{name}.weight" for name in names])
        with CheckpointWriter(folder, planned, self._shard_bytes) as writer:
            for name, tensor in checkpoint_tensors(model, names, sink.tensors, shards, dtypes=dtypes):
                writer.add(name, tensor)
            for name, file_tensor in copied.items():
                for key, tensor in _copy(name, file_tensor.read(), rounded.get(name), run.ctx.config.format):
                    writer.add(key, tensor)
            dense = [
                n.removesuffix(".weight")
                for n, t in copied.items()
                if len(t.info.shape) > 1 and n not in rounded
            ]
            settings = quantization_config(run.ctx.config, model, plan, run.meta, dense, extra_layers)
            writer.finish(values, settings, extra)

    def publish(self, report: Report) -> None:
        """Write the report and the model card."""
        report.write(self.folder)
        write_text(self.folder / CARD_NAME, model_card(report.to_dict(), self._repository))

    def complete(self) -> None:
        """Remove the journal."""
        assert self._journal is not None
        self._journal.remove()


def quantization_config(
    config: QuantConfig,
    model: nn.Module,
    plan: Plan,
    meta: dict[str, Any],
    copied: Sequence[str] = (),
    rounded: Sequence[LayerPlan] = (),
) -> dict[str, Any]:
    """What config.json says about a model before its layers are replaced, in the names of the original files.

    `copied` and `rounded` are matrices of the files that belong to no layer of the model, left and quantized.
    """
    names = [layer.name for layer in plan.layers] + [item.name for item in plan.skipped]
    on_disk = names_on_disk(model, names, separate_layers(model, [layer.name for layer in plan.layers]))
    if config.target_bits is not None:
        bits, group_size = base_settings(plan)
        config = replace(config, bits=bits, group_size=group_size)
    return build(
        config,
        {name: layer.settings for layer in plan.layers for name in on_disk[layer.name]}
        | {layer.name: layer.settings for layer in rounded},
        [*(name for item in plan.skipped for name in on_disk[item.name]), *copied],
        meta,
    )


def _copy(name: str, tensor: Tensor, layer: LayerPlan | None, fmt: str) -> Iterator[tuple[str, Tensor]]:
    """Yield a tensor as it is, or the packed tensors of its matrix rounded to nearest."""
    if layer is None:
        yield name, tensor
        return
    check_finite(name, tensor)
    codes = quantize_weight(tensor, None, layer.settings).codes
    yield from ((f"{layer.name}.{short}", part) for short, part in pack(codes, fmt).items())


def upload(
    folder: Path,
    repository: str,
    message: str | None = f"Quantized with fewbit {__version__}",
    *,
    token: bool | str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Copy a finished folder to a Hub repository, which is created if it is missing.

    Raises:
        OutputError: the Hub refuses, or cannot be reached.
    """
    hub = HfApi()
    try:
        made = hub.create_repo(repository, private=private, token=token, exist_ok=True)
        return hub.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            commit_message=message,
            token=token,
            create_pr=create_pr,
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise OutputError(
            f"{folder} is complete, but could not be uploaded to {repository}: {error}. "
            "Log in with `hf auth login` or pass a token, then upload the folder or try again."
        ) from error


def _saved_files(*parts: Any) -> dict[str, bytes]:
    """What `save_pretrained` of each part writes, for models that came without such files."""
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            if part is not None:
                part.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
