"""Reports of runs that never were, with any number of blocks and experts, in the JSON form that page and card use."""

from __future__ import annotations

import math
import random
from typing import Any

from fewbit import QuantConfig
from fewbit.planning import block_of

DENSE = {
    "self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}  # fmt: skip
ATTENTION = {kind: shape for kind, shape in DENSE.items() if kind.startswith("self_attn")}
EXPERT = {"gate_proj": (768, 576), "up_proj": (768, 576), "down_proj": (576, 768)}


def layer(name: str, shape: tuple[int, int] = (576, 576), **changes: Any) -> dict[str, Any]:
    """One record, as `pipeline.layer_quantizer.LayerRecord` has it."""
    bits, group_size = changes.get("bits", 4), changes.get("group_size", 64)
    groups = 1 if group_size == -1 else math.ceil(shape[1] / group_size)
    return {
        "name": name,
        "block": block_of(name),
        "out_features": shape[0],
        "in_features": shape[1],
        "bits": bits,
        "group_size": group_size,
        "sym": True,
        "act_order": "group",
        "method": "gptq",
        "tokens": 4096,
        "masked": 0,
        "dropped": 0,
        "held_out": 512,
        "loss": 0.5,
        "output_error": 0.05,
        "true_error": None,
        "correction": None,
        "fallbacks": [],
        "stored_bytes": (shape[0] * shape[1] * bits + shape[0] * groups * (16 + bits)) // 8 + 4 * shape[1],
        "seconds": 0.2,
        **changes,
    }


def dense_layers(blocks: int = 30, seed: int = 0) -> list[dict[str, Any]]:
    """A Llama whose errors grow with depth, with true errors, and corrections."""
    chance = random.Random(seed)
    return [
        layer(
            f"model.layers.{block}.{kind}",
            shape,
            output_error=0.03 * chance.lognormvariate(0, 0.35),
            true_error=(0.04 + 0.004 * block) * chance.lognormvariate(0, 0.3),
            correction=chance.choice([0.0, 0.25, 0.5, 0.5, 0.75, 1.0]),
            seconds=shape[0] * shape[1] / 3e6,
        )
        for block in range(blocks)
        for kind, shape in DENSE.items()
    ]


def expert_layers(blocks: int = 4, experts: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """A mixture of experts whose tokens are spread unevenly."""
    chance = random.Random(seed)
    layers = []
    for block in range(blocks):
        for kind, shape in ATTENTION.items():
            layers.append(layer(f"model.layers.{block}.{kind}", shape))
        for expert in range(experts):
            tokens = 0 if chance.random() < 0.02 else int(512 * chance.lognormvariate(0, 1))
            fallen = [] if tokens else ["no calibration tokens", "diagonal-weighted round-to-nearest"]
            for kind, shape in EXPERT.items():
                name = f"model.layers.{block}.mlp.experts.{expert}.{kind}"
                error = 0.04 * chance.lognormvariate(0, 0.3) if tokens else None
                layers.append(layer(name, shape, tokens=tokens, output_error=error, fallbacks=fallen))
    return layers


def report(layers: list[dict[str, Any]] | None = None, **changes: Any) -> dict[str, Any]:
    """A whole report about `layers`, in plain JSON types."""
    layers = dense_layers() if layers is None else layers
    weights = sum(item["out_features"] * item["in_features"] for item in layers)
    stored = sum(item["stored_bytes"] for item in layers)
    rest = 56_660_000
    reason = "output embedding (quantized with lm_head=True, --lm-head)"
    return {
        "output": "out",
        "model": {
            "name": "SmolLM2-135M-Instruct",
            "hub_id": None,
            "architecture": "LlamaForCausalLM",
            "dtype": "bfloat16",
            "parameters": weights + rest // 2,
            "bytes": 2 * weights + rest,
            "file_bytes": 4 * weights + 2 * rest,
        },
        "config": QuantConfig(group_size=64, num_samples=8, seq_len=512, dtype="bfloat16").to_dict(),
        "fingerprint": {"fewbit version": "0.1.0", "config": "a" * 64, "calibration data": "b" * 64, "model": "c" * 64},
        "calibration": {"source": "wiki.train.txt", "sequences": 8, "tokens": 4096},
        "layers": layers,
        "skipped": [
            {"name": "lm_head", "shape": [49152, 576], "reason": reason},
        ],
        "bits_per_weight": 8 * stored / weights,
        "quantized_bytes": stored,
        "result_bytes": stored + rest,
        "fallbacks": {},
        "notes": [],
        "plan_notes": [],
        "seconds": 62.4,
        "seconds_by_phase": {},
        "phases": phases(),
        "peak_memory_bytes": 1_120_000_000,
        "resumed_layers": 0,
        "versions": {"fewbit": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.2"},
        "command": "fewbit quantize ./smollm2 --output out --dataset wiki.train.txt --group-size 64",
        "evaluation": None,
        **changes,
    }  # fmt: skip


def phases() -> list[dict[str, Any]]:
    """A walk with phases inside it."""
    rows = [
        ("calibration", None, 2.1, 2.1, 420, True), ("load", None, 1.4, 1.4, 900, True),
        ("walk", None, 57.0, 24.1, 1120, True), ("hessian", "walk", 21.3, 21.3, 1080, False),
        ("solve", "walk", 10.2, 10.2, 1090, False), ("pack", "walk", 0.9, 0.9, 1070, False),
        ("journal", "walk", 0.5, 0.5, 1060, False), ("write", None, 1.1, 1.1, 980, False),
    ]  # fmt: skip
    return [
        {
            "name": name,
            "parent": parent,
            "seconds": seconds,
            "own_seconds": own,
            "memory": {"bytes": megabytes * 10**6, "exact": exact},
            "device_memory": None,
        }
        for name, parent, seconds, own, megabytes, exact in rows
    ]


def evaluation() -> dict[str, Any]:
    """Results of ``--eval``."""
    common = {"windows": 64, "seq_len": 512, "tokens": 32704, "seconds": 20.0}
    return {
        "dataset": "wiki.test.txt",
        "base": {
            **common, "perplexity": 22.26, "nll": 3.1, "stderr": 0.51, "nll_stderr": 0.02,
            "kl": None, "kl_stderr": None, "top1_agreement": None,
        },
        "quantized": {
            **common, "perplexity": 24.90, "nll": 3.2, "stderr": 0.58, "nll_stderr": 0.02,
            "kl": 0.1271, "kl_stderr": 0.0042, "top1_agreement": 0.843,
        },
    }  # fmt: skip
