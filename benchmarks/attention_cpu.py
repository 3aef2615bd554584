"""Attention over a prompt on this CPU: fewbit's against torch's, milliseconds and their ratio in one run.

    python benchmarks/attention_cpu.py [--threads 2]

Causal, without a mask, as calibration and prompts use it. `hf/fuse.py` takes torch's where AMX makes it faster.
"""

from __future__ import annotations

import argparse

import torch
from solver_cpu import seconds
from torch.nn.functional import scaled_dot_product_attention

from fewbit import native

# (heads, key heads, tokens, size of a head): SmolLM2-135M, Llama 3.1 8B, Llama 2 7B.
SHAPES = ((9, 3, 128, 64), (9, 3, 512, 64), (32, 8, 512, 128), (32, 8, 2048, 128), (32, 32, 512, 64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.threads} threads, {', '.join(native.instruction_sets())}")
    for heads, key_heads, tokens, size in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            query, key, value = (
                torch.randn(1, n, tokens, size).to(dtype) for n in (heads, key_heads, key_heads)
            )

            def ours(q=query, k=key, v=value, scale=size**-0.5):
                return native.attention(q, k, v, scale, causal=True)

            def theirs(q=query, k=key, v=value):
                y = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                return y.transpose(1, 2).contiguous()

            fewbit, other = seconds(ours), seconds(theirs)
            print(
                f"{heads} heads ({key_heads} of keys) of {size}, {tokens} tokens, {dtype}: "
                f"fewbit {fewbit * 1e3:.2f} ms, torch {other * 1e3:.2f} ms, {fewbit / other:.2f} x"
            )


if __name__ == "__main__":
    main()
