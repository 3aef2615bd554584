"""Whether an engine loads a checkpoint, finished or planned, and why not, in words.

"Loads" means: with the right weights. What no rule sees is whether an engine knows the architecture, and whether its
machine has the memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..budget.units import family, make_units
from ..checkpoint.quantization import LayerFormat
from ..checkpoint.reader import Checkpoint
from ..config import QuantConfig
from ..plan import Plan
from ..report import words
from ..runtime.kernel import KernelSpec
from .table import Reader


@dataclass(frozen=True)
class Contents:
    """What a checkpoint would ask of its reader.

    Attributes:
        base: bits, grid and order that its configuration states for layers which no rule touches.
        layers: (full name, layer) of everything quantized; a name comes again where it is not yet settled.
        plain: full names of the layers that stay as they are.
    """

    base: LayerFormat
    layers: Sequence[tuple[str, KernelSpec]]
    plain: Collection[str] = ()


def of_checkpoint(checkpoint: Checkpoint, kinds: Mapping[str, str]) -> Contents:
    """What a finished checkpoint asks. `kinds`: layer → "linear" or "conv2d", as far as it is known."""
    layers = [
        (
            name,
            KernelSpec(
                bits=spec.bits,
                group_size=spec.group_size,
                sym=spec.sym,
                act_order=spec.desc_act,
                in_features=spec.in_features,
                out_features=spec.out_features,
                format=spec.format,
                kind=kinds.get(name, "linear"),
            ),
        )
        for name, spec in checkpoint.layers.items()
    ]
    weights = [name.removesuffix(".weight") for name in checkpoint.tensors if name.endswith(".weight")]
    return Contents(checkpoint.settings.base, layers, weights)


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
            KernelSpec(
                bits=bits,
                group_size=group_size,
                sym=layer.settings.sym,
                act_order=layer.settings.act_order == "full",
                in_features=layer.in_features,
                out_features=layer.out_features,
                format=config.format,
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
    settings = {(spec.bits, spec.sym) for _, spec in contents.layers}
    if reader.merges and (contents.base.bits, contents.base.sym) not in settings:
        stated = _of_grid(reader, contents.base.bits, contents.base.sym)
        reasons += [f"config.json says of layers without a rule: {reason}" for reason in stated]
    if reader.merges:
        reasons += _of_merged(contents)
    return reasons


def _of_layer(reader: Reader, spec: KernelSpec) -> Iterator[str]:
    if spec.kind != "linear":
        yield "a convolution"
    yield from _of_grid(reader, spec.bits, spec.sym)
    yield from _of_groups(reader, spec)
    if spec.act_order and spec.group_size != -1 and reader.act_order == "one group":
        yield "groups in the order of activations, which it does not take (--act-order group or none)"
    if spec.format == "gptq_v2" and reader.v2 == "nothing":
        yield "format gptq_v2, which it takes for gptq and misreads (fewbit convert --format gptq)"
    multiple = max(reader.out_multiple, 32 if spec.bits == 3 else 32 // spec.bits)
    if spec.out_features % multiple:
        yield f"{spec.out_features} outputs, no multiple of {multiple}"
    if spec.in_features % reader.in_multiple:
        yield f"{spec.in_features} inputs, no multiple of {reader.in_multiple}"


def _of_grid(reader: Reader, bits: int, sym: bool) -> Iterator[str]:
    if bits not in reader.bits:
        yield f"{bits} bits; it takes {_listed(reader.bits)}"
    if not sym and not reader.asymmetric:
        yield "asymmetric grids; it takes symmetric ones (--sym)"


def _of_groups(reader: Reader, spec: KernelSpec) -> Iterator[str]:
    size = spec.in_features if spec.group_size == -1 else spec.group_size
    if reader.group_sizes is not None and spec.group_size not in reader.group_sizes:
        yield f"group size {spec.group_size}; it takes {_listed(reader.group_sizes)}"
    if reader.powers_of_two and (size < 16 or size & (size - 1)):
        yield f"groups of {size} inputs; it takes powers of two from 16 on"
    if spec.in_features % size and not reader.uneven:
        yield f"{spec.in_features} inputs, which groups of {size} do not divide"


def _of_merged(contents: Contents) -> Iterator[str]:
    """Layers of which it makes one must be alike, or all of them stay as they are."""
    families: dict[str, dict[str, set[tuple[int, int, bool, bool]]]] = {}
    for name, spec in contents.layers:
        settings = families.setdefault(family(name), {}).setdefault(name, set())
        settings.add((spec.bits, spec.group_size, spec.sym, spec.act_order))
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
