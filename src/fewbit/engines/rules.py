"""Whether an engine loads a checkpoint, finished or planned, and why not, in words.

"Loads" means: with the right weights. What no rule sees is whether an engine knows the architecture, and whether its
machine has the memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .. import formatting as words
from ..checkpoint.quantization_config import OUTPUT_EMBEDDINGS, LayerFormat
from ..checkpoint.reader import Checkpoint
from ..config import QuantConfig
from ..kernels.spec import KernelSpec
from ..mixed_precision.units import family, make_units
from ..planning import Plan, block_of
from .table import Reader


@dataclass(frozen=True)
class Contents:
    """What a checkpoint would ask of its reader.

    Attributes:
        base: bits, grid and order that its configuration states for layers which no rule touches.
        layers: (full name, layer) of everything quantized; a name comes again where it is not yet settled.
        plain: full names of the layers that stay as they are.
        by_gptqmodel: whether GPTQModel wrote it.
    """

    base: LayerFormat
    layers: Sequence[tuple[str, KernelSpec]]
    plain: Collection[str] = ()
    by_gptqmodel: bool = False


def of_checkpoint(checkpoint: Checkpoint, kinds: Mapping[str, str]) -> Contents:
    """What a finished checkpoint asks. `kinds`: layer → "linear" or "conv2d", as far as it is known."""
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
    """What the result of a plan would ask. With a budget, every choice that a layer may get is a layer."""
    choices = {layer.name: [(layer.settings.bits, layer.settings.group_size)] for layer in plan.layers}
    if config.target_bits is not None:
        for unit in make_units(plan, config):
            every = [(choice.bits, choice.group_size) for choice in unit.choices]
            choices |= dict.fromkeys((layer.name for layer in unit.layers), every)
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
        (config.bits, config.group_size) if config.target_bits is None else choices[layers[0][0]][0]
    )
    base = LayerFormat(bits, group_size, config.sym, config.act_order == "full")
    return Contents(base, layers, [item.name for item in plan.skipped])


def why_not(reader: Reader, contents: Contents) -> list[str]:
    """What keeps `reader` from loading such a checkpoint with the right weights; empty if nothing is known to."""
    layers = Counter(reason for _, spec in contents.layers for reason in _of_layer(reader, spec))
    reasons = [f"{words.plural(count, 'layer')}: {reason}" for reason, count in layers.items()]
    if reader.merges:
        reasons += _of_base(reader, contents)
        reasons += _of_merged(contents)
    if not reader.settings_per_layer:
        apart = {name for name, spec in contents.layers if spec.layer_format != contents.base}
        if apart:
            reasons.append(
                f"{words.plural(len(apart), 'layer')}: settings of their own, for example {min(apart)}"
            )
    v1 = any(spec.format == "gptq" and not spec.sym for _, spec in contents.layers)
    if v1 and not (reader.foreign_asymmetric or contents.by_gptqmodel):
        reasons.append("asymmetric grids in format gptq, which it reads from itself only (--format gptq_v2)")
    heads = [name for name, _ in contents.layers if name.rpartition(".")[2] in OUTPUT_EMBEDDINGS]
    if heads and not reader.lm_head:
        reasons.append(f"{heads[0]} is quantized, which it does not notice")
    plain = [name for name in contents.plain if name.endswith("proj") and block_of(name) != name]
    if plain and not reader.plain_projections:
        reasons.append(f"{words.plural(len(plain), 'projection')} not quantized, for example {min(plain)}")
    return reasons


def _of_layer(reader: Reader, spec: KernelSpec) -> Iterator[str]:
    if spec.kind != "linear":
        yield "a convolution"
    yield from _of_grid(reader, spec.bits, spec.sym)
    yield from _of_groups(reader, spec)
    yield from _of_order(reader, spec)
    looks_at_zeros = not (spec.act_order and reader.act_order == "4 bits, symmetric")
    if spec.format == "gptq_v2" and not reader.v2 and looks_at_zeros:
        yield "format gptq_v2, which it takes for gptq and misreads (--format gptq)"
    per_word = 32 if spec.bits == 3 else 32 // spec.bits  # three words hold 32 values of 3 bits
    for width, multiple, what in (
        (spec.out_features, reader.out_multiple, "outputs"),
        (spec.in_features, reader.in_multiple, "inputs"),
    ):
        if width % max(multiple, per_word):
            yield f"{width} {what}, no multiple of {max(multiple, per_word)}"


def _of_order(reader: Reader, spec: KernelSpec) -> Iterator[str]:
    if not spec.act_order:
        return
    if reader.act_order == "one group" and spec.group_size != -1:
        yield "groups in the order of activations; it takes none (--act-order group)"
    if reader.act_order == "4 bits, symmetric" and (spec.bits, spec.sym) != (4, True):
        yield "groups in the order of activations; it takes them at 4 bits, symmetric (--act-order group)"


def _of_grid(reader: Reader, bits: int, sym: bool) -> Iterator[str]:
    if bits not in reader.bits:
        yield f"{bits} bits; it takes {_listed(reader.bits)}"
    if not sym and not reader.asymmetric:
        yield "asymmetric grids; it takes symmetric ones (--sym)"


def _of_groups(reader: Reader, spec: KernelSpec) -> Iterator[str]:
    inputs = spec.in_features if spec.group_size == -1 else spec.group_size
    size = inputs if reader.row_is_group else spec.group_size
    if reader.group_sizes is not None and size not in reader.group_sizes:
        whole = " (the whole row)" if size != spec.group_size else ""
        yield f"group size {size}{whole}; it takes {_listed(reader.group_sizes)}"
    if spec.in_features % inputs and not reader.uneven:
        yield f"{spec.in_features} inputs, which groups of {inputs} do not divide"


def _of_base(reader: Reader, contents: Contents) -> Iterator[str]:
    """What is stated for layers without a rule is checked although there may be none."""
    used = {(spec.bits, spec.sym) for _, spec in contents.layers}
    if (contents.base.bits, contents.base.sym) not in used:
        for reason in _of_grid(reader, contents.base.bits, contents.base.sym):
            yield f"config.json says of layers without a rule: {reason}"


def _of_merged(contents: Contents) -> Iterator[str]:
    """Layers of which it makes one must be alike, or all of them stay as they are."""
    families: dict[str, dict[str, set[LayerFormat]]] = {}
    for name, spec in contents.layers:
        families.setdefault(family(name), {}).setdefault(name, set()).add(spec.layer_format)
    for name in contents.plain:
        if family(name) in families:
            families[family(name)].setdefault(name, set())
    apart = {name for name, members in families.items() if len(set(map(frozenset, members.values()))) > 1}
    if apart:
        yield (
            f"{len(apart)} times layers of which it makes one have different settings, for example in {min(apart)} "
            "(the same --override and --ignore for all of them)"
        )


def _listed(values: Sequence[int]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} and {last}" if first else last
