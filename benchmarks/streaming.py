"""Peak memory of a quantization as the model grows: it should not.

    python benchmarks/streaming.py --blocks 4 8 16 32

Llamas with random weights and more and more blocks, quantized from a folder (4 bits, default settings) in a
process of their own each. Printed: the weights' size on disk, the highest resident memory of the process, the
same less what the libraries alone take, and its ratio to the weights. With --in-memory the same models are
also quantized as modules that transformers loaded whole.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

SAMPLES, SEQ_LEN = 8, 128


def random_llama(
    folder: Path, blocks: int, hidden: int, intermediate: int, dtype: str = "bfloat16", **shape: Any
) -> int:
    """Write a Llama of random weights, one file per block, one block in memory; its weights' bytes.

    Args:
        shape: settings of `LlamaConfig` that differ from the ones below.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(1, hidden // 256),
        "vocab_size": 1024,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        **shape,
    }
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    config = LlamaConfig(**shape, num_hidden_layers=blocks, architectures=["LlamaForCausalLM"], dtype=dtype)
    config.save_pretrained(folder)
    with torch.device("meta"):
        one = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=1)).state_dict()
    total, place = 0, {}
    for number in range(blocks + 1):
        tensors = {}
        for name, empty in one.items():
            tied = name == "lm_head.weight" and shape["tie_word_embeddings"]
            if tied or (".layers.0." in name) != (number < blocks):
                continue
            tensor = torch.empty(empty.shape, dtype=getattr(torch, dtype))
            tensor.normal_(
                0, empty.shape[-1] ** -0.5, generator=generator
            ) if empty.ndim == 2 else tensor.fill_(1)
            tensors[name.replace(".layers.0.", f".layers.{number}.")] = tensor
            total += tensor.nbytes
        file = f"model-{number + 1:05d}-of-{blocks + 1:05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        place.update(dict.fromkeys(tensors, file))
    index = {"metadata": {"total_size": total}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def libraries() -> int:
    """Peak memory of a process that has only imported what a run needs."""
    from transformers.models.llama import modeling_llama  # noqa: F401

    import fewbit.quantization  # noqa: F401

    return peak()


def quantize(folder: Path, in_memory: bool) -> tuple[int, float]:
    """Peak memory in bytes and seconds of one run."""
    import torch
    from transformers import AutoModelForCausalLM

    import fewbit

    generator = torch.Generator().manual_seed(1)
    tokens = [{"input_ids": torch.randint(1024, (SEQ_LEN,), generator=generator)} for _ in range(SAMPLES)]
    config = fewbit.QuantConfig(num_samples=SAMPLES, seq_len=SEQ_LEN)
    start = time.perf_counter()
    if in_memory:
        fewbit.quantize(AutoModelForCausalLM.from_pretrained(folder), config, dataset=tokens)
    else:
        with tempfile.TemporaryDirectory(dir=folder.parent) as output:
            fewbit.quantize(folder, config, dataset=tokens, output=Path(output) / "out")
    return peak(), time.perf_counter() - start


def peak() -> int:
    """The highest resident memory of this process so far, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_child(function, *arguments):
    """Call in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--in-memory", action="store_true")
    parser.add_argument("--folder", type=Path, help="where to put the models for the time being")
    arguments = parser.parse_args()
    alone = in_child(libraries)
    print(f"libraries alone: {alone / 1e6:.0f} MB")
    print(
        f"{'blocks':>6} {'weights MB':>10} {'peak MB':>8} {'above libraries':>15} {'of weights':>10} {'seconds':>8}"
    )
    peaks = []
    for blocks in arguments.blocks:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
            folder = Path(place) / "model"
            weights = random_llama(folder, blocks, arguments.hidden, arguments.intermediate)
            for in_memory in (False, True) if arguments.in_memory else (False,):
                highest, seconds = in_child(quantize, folder, in_memory)
                above = highest - alone
                note = "  (whole model in memory)" if in_memory else ""
                print(
                    f"{blocks:6d} {weights / 1e6:10.0f} {highest / 1e6:8.0f} {above / 1e6:15.0f} "
                    f"{above / weights:10.2f} {seconds:8.1f}{note}",
                    flush=True,
                )
                if not in_memory:
                    peaks.append(above)
    print(
        f"weights × {arguments.blocks[-1] / arguments.blocks[0]:.0f}: peak above libraries × "
        f"{peaks[-1] / peaks[0]:.2f}"
    )


if __name__ == "__main__":
    main()
