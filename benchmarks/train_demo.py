"""Train the demo model: a small Llama on Jane Austen's novels, from random weights, in under half an hour.

    python benchmarks/train_demo.py austen.train.txt austen.test.txt --output src/fewbit/demo

Writes ``model/`` (a transformers folder in bfloat16) and ``text/`` (a calibration text from the first file, an
evaluation text from the second) into the output folder. The files in the package were made with the defaults, on one
thread.

The text is public domain: six novels, as packaged in Debian's r-cran-janeaustenr 1.0.0 (from Project
Gutenberg), one paragraph per line, cut into documents of which every seventh went into the test file.
The script itself needs torch ≥ 2.9 (`torch.optim.Muon`).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
VOCABULARY = 1024
SEQ_LEN = 512
EXCERPT_BYTES = 200_000


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be encoded, and encoding adds no special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, model_max_length=SEQ_LEN
    )


def new_model(end_id: int) -> LlamaForCausalLM:
    """1.8 million parameters; every width is a multiple of 32, so that all formats and kernels apply."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=SEQ_LEN,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_id,
        pad_token_id=end_id,
    )
    return LlamaForCausalLM(config)


def batches(ids: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Endless batches (batch_size, SEQ_LEN); every epoch cuts the text at another offset."""
    while True:
        start = int(torch.randint(SEQ_LEN, (1,)))
        count = (len(ids) - start) // SEQ_LEN
        windows = ids[start : start + count * SEQ_LEN].view(count, SEQ_LEN)
        order = torch.randperm(count)
        for first in range(0, count, batch_size):
            yield windows[order[first : first + batch_size]]


def train(
    model: LlamaForCausalLM, ids: Tensor, held_out: Tensor, steps: int, batch_size: int, lr: float
) -> None:
    """Muon for the matrices, AdamW for embedding and norms; short warm-up, then a cosine to zero."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers: tuple[torch.optim.Optimizer, ...] = (
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.01),
    )
    warm_up = max(1, steps // 20)
    source, started = batches(ids, batch_size), time.monotonic()
    for step in range(steps):
        factor = min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
        batch = next(source)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            seconds, score = time.monotonic() - started, perplexity(model, held_out)
            print(f"{step:5d} {seconds:6.0f} s  loss {loss.item():.3f}  held out {score:.2f}", flush=True)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, windows: Tensor) -> float:
    """On windows (count, SEQ_LEN), for watching the training; `fewbit.evaluation` has the exact protocol."""
    with torch.autocast("cpu", torch.bfloat16):
        losses = [model(w[None], labels=w[None], use_cache=False).loss.item() for w in windows]
    return math.exp(sum(losses) / len(losses))


def excerpt(text: str, start: float = 0.0) -> str:
    """Whole paragraphs, at most EXCERPT_BYTES, from the given fraction of the text on."""
    text = text[int(start * len(text)) :]
    piece = text.encode()[:EXCERPT_BYTES].decode(errors="ignore")
    first = piece.index("\n") + 1 if start else 0
    return piece[first : piece.rindex("\n") + 1]


def main() -> None:
    """Read the two texts, train, write the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("train_text", type=Path)
    parser.add_argument("test_text", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    train_text, test_text = (
        path.read_text(encoding="utf-8") for path in (options.train_text, options.test_text)
    )
    tokenizer = train_tokenizer(train_text)
    ids, test_ids = (
        torch.tensor(tokenizer(text, verbose=False).input_ids) for text in (train_text, test_text)
    )
    model = new_model(tokenizer.eos_token_id)
    print(f"{model.num_parameters():,} parameters, {len(ids):,} tokens", flush=True)
    train(
        model, ids, test_ids[: 16 * SEQ_LEN].view(16, SEQ_LEN), options.steps, options.batch_size, options.lr
    )

    model.to(torch.bfloat16).save_pretrained(options.output / "model")
    tokenizer.save_pretrained(options.output / "model")
    (options.output / "text").mkdir(exist_ok=True)
    (options.output / "text/calibration.txt").write_text(excerpt(train_text, 0.5), encoding="utf-8")
    (options.output / "text/evaluation.txt").write_text(excerpt(test_text), encoding="utf-8")


if __name__ == "__main__":
    main()
