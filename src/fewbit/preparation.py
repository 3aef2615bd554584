"""What a run needs before it begins: the device, the model, its plan, the calibration batches, the evaluation text."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import __version__, formatting
from .calibration import Calibration, prepare
from .checkpoint.safetensors_file import FileTensor
from .config import AUTO, EVALUATION_TOKENS, QuantConfig
from .context import RunContext, computing_dtype
from .errors import CalibrationError, ConfigError, ModelError
from .evaluation import windows
from .mixed_precision import check_budget
from .modeling.experts import unfuse
from .modeling.source import LoadedModel, Source, load_tokenizer
from .pipeline.quantize_layers import check_weights
from .pipeline.streaming import StreamedWeights, Weights
from .planning import Plan, plan_and_group_size, plan_copied

EVALUATION_SEQ_LEN = 512  # tokens per window on which the result is measured

_PLACEHOLDER = re.compile(r"(image|video|audio|speech)\w*_token_(id|index)$")


def check_processes(dataset: Any, processes: int) -> None:
    """Raises ConfigError for what this many processes cannot share."""
    if processes < 1:
        raise ConfigError(f"there cannot be {processes} processes: give 1 or more")
    if processes > 1 and dataset == "-":
        raise ConfigError(
            f"standard input cannot be read by all {processes} processes: save the calibration text to a file"
        )


@dataclass(frozen=True)
class EvaluationText:
    """What the result will be measured on.

    Attributes:
        dataset: name of the text, for people.
        windows: token ids, int64 (count, seq_len).
    """

    dataset: str
    windows: Tensor


@dataclass(frozen=True)
class Origin:
    """The model before the run.

    Attributes:
        name: Hub id, name of the folder or file, or class of a model in memory.
        hub_id: Hub id, if the model was downloaded.
        architecture: class of the model.
        dtype: dtype of the tensors that stay unquantized.
        parameters: number of parameters, tensors of the files that the class does not use included.
        bytes: size of all parameters in that dtype.
        file_bytes: size of the weight files; None for a model in memory.
        license: the license that the model's card states; None where it states none.
    """

    name: str
    hub_id: str | None
    architecture: str
    dtype: str
    parameters: int
    bytes: int
    file_bytes: int | None
    license: str | None = None


@dataclass
class Preparation:
    """The inputs of one run, each made when it is first asked for.

    `fewbit.quantize` asks for all of them with `check`, which raises at the first that cannot be had. `fewbit plan`
    asks for one after the other, and collects what is wrong.

    Attributes:
        ctx: the run; `plan` chooses its group size where that is "auto".
        source: the model as it was given.
        dataset: calibration text.
        tokenizer: tokenizer, or where it is; None for the one beside the model.
        evaluate_on: text on which the result will be measured; None for no evaluation.
        evaluate_tokens: tokens of that text at most.
    """

    ctx: RunContext
    source: Source | LoadedModel
    dataset: Any = None
    tokenizer: Any = None
    evaluate_on: Any = None
    evaluate_tokens: int = EVALUATION_TOKENS

    def check(self) -> None:
        """Make everything, the cheapest first.

        Raises:
            FewbitError: the run cannot work.
        """
        check_processes(self.dataset, self.ctx.comm.world_size)
        self.evaluation  # noqa: B018 - made now, so that errors come early
        self.origin  # noqa: B018
        check_budget(self.plan, self.ctx.config)
        if self.ctx.comm.world_size > 1:
            self.ctx.comm.assert_same(**self.fingerprint)

    @cached_property
    def text_tokenizer(self) -> Any:
        if isinstance(self.tokenizer, (str, Path)):
            return load_tokenizer(self.tokenizer)
        return self.tokenizer or self.source.load_tokenizer()

    @cached_property
    def evaluation(self) -> EvaluationText | None:
        """Windows of the evaluation text.

        Raises:
            ConfigError: the model is no causal language model.
            CalibrationError: the text cannot be used.
        """
        if self.evaluate_on is None:
            return None
        if self.evaluate_on == "-" == self.dataset:
            raise ConfigError(
                "standard input cannot be both the calibration and the evaluation text: use a file for one"
            )
        config = self.source.load_config()
        if getattr(config, "is_encoder_decoder", False):
            raise ConfigError(
                "evaluation (--eval) measures causal language models; this one is an encoder-decoder: leave it out"
            )
        positions = getattr(config.get_text_config(), "max_position_embeddings", None) or EVALUATION_SEQ_LEN
        seq_len = min(EVALUATION_SEQ_LEN, positions)
        if self.evaluate_tokens < 2:
            raise ConfigError(f"the evaluation needs at least 2 tokens; got {self.evaluate_tokens}")
        seq_len = min(seq_len, self.evaluate_tokens)
        text = windows(self.evaluate_on, self.text_tokenizer, seq_len, self.evaluate_tokens // seq_len)
        return EvaluationText(_text_name(self.evaluate_on), text)

    @cached_property
    def calibration(self) -> Calibration:
        with self.ctx.profiler.time("calibration"):
            model_config = self.source.load_config()  # first: its errors are clearer than the tokenizer's
            return calibrate(self.ctx.config, self.dataset, self.text_tokenizer, model_config)

    @cached_property
    def opened(self) -> tuple[nn.Module, Weights]:
        """The model and its weights: read block by block where the source allows it, otherwise all in memory."""
        ctx, source = self.ctx, self.source
        with ctx.profiler.time("load"):
            if isinstance(source, Source) and source.streams:
                model, files, stored = _built(source, ctx)
                weights = StreamedWeights(model, files, ctx.device, ctx.profiler, stored)
                if ctx.config.rotate:
                    weights.rotate(ctx.config.seed)
                    source.notes.extend(_note_on_untied(weights))
                if left_out := source.files_left_out():
                    source.notes.append(
                        f"{len(left_out)} files beside the weights are not copied, for example {left_out[0]}: copy "
                        "what belongs to the model (its Python code goes along with --trust-remote-code)"
                    )
                if weights.unused:
                    shapes = {name: tensor.info.shape for name, tensor in weights.unused.items()}
                    rounded = len(plan_copied(shapes, ctx.config))
                    source.notes.append(
                        f"{len(shapes)} tensors of the source belong to no layer of {type(model).__name__} and are "
                        f"copied as they are, for example {next(iter(shapes))}"
                        + (f"; {rounded} of them are rounded to nearest instead (mtp)" if rounded else "")
                    )
                return model, weights
            if ctx.config.rotate:
                raise ConfigError(
                    "rotate changes weights while they are read from safetensors files, and this model has none: give "
                    "the folder of the original model, or leave rotate out"
                )
            model = source.load_model(ctx.config.dtype, ctx.device)
            check_weights(model)
            unfuse(model)
            return model, Weights(model)

    @property
    def notes(self) -> list[str]:
        """Sentences for the user about the source and how it is read."""
        dtype = self.origin.dtype
        if computing_dtype(getattr(torch, dtype), self.ctx.device) is getattr(torch, dtype):
            return list(self.source.notes)
        how = (
            "the model runs in float32, and what is not quantized keeps its dtype"
            if self.weights.stored_dtypes
            else "a model in float32 runs several times as fast (dtype auto reads one block by block in float32)"
        )
        return [*self.source.notes, f"this CPU multiplies {dtype} slowly: {how}"]

    @property
    def model(self) -> nn.Module:
        return self.opened[0]

    @property
    def weights(self) -> Weights:
        return self.opened[1]

    def release(self) -> None:
        """Let go of the model and its weights."""
        self.__dict__.pop("opened", None)

    @cached_property
    def plan(self) -> Plan:
        """What will happen to every weight matrix; with a bit budget, before bits are chosen.

        The group size of `ctx.config` is a number from here on.
        """
        plan, config = plan_and_group_size(self.model, self.ctx.config)
        self.ctx = replace(self.ctx, config=config)
        return plan

    @cached_property
    def origin(self) -> Origin:
        """The model before the run; asked for before the model is changed."""
        files = self.source.weight_files()
        parameters = {n: p for n, p in self.model.named_parameters() if n not in self.weights.untied}
        stored = {name: self.weights.stored_dtypes.get(name, p.dtype) for name, p in parameters.items()}
        unused = [tensor.info for tensor in self.weights.unused.values()]
        return Origin(
            name=self.source.name,
            hub_id=self.source.hub_id,
            architecture=type(self.model).__name__,
            dtype=str(next(iter(stored.values()))).removeprefix("torch."),
            parameters=sum(parameter.numel() for parameter in parameters.values())
            + sum(math.prod(t.shape) for t in unused),
            bytes=sum(parameter.numel() * stored[name].itemsize for name, parameter in parameters.items())
            + sum(t.nbytes for t in unused),
            file_bytes=None if files is None else sum(path.stat().st_size for path in files),
            license=self.source.license,
        )

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Hashes of everything that decides the bytes of the result."""
        self.plan  # noqa: B018 - it may choose a group size
        with self.ctx.profiler.time("check"):
            return fingerprint_of(self.ctx.config, self.calibration, self.source.fingerprint())

    @property
    def meta(self) -> dict[str, Any]:
        """What the checkpoint says about the calibration."""
        return {"calibration": self.calibration.fingerprint}


def _note_on_untied(weights: Weights) -> list[str]:
    """What a rotation costs where the output layer shares its matrix with the embeddings."""
    if not weights.untied:
        return []
    own = formatting.size(sum(weights.model.get_parameter(name).nbytes for name in weights.untied))
    return [
        f"rotate gave the output layer a matrix of its own, {own}, because it shares that of the embeddings: lm_head "
        "(--lm-head) quantizes it. Engines that know only one matrix for this architecture cannot read the result"
    ]


def _built(
    source: Source, ctx: RunContext
) -> tuple[nn.Module, dict[str, FileTensor], dict[str, torch.dtype]]:
    """The model without weights, where its weights lie, and `Weights.stored_dtypes`."""
    model, files = source.build_model(ctx.config.dtype)
    unfuse(model)
    own = next(model.parameters()).dtype
    if ctx.config.dtype != AUTO or computing_dtype(own, ctx.device) is own:
        return model, files, {}
    stored = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    model, files = source.build_model("float32")
    unfuse(model)
    changed = {name: stored[name] for name, t in model.state_dict().items() if t.dtype is not stored[name]}
    source.notes[:] = dict.fromkeys(source.notes)  # the source was opened twice
    return model, files, changed


def calibrate(config: QuantConfig, dataset: Any, tokenizer: Any, model_config: Any) -> Calibration:
    """The calibration batches; none for a run that needs none.

    Raises:
        CalibrationError: no text was given, or it cannot be used.
    """
    if not config.needs_calibration:
        return Calibration(batches=[], fingerprint="none", tokens=0, sequences=0, source="none")
    if dataset is None:
        raise CalibrationError(
            "no dataset was given, and GPTQ needs calibration text: pass a .txt, .jsonl or .parquet file, a list "
            "of strings, or a known name such as wikitext2 (or choose method rtn, which needs none)"
        )
    encoder_decoder = bool(getattr(model_config, "is_encoder_decoder", False))
    text_config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    return prepare(
        dataset,
        tokenizer,
        num_samples=config.num_samples,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        seed=config.seed,
        max_positions=getattr(text_config, "max_position_embeddings", None),
        vocab_size=getattr(text_config, "vocab_size", None),
        placeholders=_special_ids(model_config),
        decoder_start_token_id=_decoder_start(model_config) if encoder_decoder else None,
    )


def _special_ids(model_config: Any) -> set[int]:
    """Ids that stand for images or sound, such as ``image_token_id``, and may have no embedding."""
    settings: dict[str, Any] = getattr(model_config, "to_dict", dict)()
    named = [value for key, value in settings.items() if _PLACEHOLDER.match(key)]
    return {value for value in named if isinstance(value, int)}


def _decoder_start(model_config: Any) -> int:
    """Find the id in the configuration, or in the configuration of its decoder or language model."""
    parts = (getattr(model_config, name, None) for name in ("decoder", "text_config"))
    for config in (model_config, *parts):
        for key in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
            value = getattr(config, key, None)
            if value is not None:
                return int(value)
    raise ModelError(
        "this encoder-decoder names no decoder_start_token_id in its config.json: add it, or give the data as token "
        "dicts with decoder_input_ids"
    )


def fingerprint_of(config: QuantConfig, calibration: Calibration, weights: str) -> dict[str, str]:
    """What decides the bytes of the result, each as a hash; `weights` is the source's own fingerprint."""
    settings = json.dumps(config.to_dict())  # unsorted: the order of overrides decides
    return {
        "fewbit version": __version__,
        "config": hashlib.sha256(settings.encode()).hexdigest(),
        "calibration data": calibration.fingerprint,
        "model": weights,
    }


def _text_name(dataset: Any) -> str:
    """For people: the name of a set or file, without its folder."""
    if dataset == "-":
        return "standard input"
    return Path(dataset).name if isinstance(dataset, (str, Path)) else "given texts"
