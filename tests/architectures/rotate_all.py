"""Which causal language models of transformers can be rotated.

    python tests/architectures/rotate_all.py docs/rotation.md

Every type becomes a tiny random model. Its logits before and after the rotation of its residual stream are compared. A
model that is rotated and gives other logits ends the script with an error. The lists go between the marks of the page.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from judge import UnavailableError, _build, _inputs, _logits
from tiny_configs import model_pairs

from fewbit.errors import ModelError
from fewbit.modeling.experts import unfuse
from fewbit.modeling.source import open_source
from fewbit.pipeline.streaming import StreamedWeights
from fewbit.profiling import Profiler

BEGIN, END = (
    "<!-- architectures: begin (written by tests/architectures/rotate_all.py) -->",
    "<!-- architectures: end -->",
)
TOLERANCE = 1e-5  # of the norm of the logits
CPU = torch.device("cpu")
KINDS = {
    "no layer's output is added": "a norm stands between a layer and the stream, as in Gemma 2 and OLMo 2",
    "is no RMSNorm": "LayerNorm",
    "looks at values": "code that looks at values of tensors",
    "no tensor of its own": "experts that are merged in the files",
}


def with_uneven_norms(model_type: str, folder: Path) -> torch.nn.Module:
    """A tiny model in `folder` whose norms have weights that differ.

    Raises:
        UnavailableError: transformers cannot build or run it.
    """
    model, *_ = _build("CAUSAL_LM", model_type, folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return model


def rotated(folder: Path, seed: int = 0) -> tuple[torch.nn.Module, StreamedWeights]:
    """The rotated model, in memory.

    Raises:
        ModelError: it cannot be rotated.
    """
    model, files = open_source(folder).build_model("float32")
    unfuse(model)
    weights = StreamedWeights(model, files, CPU, Profiler(CPU))
    weights.rotate(seed)
    weights.load_all()
    return model, weights


def difference(original: torch.nn.Module, model: torch.nn.Module) -> float:
    """Of the logits, relative to their norm."""
    inputs = _inputs(original, 0)
    expected = _logits(original, inputs)
    return float((_logits(model, inputs) - expected).norm() / expected.norm())


def main() -> None:
    logging.disable(logging.WARNING)
    right, wrong, reasons = [], [], Counter()
    for task, model_type in model_pairs():
        if task != "CAUSAL_LM":
            continue
        with TemporaryDirectory() as folder:
            try:
                original = with_uneven_norms(model_type, Path(folder))
                model, _ = rotated(Path(folder))
            except UnavailableError:
                continue
            except ModelError as error:
                kind = next((name for part, name in KINDS.items() if part in str(error)), "others")
                reasons[kind] += 1
                continue
            same = difference(original, model) < TOLERANCE
            (right if same else wrong).append(model_type)
    lines = [
        f"Rotated, with the same logits ({len(right)}): {', '.join(f'`{name}`' for name in right)}.",
        "",
        f"Refused ({sum(reasons.values())}), by reason: {'; '.join(f'{n} ({c})' for n, c in reasons.most_common())}.",
    ]
    print("\n".join(lines))
    if wrong:
        raise SystemExit(f"rotated, with other logits: {wrong}")
    for page in sys.argv[1:]:
        text = Path(page).read_text(encoding="utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        Path(page).write_text("\n".join([before + BEGIN, *lines, END + after]), encoding="utf-8")


if __name__ == "__main__":
    main()
