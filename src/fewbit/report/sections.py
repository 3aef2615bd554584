"""What the sections of the page show: headline figures, sizes, bits, fallbacks, time and memory, as text and shares.

Every function is pure and takes the report, or a part of it, in plain JSON types.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .. import formatting as words
from ..config import QuantConfig
from ..planning import block_of
from .explain import explain
from .layers import MEASURES, error_measure, is_known, mean, setting

_EVALUATE = "evaluate"
_PHASES = {
    "calibration": "read and tokenize the text",
    "load": "read the model",
    "measure": "measure what each layer can bear",
    "walk": "forward passes",
    "hessian": "sum up Hessians",
    "solve": "solve",
    "pack": "pack codes",
    "tune": "tune blocks",
    "journal": "keep finished blocks",
    "resume": "take over finished blocks",
    "write": "write the checkpoint",
    _EVALUATE: "evaluate",
}
_NAMES_SHOWN = 12
_MOST_ALPHAS = 6


@dataclass(frozen=True)
class Tile:
    """One headline figure."""

    label: str
    value: str
    detail: str
    spread: str = ""
    name: str = ""


@dataclass(frozen=True)
class Share:
    """One part of a whole, for a bar: `part` is the fraction, `text` what is written beside it.

    `tone`: number of its colour; None takes them in turn.
    """

    label: str
    part: float
    text: str
    note: str = ""
    tone: int | None = None


@dataclass(frozen=True)
class FallbackView:
    """One kind of fallback, the layers that needed it, and what that means."""

    name: str
    meaning: str
    remedy: str
    layers: tuple[str, ...]
    more: int


def tiles(report: Mapping[str, Any]) -> list[Tile]:
    """The headline figures."""
    model, layers = report["model"], report["layers"]
    whole = 8 * report["result_bytes"] / model["parameters"]
    result = [
        Tile(
            "bits per weight",
            words.number(report["bits_per_weight"]),
            f"of the quantized layers; {words.number(whole)} over the whole model",
        ),
        Tile(
            "size",
            words.size(report["result_bytes"]),
            f"{_change(report['result_bytes'], model['bytes'])}, from {words.size(model['bytes'])} in {model['dtype']}",
        ),
    ]
    if report["evaluation"]:
        result += _evaluation_tiles(report["evaluation"])
    measure = error_measure(layers)
    known = [layer for layer in layers if is_known(layer, measure)]
    if known:
        worst = max(known, key=lambda layer: layer[measure])
        average = words.percent(mean(layer[measure] for layer in known))
        detail = f"at most {words.percent(worst[measure])}, in"
        result.append(Tile(f"mean {MEASURES[measure][0]}", average, detail, name=worst["name"]))
    result += _tuning_tiles(layers)
    detail = f"peak memory {words.size(report['peak_memory_bytes'])}"
    if report.get("ranks", 1) > 1:  # reports of older versions do not say
        detail += f" in one of {report['ranks']} processes"
    result.append(Tile("time", words.duration(report["seconds"]), detail))
    return result


def _evaluation_tiles(evaluation: Mapping[str, Any]) -> list[Tile]:
    base, after = evaluation["base"], evaluation["quantized"]
    change = _change(after["perplexity"], base["perplexity"])
    return [
        Tile(
            "perplexity",
            words.number(after["perplexity"]),
            f"{change}, from {words.number(base['perplexity'])}{words.spread(base['perplexity'], base['stderr'])} on "
            f"{words.count(after['tokens'])} tokens of {evaluation['dataset']}",
            words.spread(after["perplexity"], after["stderr"]),
        ),
        Tile(
            "KL divergence",
            words.number(after["kl"]),
            f"nats per token from the original; same first choice {words.percent(after['top1_agreement'])}",
            words.spread(after["kl"], after["kl_stderr"]),
        ),
    ]


def _tuning_tiles(layers: Iterable[Mapping[str, Any]]) -> list[Tile]:
    """How many blocks tuning improved, and by how much; nothing where there was none."""
    blocks = {layer["block"]: layer for layer in layers if layer.get("block_error")}
    better = [layer["block_error"] for layer in blocks.values() if layer["tuned"]]
    if not blocks:
        return []
    fall = mean(1 - after / before for before, after in better if before > 0)
    gain = (
        ""
        if fall is None
        else f"their squared error on held-out text fell by {words.percent(fall)} on average"
    )
    return [Tile("blocks better by tuning", f"{len(better)} of {len(blocks)}", gain)]


def sizes(report: Mapping[str, Any], width: int) -> dict[str, list[Share]]:
    """The model before and after, in parts on one scale."""
    layers = report["layers"]
    weights = sum(layer["out_features"] * layer["in_features"] for layer in layers)
    codes = sum(layer["out_features"] * layer["in_features"] * layer["bits"] for layer in layers) / 8
    before = {
        "weights to be quantized": weights * width,
        "the rest": report["model"]["bytes"] - weights * width,
    }
    after = {
        "codes": codes,
        "scales, zero points, g_idx": report["quantized_bytes"] - codes,
        "the rest": report["result_bytes"] - report["quantized_bytes"],
    }
    largest = max(report["model"]["bytes"], report["result_bytes"])
    tones = {"scales, zero points, g_idx": 3, "the rest": 2}

    def share(label: str, part: float) -> Share:
        part = max(part, 0.0)
        return Share(label, part / largest, words.size(part), tone=tones.get(label, 0))

    return {
        title: [share(*item) for item in parts.items()]
        for title, parts in (("before", before), ("after", after))
    }


def settings(layers: Iterable[Mapping[str, Any]]) -> list[Share]:
    """Which bits and group sizes how much of the weights have; most first."""
    weights: Counter[str] = Counter()
    amount: Counter[str] = Counter()
    for layer in layers:
        weights[setting(layer)] += layer["out_features"] * layer["in_features"]
        amount[setting(layer)] += 1
    whole = weights.total()
    return [
        Share(name, part / whole, words.percent(part / whole), words.plural(amount[name], "layer"))
        for name, part in weights.most_common()
    ]


def corrections(layers: Iterable[Mapping[str, Any]]) -> list[Share]:
    """How many layers have which correction α, in ranges where there are many; empty where none was chosen."""
    chosen = [layer["correction"] for layer in layers if layer["correction"] is not None]
    distinct = set(chosen)
    labels = Counter(
        f"α = {alpha:g}" if len(distinct) <= _MOST_ALPHAS or alpha == 0 else _alpha_range(alpha)
        for alpha in sorted(chosen)
    )
    return [
        Share(label, amount / len(chosen), words.plural(amount, "layer")) for label, amount in labels.items()
    ]


def fallbacks(layers: Iterable[Mapping[str, Any]]) -> list[FallbackView]:
    """Every kind of fallback that was needed, with its layers."""
    needed: dict[str, list[str]] = {}
    for layer in layers:
        for name in layer["fallbacks"]:
            needed.setdefault(name, []).append(layer["name"])
    result = []
    for name, where in sorted(needed.items(), key=lambda item: -len(item[1])):
        known = explain(name)
        meaning, remedy = known if known else ("", "")
        shown = tuple(where[:_NAMES_SHOWN])
        result.append(FallbackView(name, meaning, remedy, shown, len(where) - len(shown)))
    return result


def skipped_groups(skipped: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Matrices left as they are, those of all blocks together: reason, pattern of the name, shape, how many."""
    groups: Counter[tuple[str, str, str]] = Counter()
    for item in skipped:
        block = block_of(item["name"])
        inside = block != item["name"] or block.rpartition(".")[2].isdecimal()
        pattern = block.rpartition(".")[0] + ".*" + item["name"][len(block) :] if inside else item["name"]
        groups[item["reason"], pattern.removeprefix("."), " × ".join(map(str, item["shape"]))] += 1
    return [
        {"reason": reason, "name": pattern, "shape": shape, "count": amount}
        for (reason, pattern, shape), amount in groups.items()
    ]


def phases(report: Mapping[str, Any]) -> list[Share]:
    """Own time of every phase of the quantization, in their order; what no phase covers comes last."""
    kept = [phase for phase in report["phases"] if phase["name"] != _EVALUATE]
    whole = report["seconds"]
    rest = whole - sum(phase["own_seconds"] for phase in kept)
    parts = [(_PHASES.get(phase["name"], phase["name"]), phase["own_seconds"]) for phase in kept]
    if rest > 0.005 * whole:
        parts.append(("everything else", rest))
    return [Share(label, part / whole, words.duration(part)) for label, part in parts if whole > 0]


def evaluation_seconds(report: Mapping[str, Any]) -> float:
    """Time for the evaluation after the run; 0 without one."""
    return float(sum(phase["seconds"] for phase in report["phases"] if phase["name"] == _EVALUATE))


def memory(report: Mapping[str, Any]) -> list[Share]:
    """Memory by phase: of the process, and of the device where there is one. Bars have one scale for each."""
    result = []
    for kind, title in (("memory", ""), ("device_memory", " on the device")):
        known = [phase for phase in report["phases"] if phase[kind] is not None]
        largest = max((phase[kind]["bytes"] for phase in known), default=0)
        for phase in known:
            amount = phase[kind]["bytes"]
            text = words.size(amount) if phase[kind]["exact"] else f"≥ {words.size(amount)}"
            label = _PHASES.get(phase["name"], phase["name"]) + title
            result.append(Share(label, amount / largest if largest else 0.0, text))
    return result


def config_rows(config: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """(name, value, whether it differs from the default) of every setting."""
    default = QuantConfig().to_dict()
    return [
        (
            name,
            "–" if value is None or value in ([], {}) else str(value),
            name in default and value != default[name],
        )
        for name, value in config.items()
    ]


def _alpha_range(alpha: float) -> str:
    """The fifth of 0…1 in which α lies."""
    fifth = min(math.ceil(5 * alpha), 5)
    return f"{(fifth - 1) / 5:g} < α ≤ {fifth / 5:g}"


def _change(after: float | None, before: float | None) -> str:
    """``−32 %``."""
    if after is None or not before:
        return words.DASH
    change = after / before - 1
    return f"{'+' if change > 0 else '−'}{words.percent(abs(change))}"
