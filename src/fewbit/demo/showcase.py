"""The whole job on the model that ships with the package: quantize, load, measure, write a sentence."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import api
from ..config import QuantConfig
from ..evaluate import evaluate, windows
from ..runtime.load import load
from ..source import open_source
from . import calibration_text, evaluation_text, model_path

BITS = (4, 3, 2)
GROUP_SIZE = 64
SEQ_LEN = 256
CALIBRATION_SAMPLES = 96
EVALUATION_WINDOWS = 32
PROMPT = "It was a very fine morning, and Elizabeth"


@dataclass(frozen=True)
class Row:
    """One line of the table: the model's weight file, and what the quantization cost."""

    name: str
    bits_per_weight: float
    size_bytes: int
    perplexity: float
    kl: float | None
    text: str


def run(on_step: Callable[[int, int, str], None]) -> list[Row]:
    """Original, then round-to-nearest and GPTQ at 4, 3 and 2 bits.

    Args:
        on_step: called as ``on_step(done, total, what)`` in units of model evaluations.
    """
    torch.manual_seed(0)
    steps = [("original", "", 0)]
    steps += [(f"{bits} bits, {label}", method, bits) for bits in BITS for method, label in _METHODS.items()]
    source = open_source(model_path())
    tokenizer = source.load_tokenizer()
    text = windows(str(evaluation_text()), tokenizer, seq_len=SEQ_LEN, num_windows=EVALUATION_WINDOWS)
    base: Any = source.load_model("float32", torch.device("cpu"))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for done, (name, method, bits) in enumerate(steps):
            on_step(done, len(steps), name)
            if not bits:
                size = sum(path.stat().st_size for path in source.weight_files())
                stored = next(iter(torch.nn.ModuleList([base]).parameters()))
                rows.append(_measure(name, 16.0 if stored.is_floating_point() else 0.0, size, base, None, tokenizer, text))
                continue
            output = Path(folder) / f"{method}{bits}"
            config = QuantConfig(
                bits=bits, group_size=GROUP_SIZE, method=method, seq_len=SEQ_LEN, num_samples=CALIBRATION_SAMPLES
            )
            report = api.quantize(model_path(), config, dataset=str(calibration_text()), output=output, device="cpu")
            size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
            model = load(output, dtype=torch.float32)
            rows.append(_measure(name, report.bits_per_weight, size, model, base, tokenizer, text))
    on_step(len(steps), len(steps), "done")
    return rows


_METHODS = {"rtn": "round-to-nearest", "gptq": "GPTQ"}


def _measure(
    name: str, bits_per_weight: float, size: int, model: Any, base: Any | None, tokenizer: Any, text: Any
) -> Row:
    result = evaluate(model, text, against=base)
    return Row(name, bits_per_weight, size, result.perplexity, result.kl, _sentence(model, tokenizer))


def _sentence(model: Any, tokenizer: Any) -> str:
    inputs = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)
    output = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=48, do_sample=False
    )
    return " ".join(tokenizer.decode(output[0], skip_special_tokens=True).split())
