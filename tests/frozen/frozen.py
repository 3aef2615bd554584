"""The frozen reference of the restructuring: SHA-256 of what some 70 quantizations write.

python tests/frozen/frozen.py          # compare with hashes.json, exit 1 if any differs
python tests/frozen/frozen.py --write  # freeze
python tests/frozen/frozen.py -k moe   # cases whose name contains a text
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[1])]

from models import TEXT, save_tiny  # noqa: E402
from moe_models import save_tiny_moe  # noqa: E402

HASHES = Path(__file__).parent / "hashes.json"
WIDE = {"hidden_size": 160, "intermediate_size": 272}  # more than one block of 128 columns
SMALL = {"group_size": 16, "seq_len": 32, "num_samples": 6}


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name → (model, settings)."""
    result: dict[str, tuple[str, dict[str, Any]]] = {}
    orders, corrections = ("none", "group", "full"), ("auto", 0.5, 0.0)
    i = 0
    for bits in (2, 3, 4, 8):
        for sym in (True, False):
            for group_size in (16, 32, 20, -1):
                settings = {
                    "bits": bits,
                    "sym": sym,
                    "group_size": group_size,
                    "act_order": orders[i % 3],
                    "correction": corrections[(i // 2) % 3],
                    "seq_len": 32,
                    "num_samples": 6,
                }
                if i % 4 == 3:
                    settings["dtype"] = "bfloat16"
                result[f"wide-{bits}-{'sym' if sym else 'asym'}-{group_size}"] = ("wide", settings)
                i += 1
    for family in ("gpt2", "opt", "gpt_neox", "bloom", "falcon", "phi3", "t5"):
        result[family] = (family, {**SMALL, "bits": 3})
    for family in ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "qwen2_moe"):
        result[f"moe-{family}"] = (family, {**SMALL, "bits": 3})
        result[f"moe-{family}-fast"] = (family, {**SMALL, "bits": 2, "fast": True})
    result |= {
        "fast": ("wide", {**SMALL, "bits": 4, "fast": True}),
        "fast-bf16": ("wide", {**SMALL, "bits": 3, "fast": True, "dtype": "bfloat16"}),
        "rtn": ("wide", {**SMALL, "bits": 4, "method": "rtn"}),
        "lm_head": ("llama", {**SMALL, "bits": 4, "lm_head": True}),
        "v2": ("llama", {**SMALL, "bits": 4, "sym": False, "format": "gptq_v2"}),
        "batches": ("llama", {**SMALL, "bits": 3, "batch_size": 3}),
        "override": (
            "llama",
            {**SMALL, "override": {"mlp": {"bits": 8, "group_size": -1}, "q_proj": "skip"}},
        ),
        "ignore": ("gpt2", {**SMALL, "ignore": "attn"}),
        "damp": ("wide", {**SMALL, "bits": 2, "damp": 0.1}),
        "seed": ("wide", {**SMALL, "bits": 2, "seed": 5}),
        "one-sequence": ("llama", {**SMALL, "bits": 3, "num_samples": 1}),
        "tune-2": ("wide", {**SMALL, "bits": 2, "tune": True, "tune_steps": 6}),
        "tune-3-asym": ("llama", {**SMALL, "bits": 3, "sym": False, "tune": True, "tune_steps": 6}),
        "tune-moe": ("mixtral", {**SMALL, "bits": 2, "tune": True, "tune_steps": 4}),
        "target": ("llama", {**SMALL, "target_bits": 5.0, "group_size": 32}),
        "target-moe": ("mixtral", {**SMALL, "target_bits": 5.0, "group_size": 32}),
        "ranks-2": ("wide", {**SMALL, "bits": 3}),
        "ranks-2-moe": ("mixtral", {**SMALL, "bits": 3}),
        "ranks-2-tune": ("llama", {**SMALL, "bits": 2, "tune": True, "tune_steps": 4}),
        "in-memory": ("llama", {**SMALL, "bits": 3}),
    }
    return result


def source(name: str, folder: Path) -> Path:
    path = folder / f"model-{name}"
    if not path.exists():
        if name == "wide":
            save_tiny(path, "llama", **WIDE)
        elif name in ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "qwen2_moe"):
            save_tiny_moe(path, name)
        else:
            save_tiny(path, name)
    return path


def run(name: str, model: str, settings: dict[str, Any], folder: Path) -> dict[str, str]:
    import fewbit

    text, output = folder / "text.txt", folder / f"out-{name}"
    path = source(model, folder)
    if name == "in-memory":
        from transformers import AutoModelForCausalLM, AutoTokenizer

        loaded = AutoModelForCausalLM.from_pretrained(path)
        fewbit.quantize(
            loaded,
            fewbit.QuantConfig(**settings),
            dataset=text,
            tokenizer=AutoTokenizer.from_pretrained(path),
        )
        loaded.save_pretrained(output)
    elif name.startswith("ranks"):
        script = (
            "import sys, json, torch, fewbit, torch.distributed as dist; torch.set_num_threads(1);"
            "dist.init_process_group('gloo');"
            "s, m, t, o = sys.argv[1:]; fewbit.quantize(m, fewbit.QuantConfig(**json.loads(s)), dataset=t, output=o)"
        )
        start = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "--no-python",
        ]
        arguments = [sys.executable, "-c", script, json.dumps(settings), path, text, output]
        done = subprocess.run(
            [str(part) for part in [*start, *arguments]],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
    else:
        fewbit.quantize(path, fewbit.QuantConfig(**settings), dataset=text, output=output)
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    config.get("meta", {}).pop("refit", None)  # an option that ends here
    result = {"config": hashlib.sha256(json.dumps(config).encode()).hexdigest()}
    for shard in sorted(output.glob("*.safetensors")):
        result[shard.name] = hashlib.sha256(shard.read_bytes()).hexdigest()
    return result


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    parser.add_argument("-k", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    frozen = json.loads(HASHES.read_text()) if HASHES.exists() else {}
    wrong = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "text.txt").write_text(TEXT * 8)
        for name, (model, settings) in cases().items():
            if options.k not in name:
                continue
            found = run(name, model, settings, folder)
            if options.write:
                frozen[name] = found
                HASHES.write_text(json.dumps(frozen, indent=1) + "\n")
            elif frozen[name] != found:
                wrong += 1
                parts = [key for key in frozen[name] if found.get(key) != frozen[name][key]]
                print(f"{name}: differs in {', '.join(parts) or 'its files'}")
    print(f"{wrong} differ")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
