"""Train tiny models of other families on Jane Austen, for benchmarks/accuracy.py.

    python benchmarks/tiny_families.py gpt2 opt gpt_neox
    python benchmarks/accuracy.py --model tiny/gpt2 --calibration benchmarks/data/austen.train.txt

Quantization differences show only in trained weights. Each family takes a few minutes on one thread and lands
in benchmarks/data/tiny/FAMILY with a tokenizer of 1024 entries (that of the demo model). About 1.6 million
parameters, a mixture of experts about 5 million; every width is a multiple of 64.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import prepare
import torch
from torch import Tensor, nn
from train_demo import SEQ_LEN, VOCABULARY, batches, perplexity, train_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

WIDTH, INNER, LAYERS, HEADS = 192, 512, 4, 6

_LLAMA_LIKE = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": SEQ_LEN,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA_LIKE, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "gpt2": {"n_embd": WIDTH, "n_inner": INNER, "n_layer": LAYERS, "n_head": HEADS, "n_positions": SEQ_LEN},
    "opt": {
        "hidden_size": WIDTH,
        "word_embed_proj_dim": WIDTH,
        "ffn_dim": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": SEQ_LEN,
    },
    "gpt_neox": _LLAMA_LIKE,
    "bloom": {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS},
    "falcon": {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS},
    "phi": _LLAMA_LIKE,
    "mixtral": {
        **_LLAMA_LIKE,
        "intermediate_size": INNER // 2,
        "num_key_value_heads": 3,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        **_LLAMA_LIKE,
        "num_key_value_heads": 3,
        "head_dim": WIDTH // HEADS,
        "moe_intermediate_size": INNER // 4,
        "num_experts": 16,
        "num_experts_per_tok": 4,
    },
}


def new_model(family: str, end_id: int) -> Any:
    """A model with random weights; no dropout, as the text is seen only a few times."""
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        bos_token_id=end_id,
        eos_token_id=end_id,
        pad_token_id=end_id,
        **FAMILIES[family],
    )
    for name in vars(config):
        if name.endswith(("dropout", "pdrop", "drop")) and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def train(model: nn.Module, ids: Tensor, held_out: Tensor, steps: int, batch_size: int, lr: float) -> None:
    """AdamW with a short warm-up and a cosine to zero, in bfloat16 autocast."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]  # experts are fused in three dimensions
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.95),
    )
    warm_up = max(1, steps // 20)
    source, started = batches(ids, batch_size), time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps)))
        batch = next(source)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            seconds = time.monotonic() - started
            print(f"{step:5d} {seconds:6.0f} s  held out {perplexity(model, held_out):.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="+", choices=list(FAMILIES))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if not prepare.ensure_austen():
        raise SystemExit("the Austen texts come from a Debian package, and there is no apt-get here")
    torch.set_num_threads(arguments.threads)
    texts = [path.read_text(encoding="utf-8") for path in (prepare.AUSTEN_TRAIN, prepare.AUSTEN_TEST)]
    tokenizer = train_tokenizer(texts[0])
    ids, test_ids = (torch.tensor(tokenizer(text, verbose=False).input_ids) for text in texts)
    held_out = test_ids[: 8 * SEQ_LEN].view(8, SEQ_LEN)
    for family in arguments.families:
        torch.manual_seed(0)
        model = new_model(family, tokenizer.eos_token_id)
        print(f"{family}: {model.num_parameters():,} parameters, {len(ids):,} tokens", flush=True)
        train(model, ids, held_out, arguments.steps, arguments.batch_size, arguments.lr)
        folder = prepare.DATA / "tiny" / family
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
