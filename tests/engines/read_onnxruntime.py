"""ONNX Runtime GenAI converts checkpoints for the CPU and runs them: see protocol.py.

Environment: ``python -m venv V``, then
``V/bin/pip install torch==2.13.0 onnxruntime-genai==0.18.0 onnx onnx-ir transformers``.
The embeddings stay as they are and the arithmetic is float32 (accuracy_level=1), so that only the reading is measured.
"""

from __future__ import annotations

import tempfile

import onnxruntime_genai as genai
from onnxruntime_genai.models.builder import create_model, parse_extra_options
from protocol import answer

OPTIONS = ["nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather", "accuracy_level=1"]


def read(checkpoint: str, tokens: list[int]) -> list[list[float]]:
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        job = ("", checkpoint, folder, "int4", "cpu", cache)
        create_model(*job, **parse_extra_options(*job, OPTIONS))
        model = genai.Model(folder)
        settings = genai.GeneratorParams(model)
        settings.set_search_options(max_length=len(tokens) + 1)
        generator = genai.Generator(model, settings)
        generator.append_tokens(tokens)
        return generator.get_output("logits")[0].astype("float32").tolist()


if __name__ == "__main__":
    answer(read, "onnxruntime-genai", "onnxruntime", "transformers", "torch")
