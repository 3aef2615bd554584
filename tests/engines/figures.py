"""How far an engine's logits are from fewbit's, on a real model: the tables of docs/engines.md.

    python tests/engines/figures.py --engine llama.cpp=V/bin/python --model benchmarks/data/smollm2 \\
        --text benchmarks/data/wiki.test.txt --calibration benchmarks/data/wiki.train.txt

quantizes the model in several ways, exports each result and lets the engine compute the logits of a text. fewbit's own
are those of its exact kernel in float32. For llama.cpp there is a second line: the same file with all its weights in
float32, so that what is left is not rounding of the inputs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from float32_gguf import as_float32
from measure import ask
from transformers import AutoTokenizer

import fewbit
from fewbit.engines import engine as engine_row

TOKENS, NEW_TOKENS = 384, 32
# bits, group size, sym
SETTINGS = {
    "llama.cpp": [(4, 32, True), (4, 64, False), (8, 64, True), (3, 64, True), (2, 32, True)],
    "mlx-lm": [(4, 64, True), (8, 64, True), (3, 64, True), (2, 32, True)],
}


def rows(name: str, python: str, model: Path, text: Path, calibration: Path, work: Path) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield "| bits | group | grid | weights | largest difference | mean | KL | same first choice | same greedy text |"
    yield "|---" * 9 + "|"
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text.read_text(encoding="utf-8")[:20_000])["input_ids"][:TOKENS]
    for bits, group_size, sym in SETTINGS[name]:
        folder = work / f"{bits}-{group_size}-{sym}"
        config = fewbit.QuantConfig(
            bits=bits, group_size=group_size, sym=sym, fast=True, num_samples=4, seq_len=256, dtype="float32"
        )
        fewbit.quantize(model, config, dataset=calibration, output=folder, device="cpu")
        target = engine_row(name).target
        files = {"as exported": folder.with_name(folder.name + (".gguf" if target == "gguf" else "-out"))}
        fewbit.export(folder, files["as exported"], target)
        if target == "gguf":
            files["in float32"] = as_float32(files["as exported"], work / "float32.gguf")
        ask(name, python, list(files.values()), work, ids, ["--save"])
        _, texts = ask(name, python, list(files.values()), work, ids[:32], ["--generate"])
        truth, greedy = own(folder, ids)
        grid = "symmetric" if sym else "asymmetric"
        for (what, file), written in zip(files.items(), texts, strict=True):
            found = torch.from_numpy(np.load(f"{file}.npy")).log_softmax(-1)
            same = next(
                (i for i, (a, b) in enumerate(zip(written["logits"][0], greedy, strict=False)) if a != b),
                NEW_TOKENS,
            )
            yield (
                f"| {bits} | {group_size} | {grid} | {what} | {float((found - truth).abs().max()):.2g} "
                f"| {float((found - truth).abs().mean()):.2g} "
                f"| {float((truth.exp() * (truth - found)).sum(-1).mean()):.2g} "
                f"| {float((found.argmax(-1) == truth.argmax(-1)).float().mean()):.1%} | {same} of {NEW_TOKENS} |"
            )


def own(folder: Path, ids: list[int]) -> tuple[torch.Tensor, list[int]]:
    """fewbit's logarithms of probabilities, and its greedy continuation of the first 32 tokens."""
    model: Any = fewbit.load(folder, device="cpu", dtype="float32", kernel="reference")
    with torch.no_grad():
        truth = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        start = torch.tensor([ids[:32]])
        continued = model.generate(
            start, attention_mask=torch.ones_like(start), max_new_tokens=NEW_TOKENS, do_sample=False
        )
    return truth, continued[0, 32:].tolist()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", required=True, metavar="ENGINE=PYTHON")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    given = parser.parse_args()
    name, _, python = given.engine.partition("=")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        for line in rows(name, python, given.model, given.text, given.calibration, Path(work)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
