"""Paths of the demo model and its texts inside the package.

The model is a Llama of 1.8 million parameters trained on Jane Austen's novels by benchmarks/train_demo.py. README.md
in this folder states origin and license.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def model_path() -> Path:
    """A transformers folder: config, bfloat16 weights, tokenizer."""
    return _file("model")


def calibration_text() -> Path:
    """About 200 KB of the text that the model was trained on."""
    return _file("text", "calibration.txt")


def evaluation_text() -> Path:
    """About 200 KB of text that the model has never seen."""
    return _file("text", "evaluation.txt")


def _file(*parts: str) -> Path:
    return Path(str(resources.files(__name__).joinpath(*parts)))
