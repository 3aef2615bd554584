"""What a run needs before it begins: the device, the model, the calibration batches, the evaluation text.

`fewbit.quantize` and `fewbit plan` prepare with the same functions, so that they refuse the same things.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import __version__
from .calibration import Calibration, prepare
from .config import QuantConfig
from .errors import CalibrationError, ConfigError, ModelError
from .evaluation import windows
from .modeling.experts import unfuse
from .modeling.source import Source
from .pipeline.quantize_layers import check_weights
from .pipeline.streaming import StreamedWeights, Weights
from .profiling import Profiler

# What `evaluate_on` measures.
EVALUATION_SEQ_LEN = 512
EVALUATION_WINDOWS = 64

_PLACEHOLDER = re.compile(r"(image|video|audio|speech)\w*_token_(id|index)$")


def check_processes(dataset: Any, processes: int) -> None:
    """Raises ConfigError for what so many processes cannot do together."""
    if processes < 1:
        raise ConfigError(f"there cannot be {processes} processes: give 1 or more")
    if processes > 1 and dataset == "-":
        raise ConfigError(
            f"standard input cannot be read by all {processes} processes: save the calibration text to a file"
        )


def resolve_device(name: str) -> torch.device:
    """The device called `name`; "auto" takes cuda, then xpu, then the CPU (mps lacks float64: by name only).

    Raises:
        ConfigError: the name is unknown or the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "xpu" if torch.xpu.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def open_model(
    source: Source, dtype: str, device: torch.device, profiler: Profiler
) -> tuple[nn.Module, Weights]:
    """The model, and its weights: read block by block where the source allows it, otherwise all of them."""
    with profiler.time("load"):
        if source.streams:
            model, files = source.build_model(dtype)
            unfuse(model)
            return model, StreamedWeights(model, files, device, profiler)
        model = source.load_model(dtype, device)
        check_weights(model)
        unfuse(model)
        return model, Weights(model)


@dataclass(frozen=True)
class Evaluation:
    """What the result will be measured on: token ids (count, seq_len), and where they are from."""

    dataset: str
    windows: Tensor


def evaluation_windows(source: Source, dataset: Any, tokenizer: Any = None) -> Evaluation:
    """The windows on which the result will be measured.

    Raises:
        ConfigError: the model is no causal language model.
        CalibrationError: the text cannot be used.
    """
    config = source.load_config()
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            "evaluation (--eval) measures causal language models; this one is an encoder-decoder: leave it out"
        )
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or EVALUATION_SEQ_LEN
    seq_len = min(EVALUATION_SEQ_LEN, positions)
    text = windows(dataset, tokenizer or source.load_tokenizer(), seq_len, EVALUATION_WINDOWS)
    return Evaluation(_text_name(dataset), text)


def calibrate(config: QuantConfig, dataset: Any, tokenizer: Any, model_config: Any) -> Calibration:
    """The calibration batches; none for a run that needs none.

    Raises:
        CalibrationError: no text was given, or it cannot be used.
    """
    methods = {config.method} | {
        s["method"] for s in config.override.values() if isinstance(s, dict) and "method" in s
    }
    if methods == {"rtn"}:
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
    for key in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        value = getattr(model_config, key, None)
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


def ranges_of(model: nn.Module) -> str:
    """The smallest and largest value of every weight: enough to tell models apart that should be the same."""
    return str([[float(value) for value in p.detach().aminmax()] for p in model.parameters() if p.numel()])


def _text_name(dataset: Any) -> str:
    """For people: the name of a set or file, without its folder."""
    if dataset == "-":
        return "standard input"
    return Path(dataset).name if isinstance(dataset, (str, Path)) else "given texts"
