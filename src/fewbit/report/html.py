"""The report as one page: from the JSON of a run to what the template shows, then to HTML.

`page` is a pure function of the report's JSON. Everything static is laid out here and in ``page/page.html.j2``; the
heat map and the table of all layers are drawn by ``page/page.js`` from the figures embedded as JSON. The page loads
nothing from anywhere, and its own content policy forbids it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..config import QuantConfig
from ..plan import block_of
from . import words
from .explain import explain
from .layers import (
    Place,
    columns,
    error_measure,
    kind_rows,
    mean,
    place_of_skipped,
    places,
    setting,
    stacks,
)

# Measure → its name, how it is written, and what it is.
MEASURES = {
    "true_error": (
        "true error",
        "percent",
        "‖WX̃ − ŴX‖ / ‖WX̃‖ on held-out calibration tokens: what the layer's output has lost against the "
        "full-precision model, with all that earlier layers lost.",
    ),
    "output_error": (
        "own error",
        "percent",
        "‖WX − ŴX‖ / ‖WX‖ on the inputs that the layer has in the quantized model: what rounding this layer adds.",
    ),
    "bits_per_weight": ("bits per weight", "number", "Stored bits, scales and zero points counted."),
    "correction": (
        "correction α",
        "number",
        "How far the layer's target was moved towards the full-precision output, 0 to 1.",
    ),
    "tokens": ("tokens", "count", "Calibration tokens in the layer's Hessian."),
    "seconds": ("seconds", "seconds", "Time for the layer alone, without the forward pass."),
}
_ALWAYS = ("true_error", "output_error")

_PHASES = {
    "calibration": "read and tokenize the text",
    "load": "read the model",
    "measure": "measure what each layer can bear",
    "walk": "forward passes",
    "hessian": "sum up Hessians",
    "solve": "solve",
    "pack": "pack codes",
    "journal": "keep finished blocks",
    "resume": "take over finished blocks",
    "write": "write the checkpoint",
    "evaluate": "evaluate",
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


def page(report: Mapping[str, Any]) -> str:
    """The page for a report in plain JSON types."""
    environment = Environment(
        loader=PackageLoader("fewbit.report", "page"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    filters = (words.percent, words.number, words.size, words.count, words.duration, words.plural)
    environment.filters.update({function.__name__: function for function in filters})
    environment.filters["breakable"] = _breakable
    return environment.get_template("page.html.j2").render(view(report))


def view(report: Mapping[str, Any]) -> dict[str, Any]:
    """All that the template shows."""
    layers = report["layers"]
    found = places(layers)
    width = getattr(torch, report["model"]["dtype"]).itemsize
    rows = kind_rows(layers, found)
    measure = error_measure(layers)
    return {
        "report": report,
        "title": report["model"]["name"],
        "subtitle": _subtitle(report),
        "recipe": _recipe(report, found),
        "tiles": tiles(report),
        "fallen": sum(bool(layer["fallbacks"]) for layer in layers),
        "resumed": report["resumed_layers"],
        "notes": report["notes"],
        "measure": MEASURES[measure][0],
        "measure_meaning": MEASURES[measure][2],
        "kinds": rows,
        "stack_count": len({row.stack for row in rows}),
        "largest_error": max((row.worst or 0.0 for row in rows), default=0.0),
        "has_correction": any(row.correction is not None for row in rows),
        "sizes": sizes(report, width),
        "settings": settings(layers),
        "corrections": corrections(layers),
        "refits": sum(layer["refit"] for layer in layers),
        "tokens_differ": len({layer["tokens"] for layer in layers if layer["method"] == "gptq"}) > 1,
        "fallbacks": fallbacks(layers),
        "skipped": skipped_groups(report["skipped"]),
        "phases": phases(report),
        "memory": memory(report),
        "config": config_rows(report["config"]),
        "data": data(report, found),
    }


def data(report: Mapping[str, Any], found: Sequence[Place]) -> dict[str, Any]:
    """What ``page.js`` draws from: every layer's place and figures, by column."""
    layers = report["layers"]
    left = [(item, place_of_skipped(item["name"], found)) for item in report["skipped"]]
    gaps = [(item, place) for item, place in left if place is not None]
    order = stacks(found, [place for _, place in gaps])
    at = {stack.name: number for number, stack in enumerate(order)}
    names = sorted({name for layer in layers for name in layer["fallbacks"]})

    def position(place: Place) -> tuple[int, int, int]:
        stack = order[at[place.stack]]
        return at[place.stack], stack.blocks.index(place.block), stack.kinds.index(place.kind)

    where = [position(place) for place in found]
    table = columns(layers)
    return {
        "measures": [
            {"key": key, "label": label, "unit": unit, "meaning": meaning}
            for key, (label, unit, meaning) in MEASURES.items()
            if _offered(key, table[key])
        ],
        "stacks": [asdict(stack) for stack in order],
        "layers": {
            **{name: [place[i] for place in where] for i, name in enumerate(("stack", "block", "kind"))},
            "numbers": [place.numbers for place in found],
            "fallbacks": [[names.index(name) for name in layer["fallbacks"]] for layer in layers],
            **table,
        },
        "fallbacks": names,
        "gaps": [[*position(place), item["reason"]] for item, place in gaps],
    }


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
    known = [layer for layer in layers if layer[measure] is not None]
    if known:
        worst = max(known, key=lambda layer: layer[measure])
        average = words.percent(mean(layer[measure] for layer in known))
        detail = f"at most {words.percent(worst[measure])}, in"
        result.append(Tile(f"mean {MEASURES[measure][0]}", average, detail, name=worst["name"]))
    peak = words.size(report["peak_memory_bytes"])
    result.append(Tile("time", words.duration(report["seconds"]), f"peak memory {peak}"))
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
    """Own time of every phase, in the order of the run; what no phase covers comes last."""
    kept = list(report["phases"])
    evaluation = sum(phase["seconds"] for phase in kept if phase["name"] == "evaluate")
    whole = report["seconds"] + evaluation
    rest = whole - sum(phase["own_seconds"] for phase in kept)
    parts = [(_PHASES.get(phase["name"], phase["name"]), phase["own_seconds"]) for phase in kept]
    if rest > 0.005 * whole:
        parts.append(("everything else", rest))
    return [Share(label, part / whole, words.duration(part)) for label, part in parts if whole > 0]


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


def _subtitle(report: Mapping[str, Any]) -> str:
    model = report["model"]
    return f"{model['architecture']}, {words.parameters(model['parameters'])} parameters"


def _recipe(report: Mapping[str, Any], found: Iterable[Place]) -> str:
    config, layers = report["config"], report["layers"]
    kinds = {setting(layer) for layer in layers}
    bits = kinds.pop() if len(kinds) == 1 else f"{len(kinds)} different settings of bits and group size"
    blocks = {(place.stack, place.block) for place in found if place.block is not None}
    grid = "symmetric" if config["sym"] else "asymmetric"
    calibration = report["calibration"]
    text = (
        f"{words.count(calibration['tokens'])} calibration tokens from {calibration['source']}"
        if calibration["sequences"]
        else "no calibration"
    )
    amount = words.plural(len(layers), "layer")
    return f"{bits}, {grid}; {amount} in {words.plural(len(blocks), 'block')}; {text}"


def _offered(key: str, values: Sequence[Any]) -> bool:
    """Errors wherever they are known; other measures where they differ between layers."""
    known = {value for value in values if value is not None}
    return bool(known) if key in _ALWAYS else len(known) > 1


def _breakable(text: str) -> Markup:
    """Names of layers may break before a part, not anywhere."""
    return Markup("<wbr>").join(re.split(r"(?<=\w)(?=\.[^\W\d])", text))


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
