"""The ``quantization_config`` of a checkpoint: `build` writes it, `parse` reads it from any tool.

Per-layer differences are stored under ``dynamic`` the way GPTQModel, vLLM and SGLang read it: regular
expression → settings, tried in order with `re.match` on the full module name, the first match decides.
A key that begins with ``-:`` names layers that are not quantized; ``+:`` or nothing, an override.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import regex

from .. import __version__
from ..config import BITS, FORMATS, LayerSettings, QuantConfig
from ..errors import CheckpointError
from ..input_groups import INPUT_GROUPS
from .safe_io import shown

# The key `lm_head` speaks for these; they get a rule only where their settings differ.
OUTPUT_EMBEDDINGS = ("lm_head", "embed_out")

# Where a pattern ends: after a module's name, be it alone or with the name of a tensor.
_END = r"(?:\.|$)"

_KNOWN_KEYS = {
    "quant_method",
    "bits",
    "group_size",
    "sym",
    "desc_act",
    "checkpoint_format",
    "format",
    "is_marlin_format",
    "lm_head",
    "dynamic",
    "modules_in_block_to_quantize",
    "meta",
}


# Limits for regular expressions from untrusted files.
_PATTERN_SECONDS = 1.0
_MOST_REPETITIONS = 1000
_LONGEST_PATTERN = 1_000_000


class LayerFormat(NamedTuple):
    """How the tensors of one layer are to be read.

    Attributes:
        bits: Bits of a code.
        group_size: Inputs that share a scale; -1 for one group per row.
        sym: True if every zero point is 2^(bits-1).
        desc_act: True if groups are not consecutive inputs.
    """

    bits: int
    group_size: int
    sym: bool
    desc_act: bool

    @classmethod
    def of(cls, settings: LayerSettings) -> LayerFormat:
        ordered = settings.act_order == "full" and settings.group_size != -1  # one group has no order
        return cls(settings.bits, settings.group_size, settings.sym, ordered)


@dataclass(frozen=True)
class CheckpointSettings:
    """A parsed ``quantization_config`` from any writer.

    Attributes:
        bits: Bits of layers without a rule.
        group_size: Group size of layers without a rule.
        sym: Symmetry of layers without a rule. An absent key reads as False: honoring the stored zero points is right
            for both.
        desc_act: Order of inputs in layers without a rule.
        format: "gptq" (v1) or "gptq_v2".
        lm_head: True if the output embedding is quantized.
        dynamic: Rules in order, as in the module docstring.
        modules_in_block: Endings of the quantized layers' names, if the writer lists them.
        quantizers: The tools that made the checkpoint, as ``name:version``; empty if it does not say.
        assumed: Keys that were absent and read as their default.
        extra: Every other key, unchanged.
    """

    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    format: str
    lm_head: bool = False
    dynamic: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    modules_in_block: tuple[str, ...] | None = None
    quantizers: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> LayerFormat:
        return LayerFormat(self.bits, self.group_size, self.sym, self.desc_act)

    def layer(self, name: str) -> LayerFormat | None:
        """Find the format of the layer `name`; None if the configuration leaves it unquantized.

        Raises:
            CheckpointError: an expression in `dynamic` takes forever.
        """
        base = self.base
        is_output = name.rpartition(".")[2] in OUTPUT_EMBEDDINGS
        for pattern, override in self.dynamic.items():
            if _matches(pattern.removeprefix("-:").removeprefix("+:"), name):
                if pattern.startswith("-:") or (is_output and not self.lm_head):
                    return None
                return base._replace(**{key: override[key] for key in LayerFormat._fields if key in override})
        if is_output:
            return base if self.lm_head else None
        if self.modules_in_block is not None and not f".{name}".endswith(
            tuple(f".{ending}" for ending in self.modules_in_block)
        ):
            return None
        return base


def build(
    config: QuantConfig, layers: Mapping[str, LayerSettings], skipped: Iterable[str], meta: Mapping[str, Any]
) -> dict[str, Any]:
    """Build the ``quantization_config`` of a finished checkpoint: plain JSON types, in a fixed order.

    Args:
        config: gives the defaults that `layers` are compared with.
        layers: settings of every quantized layer under its full module name.
        skipped: full names of the linear layers that stay as they are.
        meta: goes under ``meta`` beside the quantizer; must hold no texts, paths or times.
    """
    base = LayerFormat.of(config.defaults)
    result: dict[str, Any] = {
        "quant_method": "gptq",
        **base._asdict(),
        "damp_percent": config.damp,
        "true_sequential": True,
        "checkpoint_format": config.format,
        "format": config.format,
        "lm_head": any(name.rpartition(".")[2] in OUTPUT_EMBEDDINGS for name in layers),
    }
    rules: dict[str, _Rule] = {}
    for name, settings in layers.items():
        mine = LayerFormat.of(settings)._asdict()
        rules[name] = tuple((key, value) for key, value in mine.items() if value != getattr(base, key))
    for name in skipped:
        if name.rpartition(".")[2] not in OUTPUT_EMBEDDINGS:
            rules[name] = None
    dynamic = _dynamic(rules)
    if dynamic:
        result["dynamic"] = dynamic
    result["meta"] = {"quantizer": [f"fewbit:{__version__}"], **meta}
    return result


def parse(
    values: Mapping[str, Any], where: str = "quantization_config", default_method: str | None = None
) -> CheckpointSettings:
    """Read a ``quantization_config`` as AutoGPTQ, optimum, GPTQModel, auto-round or fewbit write it.

    Args:
        values: the JSON object.
        where: the file, for messages.
        default_method: taken where ``quant_method`` is absent (AutoGPTQ's own file had none).

    Raises:
        CheckpointError: not GPTQ, a layout that is not the GPTQ one, or a value that cannot be meant.
    """
    method = values.get("quant_method", values.get("method", default_method))
    if method is None:
        raise CheckpointError(f"{where} has no quant_method; fewbit reads checkpoints that say 'gptq'")
    if str(method).lower() != "gptq":
        raise CheckpointError(
            f"{where} says quant_method {shown(method)}; fewbit reads 'gptq' only. "
            "Load this checkpoint with the tool that made it, or quantize the original model with fewbit."
        )
    assumed = [key for key in ("sym", "desc_act") if values.get(key) is None]
    dynamic = values.get("dynamic") or {}
    _check_dynamic(dynamic, where)
    return CheckpointSettings(
        bits=_bits(values.get("bits"), where),
        group_size=_group_size(values.get("group_size"), where),
        sym=_boolean(values, "sym", where),
        desc_act=_boolean(values, "desc_act", where),
        format=_format(values, where, assumed),
        lm_head=_boolean(values, "lm_head", where),
        dynamic=dynamic,
        modules_in_block=_modules_in_block(values.get("modules_in_block_to_quantize"), where),
        quantizers=_quantizers(values.get("meta")),
        assumed=tuple(assumed),
        extra={key: value for key, value in values.items() if key not in _KNOWN_KEYS},
    )


# Building `dynamic`. What a rule says of a layer: differences from the defaults, or None for "not quantized".
_Rule = tuple[tuple[str, Any], ...] | None
_Indices = tuple[int, ...]


def _dynamic(rules: Mapping[str, _Rule]) -> dict[str, dict[str, Any]]:
    """Build as few patterns as possible, each matching exactly its layers.

    Names that differ only in their indices have one shape; names that differ only in their last part have one stem.
    """
    shapes: dict[tuple[str | None, ...], dict[_Indices, _Rule]] = {}
    for name, rule in rules.items():
        parts = name.split(".")
        shape = tuple(None if part.isdigit() else part for part in parts)
        indices = tuple(int(part) for part in parts if part.isdigit())
        shapes.setdefault(shape, {})[indices] = rule

    endings: dict[tuple[str, _Rule], list[str]] = {}
    all_endings: dict[str, set[str]] = {}
    for shape, members in shapes.items():
        for rule in dict.fromkeys(members.values()):
            matched = {indices for indices, its_rule in members.items() if its_rule == rule}
            for numbers in _cover(matched, set(members)):
                parts = _fill(shape, numbers)
                stem = r"\.".join(parts[:-1])
                endings.setdefault((stem, rule), []).append(parts[-1])
                all_endings.setdefault(stem, set()).add(parts[-1])

    dynamic: dict[str, dict[str, Any]] = {}
    for (stem, rule), names in endings.items():
        if rule == ():
            continue
        pattern = _pattern(stem, names, whole=all_endings[stem] == set(names))
        sign = "-:" if rule is None else "+:"  # some engines ignore rules without a sign
        dynamic[f"{sign}{pattern}"] = dict(rule or ())
    return dynamic


def _cover(matched: set[_Indices], known: set[_Indices]) -> list[tuple[str, ...]]:
    r"""Patterns for each index, as products, that match exactly `matched` among `known`.

    An index is ``\d+`` where every known value is meant and an alternation otherwise.
    """
    if matched == {()}:
        return [()]
    heads = sorted({indices[0] for indices in matched})
    by_tails: dict[tuple[tuple[str, ...], ...], list[int]] = {}
    for head in heads:
        tails = _cover({i[1:] for i in matched if i[0] == head}, {i[1:] for i in known if i[0] == head})
        by_tails.setdefault(tuple(tails), []).append(head)
    everything = {indices[0] for indices in known}
    result = []
    for tails_of, same in by_tails.items():
        head_pattern = r"\d+" if set(same) == everything else _alternation([str(head) for head in same])
        result += [(head_pattern, *tail) for tail in tails_of]
    return result


def _fill(shape: tuple[str | None, ...], numbers: tuple[str, ...]) -> list[str]:
    remaining = iter(numbers)
    return [next(remaining) if part is None else re.escape(part) for part in shape]


def _pattern(stem: str, names: list[str], whole: bool) -> str:
    """Join a stem and its endings, with the names under which serving engines merge them.

    The pattern matches names of modules, and of their tensors, which ONNX Runtime GenAI looks up.
    """
    merged = [
        group.merged_name for group in INPUT_GROUPS if group.merged_name and set(group.names) <= set(names)
    ]
    ending = _alternation([*names, *merged])
    experts = stem.removesuffix(r"\.\d+")
    if whole and experts != stem and experts.endswith("experts"):
        return rf"{experts}(?:\.\d+\.{ending}|$){_END}"
    return rf"{stem}\.{ending}{_END}" if stem else f"{ending}{_END}"


def _alternation(choices: list[str]) -> str:
    return choices[0] if len(choices) == 1 else f"(?:{'|'.join(choices)})"


# Parsing: one value each.
def _bits(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value not in BITS:
        raise CheckpointError(
            f"{where} has bits {shown(value)}; GPTQ checkpoints have {', '.join(map(str, BITS))}"
        )
    return value


def _group_size(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not (value == -1 or 0 < value < 2**31):
        raise CheckpointError(
            f"{where} has group_size {shown(value)}; it must be positive, or -1 for one group per row"
        )
    return value


def _boolean(values: Mapping[str, Any], key: str, where: str) -> bool:
    value = values.get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{where} has {key} {shown(value)}; it must be true or false")
    return bool(value)


def _format(values: Mapping[str, Any], where: str, assumed: list[str]) -> str:
    if values.get("is_marlin_format"):
        raise CheckpointError(
            f"{where} says is_marlin_format: the weights are packed for one GPU kernel. "
            "Load the checkpoint from which it was made, or quantize the original model."
        )
    given = values.get("checkpoint_format") or values.get("format")
    if given is None:
        assumed.append("checkpoint_format")
        return "gptq"
    if given not in FORMATS:
        raise CheckpointError(
            f"{where} has checkpoint_format {shown(given)}; fewbit reads {' and '.join(FORMATS)}"
        )
    return str(given)


def _check_dynamic(dynamic: object, where: str) -> None:
    if not isinstance(dynamic, Mapping):
        raise CheckpointError(f"{where} has dynamic of type {type(dynamic).__name__}; it must be an object")
    for pattern, override in dynamic.items():
        _check_pattern(pattern.removeprefix("-:").removeprefix("+:"), where)
        if pattern.startswith("-:"):
            continue
        if not isinstance(override, Mapping):
            raise CheckpointError(
                f"{where}: dynamic {shown(pattern)} must hold settings, not {shown(override)}"
            )
        here = f"{where}, dynamic {shown(pattern)},"
        if "bits" in override:
            _bits(override["bits"], here)
        if "group_size" in override:
            _group_size(override["group_size"], here)
        for key in ("sym", "desc_act"):
            _boolean(override, key, here)


def _check_pattern(pattern: str, where: str) -> None:
    """Only expressions that mean the same to `re`, and whose repetitions do not fill the memory of `regex`."""
    counts = [int(n) for n in re.findall(r"\d+", " ".join(re.findall(r"\{[^}]*\}?", pattern)))[:100]]
    if math.prod(max(n, 1) for n in counts) > _MOST_REPETITIONS or len(pattern) > _LONGEST_PATTERN:
        raise CheckpointError(
            f"{where}: dynamic {shown(pattern)} is longer or repeats more than any list of layers"
        )
    try:
        re.compile(pattern)
        regex.compile(pattern)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: dynamic {shown(pattern)} is not a regular expression: {error}"
        ) from error


def _matches(pattern: str, name: str) -> bool:
    """`re.match`, but a pattern that makes it run for ages (``(a+)+b``) is an error."""
    try:
        return regex.match(pattern, name, timeout=_PATTERN_SECONDS) is not None
    except TimeoutError as error:
        raise CheckpointError(
            f"the expression {shown(pattern)} under dynamic takes more than {_PATTERN_SECONDS} s to match {name}; "
            "write it without nested repetitions"
        ) from error


def _modules_in_block(value: object, where: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise CheckpointError(
            f"{where} has modules_in_block_to_quantize {shown(value)}; it must be a list of names"
        )
    names: list[str] = []
    for item in value:
        names += item if isinstance(item, list) else [item]
    if not all(isinstance(name, str) for name in names):
        raise CheckpointError(
            f"{where} has modules_in_block_to_quantize {shown(value)}; it must be a list of names"
        )
    return tuple(names)


def _quantizers(meta: object) -> tuple[str, ...]:
    given = meta.get("quantizer") if isinstance(meta, Mapping) else None
    if isinstance(given, str):
        return (given,)
    return tuple(str(name) for name in given) if isinstance(given, list) else ()
