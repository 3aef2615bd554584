"""The cells of the matrix: what is quantized, how, and what fewbit itself reads in the result.

Every cell is a checkpoint of the same small Llama. Its widths, 384 and 640, are multiples of 128, as engines want
them, and no powers of two. Its weights are random; its logits have a standard deviation of about 2, so that a
engine that takes one zero point for another is off by far more than rounding.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fewbit
from fewbit import demo
from fewbit.config import ACT_ORDERS, BITS, FORMATS

GROUPS = (-1, 32, 64, 128)
VOCABULARY = 1024


@dataclass(frozen=True)
class Cell:
    """One way to quantize. `variation` names what `others` say beyond the five columns of the matrix."""

    format: str = "gptq"
    bits: int = 4
    group_size: int = 128
    sym: bool = True
    act_order: str = "group"
    variation: str = ""
    others: tuple[tuple[str, Any], ...] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        """As a folder is called."""
        grid = "sym" if self.sym else "asym"
        parts = [self.format, f"{self.bits}bit", f"g{self.group_size}", grid, self.act_order, self.variation]
        return "-".join(part for part in parts if part)

    @property
    def settings(self) -> dict[str, Any]:
        """What the record says of this cell."""
        return {key: value for key, value in asdict(self).items() if key != "others"}

    def config(self) -> fewbit.QuantConfig:
        """fewbit's options."""
        settings = {key: value for key, value in self.settings.items() if key != "variation"}
        return fewbit.QuantConfig(**settings, **dict(self.others), fast=True, damp=0.01)


def _override(**patterns: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return (("override", {f"{name}$": settings for name, settings in patterns.items()}),)


# act_order "none" leaves the same kind of file as "group".
MATRIX = tuple(
    Cell(fmt, bits, group_size, sym, order)
    for fmt in FORMATS
    for bits in BITS
    for group_size in GROUPS
    for sym in (True, False)
    for order in ACT_ORDERS
    if order != "none"
)
VARIATIONS = (
    Cell(variation="uneven groups", group_size=256),
    Cell(variation="narrow groups", group_size=16),
    Cell(variation="8-bit down_proj", others=_override(down_proj={"bits": 8})),
    Cell(variation="groups of 32 in down_proj", others=_override(down_proj={"group_size": 32})),
    Cell(variation="groups of 32 in q_proj", others=_override(q_proj={"group_size": 32})),
    Cell(variation="unquantized o_proj", others=(("ignore", (r"o_proj$",)),)),
    Cell(variation="quantized lm_head", others=(("lm_head", True),)),
)
CELLS = MATRIX + VARIATIONS


def tokens(count: int = 24) -> list[int]:
    """Token ids that every engine gets."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()


def build_model() -> LlamaForCausalLM:
    """The original, in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=384,
        intermediate_size=640,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        initializer_range=0.1,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1000.0,
        },  # not the default: a engine must find it
        bos_token_id=1,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def write_model(folder: Path) -> None:
    """The original, with the tokenizer of the demo, which ONNX Runtime GenAI wants to have."""
    build_model().save_pretrained(folder)
    for file in demo.model_path().glob("*token*"):
        shutil.copy(file, folder)


def write_checkpoint(model: Path, cell: Cell, folder: Path) -> None:
    """Quantize `model` as `cell` says."""
    generator = torch.Generator().manual_seed(2)
    batches = [{"input_ids": torch.randint(3, VOCABULARY, (64,), generator=generator)} for _ in range(8)]
    fewbit.quantize(model, cell.config(), dataset=batches, output=folder, device="cpu")


def expected(folder: Path) -> torch.Tensor:
    """fewbit's own logarithms of probabilities (positions, vocabulary), by its exact kernel in float32."""
    model = fewbit.load(folder, device="cpu", dtype="float32", kernel="reference")
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens()])).logits[0].log_softmax(-1)
