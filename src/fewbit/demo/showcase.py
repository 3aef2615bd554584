"""The demo on the model inside the package: quantize, load, evaluate, generate a sentence."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Method, QuantConfig
from ..evaluation import evaluate, windows
from ..hf.load import load
from ..modeling.source import open_source
from ..quantization import quantize
from . import calibration_text, evaluation_text, model_path

BITS = (4, 3, 2)
METHODS: dict[Method, str] = {"rtn": "round to nearest", "gptq": "GPTQ"}
SETTINGS: dict[str, Any] = {"group_size": 64, "seq_len": 256, "num_samples": 128}
EVALUATION_WINDOWS = 48
PROMPT = "It was a very fine morning, and Elizabeth"

# Progress within one step: quantizing, then measuring.
_QUANTIZED, _STEP = 40, 100


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: bits and method.
        bits_per_weight: stored bits per weight of the quantized layers, with scales and zero points.
        size_bytes: size of the weight file.
        perplexity: perplexity on the evaluation text.
        kl: KL divergence from the original in nats per token; None for the original.
        text: text that the model generates after `PROMPT`.
    """

    name: str
    bits_per_weight: float
    size_bytes: int
    perplexity: float
    kl: float | None
    text: str


class Showcase:
    """The demo: the original, then round-to-nearest and GPTQ at 4, 3 and 2 bits.

    Args:
        progress: callback ``progress(what, done, total)``.
    """

    def __init__(self, progress: Callable[[str, int, int], None]) -> None:
        self.progress = progress
        self.source = open_source(model_path())
        self.tokenizer = self.source.load_tokenizer()
        self.text: Tensor = windows(
            str(evaluation_text()), self.tokenizer, SETTINGS["seq_len"], EVALUATION_WINDOWS
        )
        self.base: Any = self.source.load_model("float32", torch.device("cpu"))
        self.done = 0
        self.total = _STEP * (1 + len(BITS) * len(METHODS))

    def run(self) -> list[Row]:
        rows = [self._original()]
        with tempfile.TemporaryDirectory() as folder:
            for bits in BITS:
                for method in METHODS:
                    rows.append(self._quantized(bits, method, Path(folder) / f"{method}{bits}"))
        self.progress("done", self.total, self.total)
        return rows

    def _original(self) -> Row:
        stored_bits = 8 * self.source.load_config().dtype.itemsize
        size = sum(path.stat().st_size for path in self.source.weight_files())
        return self._measure("original", stored_bits, size, self.base, None)

    def _quantized(self, bits: int, method: Method, output: Path) -> Row:
        name = f"{bits} bits, {METHODS[method]}"
        report = quantize(
            model_path(),
            QuantConfig(bits=bits, method=method, **SETTINGS),
            dataset=str(calibration_text()),
            output=output,
            device="cpu",
            progress=lambda _, done, total: self._report(name, _QUANTIZED * done / total),
        )
        size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
        return self._measure(name, report.bits_per_weight, size, load(output, dtype=torch.float32), self.base)

    def _measure(self, name: str, bits_per_weight: float, size: int, model: Any, base: Any) -> Row:
        def measured(done: int, total: int) -> None:
            self._report(name, _QUANTIZED + (_STEP - _QUANTIZED) * done / total)

        result = evaluate(model, self.text, against=base, progress=measured)
        self.done += _STEP
        return Row(name, bits_per_weight, size, result.perplexity, result.kl, self._sentence(model))

    def _sentence(self, model: Any) -> str:
        inputs = self.tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)
        torch.manual_seed(0)
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=40,
            do_sample=True,
            temperature=0.7,
        )
        return " ".join(self.tokenizer.decode(output[0], skip_special_tokens=True).split())

    def _report(self, name: str, part: float) -> None:
        self.progress(name, self.done + int(part), self.total)
