"""What `fewbit plan` says on this machine for models of 1, 8 and 70 billion weights: time, memory and disk.

    python benchmarks/plan_sizes.py
    python benchmarks/plan_sizes.py --into README.md     # writes the table between its marks

The shapes are those of Llama 3.2 1B, 3.1 8B and 3.1 70B. Their files have the right headers and no data (zeros
that take no space), because a plan measures the machine and not the weights. 4 bits, groups of 128.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

MODELS: dict[str, dict[str, Any]] = {
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "tie_word_embeddings": True,
    },
    "8B": {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80},
}
RUNS = {
    "`--fast`, 32 × 512 tokens": (True, 32, 512),
    "32 × 512 tokens": (False, 32, 512),
    "128 × 2048 tokens, the default": (False, 128, 2048),
}
BEGIN = "<!-- sizes: begin (written by benchmarks/plan_sizes.py) -->"
END = "<!-- sizes: end -->"


def write_model(folder: Path, shape: dict[str, Any]) -> None:
    """A model folder whose weights are zeros that take no space."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fewbit.checkpoint.safetensors_file import encode_header

    heads = {"num_attention_heads": shape["hidden_size"] // 128, "head_dim": 128, "num_key_value_heads": 8}
    settings = {"vocab_size": 128_256, "max_position_embeddings": 8192, **heads, **shape}
    config = LlamaConfig(**settings, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    header = encode_header((name, torch.bfloat16, tuple(tensor.shape)) for name, tensor in state.items())
    with open(folder / "model.safetensors", "wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(2 * tensor.numel() for tensor in state.values()))


def plans(name: str) -> list[str]:
    """The cells of one row: time of every run, peak memory with 32 × 512 tokens, and size of the result."""
    import fewbit
    from fewbit import formatting

    cells, facts = [], []
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), MODELS[name])
        for fast, count, length in RUNS.values():
            ids = [
                {"input_ids": [(row * 31 + i * 7919) % 128_000 for i in range(length)]}
                for row in range(count)
            ]
            settings = {"bits": 4, "group_size": 128, "num_samples": count, "seq_len": length, "fast": fast}
            found = fewbit.plan(folder, dataset=ids, **settings).summary()
            cells.append(formatting.duration(found["seconds"]))
            facts.append([formatting.size(found[key]) for key in ("peak_memory_bytes", "output_bytes")])
    return [name, *cells, *facts[1]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--into", type=Path, help="page with the marks of the table")
    parser.add_argument("--only", choices=list(MODELS), nargs="+", default=list(MODELS))
    arguments = parser.parse_args()
    rows = [plans(name) for name in arguments.only]
    head = ["", *RUNS, "peak memory, 32 × 512 tokens", "result"]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    print("\n".join(lines))
    if arguments.into:
        text = arguments.into.read_text(encoding="utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        arguments.into.write_text("\n".join([before + BEGIN, *lines, END + after]), encoding="utf-8")


if __name__ == "__main__":
    main()
