"""Models of a given shape with random weights, written straight to disk: for speed, which does not depend on them.

    python benchmarks/random_models.py CONFIG_FOLDER OUT [--bits 4 --group-size 64]

With --bits a GPTQ checkpoint (all linear layers but the head), without a dense bfloat16 one. CONFIG_FOLDER holds a
config.json; `1b` is a built-in one: 1.1 billion weights, shaped like TinyLlama.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from layer_speed import Shape, random_weight
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from fewbit.checkpoint import layout

ONE_BILLION = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def config_of(name: str) -> Any:
    """The configuration in folder `name`, or the built-in one called 1b."""
    return LlamaConfig(**ONE_BILLION) if name == "1b" else AutoConfig.from_pretrained(name)


def write(config: Any, output: Path, bits: int | None, group_size: int) -> None:
    """A model of this configuration; the same random codes for all layers of one shape."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head and bits}
    tensors = {
        name: _random(tensor)
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[0] not in layers and name not in (model.all_tied_weights_keys or {})
    }
    packed: dict[tuple[int, int], dict[str, Tensor]] = {}
    for name, layer in layers.items():
        size = (layer.out_features, layer.in_features)
        if size not in packed:
            packed[size] = layout.pack(random_weight(Shape(*size, bits or 0, group_size)), "gptq")
        tensors |= {f"{name}.{part}": tensor.clone() for part, tensor in packed[size].items()}
    described = json.loads(config.to_json_string(use_diff=False))
    described |= {"dtype": "bfloat16", "architectures": [type(model).__name__]}
    described.pop("quantization_config", None)
    if bits:
        described["quantization_config"] = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group_size,
            "sym": True,
            "desc_act": False,
            "checkpoint_format": "gptq",
            "lm_head": False,
        }
    output.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    (output / "config.json").write_text(json.dumps(described, indent=1))


def _random(like: Tensor) -> Tensor:
    if like.ndim == 1:
        return torch.ones(like.shape, dtype=torch.bfloat16)
    return (torch.randn(like.shape) / like.shape[-1] ** 0.5).bfloat16()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("output", type=Path)
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 8))
    parser.add_argument("--group-size", type=int, default=64)
    arguments = parser.parse_args()
    write(config_of(arguments.config), arguments.output, arguments.bits, arguments.group_size)


if __name__ == "__main__":
    main()
