"""Training batches and held-out batches from the user's text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..calibration import prepare
from ..calibration.inputs import is_more_than_tokens
from ..calibration.sequences import collate
from ..config import Dtype, QuantConfig
from ..errors import CalibrationError, ConfigError

if TYPE_CHECKING:
    from ..preparation import Preparation

_HELD_OUT_SHARE, _MOST_HELD_OUT = 16, 16


@dataclass(frozen=True)
class DistillConfig:
    """Settings of a distillation.

    Attributes:
        tokens: tokens to train on.
        seq_len: tokens in a sequence.
        batch_size: sequences in a step.
        rate: peak learning rate, as a relative change of a scale in one step; None chooses by the bits.
        seed: chooses the sequences and their order.
        dtype: dtype of the activations; "auto" is bfloat16 where the device multiplies it fast, else float32.

    Raises:
        ConfigError: a value is out of range.
    """

    tokens: int = 500_000
    seq_len: int = 512
    batch_size: int = 2
    rate: float | None = None
    seed: int = 0
    dtype: Dtype = "auto"

    def __post_init__(self) -> None:
        for name in ("tokens", "seq_len", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1; got {value!r}")
        if self.rate is not None and not (isinstance(self.rate, float) and 0 < self.rate < 1):
            raise ConfigError(f"rate must lie between 0 and 1 (both excluded); got {self.rate!r}")


@dataclass(frozen=True)
class DistillData:
    """Text to train on, and text that judges.

    Attributes:
        batches: one for each step.
        held_out: sequences that are not trained on.
        fingerprint: SHA-256 over all sequences.
        notes: sentences for the user.
    """

    batches: list[dict[str, Tensor]]
    held_out: list[dict[str, Tensor]]
    fingerprint: str
    notes: tuple[str, ...]


def distill_data(dataset: Any, tokenizer: Any, model_config: Any, config: DistillConfig) -> DistillData:
    """Draw `config.tokens` tokens to train on, and about a sixteenth as many that judge.

    Raises:
        CalibrationError: as in `fewbit.calibration.prepare`; or there is a single sequence.
    """
    if getattr(model_config, "is_encoder_decoder", False):
        raise ConfigError("distillation is for causal language models; this one is an encoder-decoder")
    text = model_config.get_text_config()
    wanted = -(-config.tokens // config.seq_len)
    judges = min(_MOST_HELD_OUT, max(2, wanted // _HELD_OUT_SHARE))
    found = prepare(
        dataset,
        tokenizer,
        num_samples=wanted + judges,
        seq_len=config.seq_len,
        seed=config.seed,
        max_positions=getattr(text, "max_position_embeddings", None),
        vocab_size=getattr(text, "vocab_size", None),
    )
    sequences, notes = found.batches, list(found.notes)
    if any(is_more_than_tokens(batch) for batch in sequences):
        raise CalibrationError(
            "distillation trains on token ids alone: leave out images, sound and other inputs"
        )
    if len(sequences) < 2:
        raise CalibrationError(
            "distillation needs sequences to learn from and others to judge by, but there is only one: give more text"
        )
    judges = min(judges, max(1, len(sequences) // 8))
    train, held_out = sequences[:-judges], sequences[-judges:]
    tokens = sum(batch["input_ids"].numel() for batch in train)
    steps = max(1, round(config.tokens / (tokens / len(train)) / config.batch_size))
    rounds = steps * config.batch_size / len(train)
    if rounds > 1.01:
        notes.append(
            f"the text has {tokens:,} tokens to train on: each was used {rounds:.1f} times; more text is better"
        )
    pad = getattr(tokenizer, "pad_token_id", None)
    turns = in_turns(len(train), steps, config.batch_size, config.seed)
    batches = [collate([train[i] for i in chosen], pad) for chosen in turns]
    return DistillData(batches, held_out, found.fingerprint, tuple(notes))


def settings_of(config: QuantConfig) -> DistillConfig:
    """The settings of a distillation that belongs to a quantization."""
    return DistillConfig(tokens=config.distill_tokens, seed=config.seed, dtype=config.dtype)


def text_of_run(run: Preparation) -> DistillData | None:
    """The text for the distillation that belongs to a quantization; None without one.

    Raises:
        ConfigError: distillation cannot follow this run.
        CalibrationError: as in `distill_data`.
    """
    config, source = run.ctx.config, run.source
    if not config.distill:
        return None
    if run.dataset is None:
        raise CalibrationError("distill trains on text, and no dataset was given")
    if run.dataset == "-":
        raise ConfigError(
            "distill reads the text a second time, which standard input cannot: save it to a file"
        )
    if getattr(source, "gguf", None) is not None:
        raise ConfigError(
            "distill needs the original as a transformers folder, not a .gguf file: quantize without it, then run "
            "`fewbit distill` against such a folder"
        )
    return distill_data(run.dataset, run.text_tokenizer, source.load_config(), settings_of(config))


def fingerprint_of_run(run: Preparation, data: DistillData | None) -> dict[str, str]:
    """What decides the bytes of a run's result, with the text of its distillation."""
    return {**run.fingerprint, **({"distillation text": data.fingerprint} if data else {})}


def in_turns(count: int, steps: int, per_step: int, seed: int) -> Iterator[list[int]]:
    """Draw `per_step` of `count` sequences for each step, every sequence once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    for _ in range(steps):
        while len(waiting) < per_step:
            waiting += torch.randperm(count, generator=generator).tolist()
        yield waiting[:per_step]
        del waiting[:per_step]
