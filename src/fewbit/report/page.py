"""The report as an HTML page: a pure function of the report's JSON.

The page loads nothing, and its content security policy allows no script but sort.js, by its hash. The link that saves
the picture contains it.
"""

from __future__ import annotations

import math
import re
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .. import formatting
from ..config import WITHOUT_CALIBRATION, QuantConfig
from ..planning import block_of
from .explain import explain
from .heat_map import SHADES, heat_maps
from .layer_stats import (
    ERRORS,
    Location,
    Record,
    error_measure,
    error_name,
    kind_rows,
    locations,
    mean,
    setting,
    weights_of,
    worst_layer,
)

_EVALUATE = "evaluate"
_PHASES = {
    "calibration": "read and tokenize the text",
    "load": "read the model",
    "measure": "measure the sensitivity of each layer",
    "gradients": "gradients of the outputs",
    "walk": "forward passes",
    "hessian": "accumulate Hessians",
    "solve": "solve",
    "pack": "pack codes",
    "tune": "tune blocks",
    "journal": "save finished blocks",
    "resume": "load finished blocks",
    "write": "write the checkpoint",
    "distill": "distill",
    _EVALUATE: "evaluate",
}
_NAMES_SHOWN = 12
_MOST_ALPHAS = 6
_MOST_LAYERS = 1000  # rows of the table of all layers


@dataclass(frozen=True)
class Tile:
    """One headline figure; `name` is the layer that `detail` refers to."""

    label: str
    value: str
    detail: str
    spread: str = ""
    name: str = ""


@dataclass(frozen=True)
class Share:
    """One bar: `part` is its length as a fraction, `text` the figure beside it."""

    label: str
    part: float
    text: str
    note: str = ""


def page(report: Mapping[str, Any]) -> str:
    """The page for a report in plain JSON types."""
    environment = Environment(
        loader=PackageLoader("fewbit.report", "page"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    for name in ("alpha", "percent", "number", "size", "count", "duration", "plural"):
        environment.filters[name] = getattr(formatting, name)
    environment.filters["breakable"] = _breakable
    environment.filters["setting"] = setting
    environment.filters["picture_link"] = _picture_link
    script = (files("fewbit.report") / "page" / "sort.js").read_text(encoding="utf-8")
    script_hash = b64encode(sha256(script.encode()).digest()).decode()
    template = environment.get_template("page.html.j2")
    return template.render(view(report), script=Markup(script), script_hash=script_hash)


def _picture_link(svg: str) -> str:
    """A link that contains the picture."""
    return f"data:image/svg+xml;base64,{b64encode(svg.strip().encode()).decode()}"


def view(report: Mapping[str, Any]) -> dict[str, Any]:
    """All values that the template shows."""
    layers = report["layers"]
    found = locations(layers)
    rows = kind_rows(layers, found)
    maps, scale = heat_maps(layers, report["skipped"], found)
    meaning = ERRORS[error_measure(layers)][1]
    if any(layer.get("tuned") for layer in layers):
        meaning += " Measured before the tuning."
    return {
        "report": report,
        "title": report["model"]["name"],
        "subtitle": _subtitle(report["model"]),
        "recipe": _recipe(report, found),
        "tiles": tiles(report),
        "quality": _quality(report),
        "fallen": sum(bool(layer["fallbacks"]) for layer in layers),
        "maps": maps,
        "scale": scale,
        "shades": SHADES,
        "error_key": error_measure(layers),
        "measure": error_name(layers),
        "measure_meaning": meaning,
        "kinds": rows,
        "stack_count": len({row.stack for row in rows}),
        "has_correction": any(row.correction is not None for row in rows),
        "sizes": sizes(report),
        "settings": settings(layers),
        "corrections": corrections(layers),
        "tokens_differ": len(
            {layer["tokens"] for layer in layers if layer["method"] not in WITHOUT_CALIBRATION}
        )
        > 1,
        "fallbacks": fallbacks(layers),
        "skipped": skipped_groups(report["skipped"]),
        "phases": phases(report),
        "curve": (report.get("distillation") or {}).get("curve", []),
        "evaluation_seconds": sum(p["seconds"] for p in report["phases"] if p["name"] == _EVALUATE),
        "memory": memory(report),
        "config": config_rows(report["config"]),
        "layers": shown_layers(layers),
    }


def _quality(report: Mapping[str, Any]) -> tuple[str, str]:
    """The verdict on top: what the measured KL divergence means, and the style of its box."""
    if not report["evaluation"]:
        return (
            "The loss was not measured: fewbit eval OUT --against MODEL --dataset TEXT measures it.",
            "plain",
        )
    kl = report["evaluation"]["quantized"]["kl"]
    style = "good" if kl < formatting.ACCEPTABLE_KL else "warn"
    words = formatting.verdict(kl)
    return f"{words[0].upper()}{words[1:]}: KL divergence {formatting.number(kl)} nats per token.", style


def tiles(report: Mapping[str, Any]) -> list[Tile]:
    """The headline figures."""
    model, layers = report["model"], report["layers"]
    whole = formatting.number(8 * report["result_bytes"] / model["parameters"])
    result = [
        Tile(
            "bits per weight",
            formatting.number(report["bits_per_weight"]),
            f"in the quantized layers; {whole} over the whole model",
        ),
        Tile(
            "size",
            formatting.size(report["result_bytes"]),
            f"{_change(report['result_bytes'], model['bytes'])}, from {formatting.size(model['bytes'])} in "
            f"{model['dtype']}",
        ),
    ]
    if report["evaluation"]:
        result += _evaluation_tiles(report["evaluation"])
    measure = error_measure(layers)
    worst = worst_layer(layers, measure)
    if worst is not None:
        average = formatting.percent(mean(layer[measure] for layer in layers))
        detail = f"at most {formatting.percent(worst[measure])}, in"
        result.append(Tile(f"mean {error_name(layers)}", average, detail, name=worst["name"]))
    result += _tuning_tiles(layers)
    if report.get("distillation"):
        result.append(_distillation_tile(report["distillation"]))
    detail = f"peak memory {formatting.size(report['peak_memory_bytes'])}"
    if report.get("ranks", 1) > 1:  # missing in reports of older versions
        detail += f" in one of {report['ranks']} processes"
    return [*result, Tile("time", formatting.duration(report["seconds"]), detail)]


def _evaluation_tiles(evaluation: Mapping[str, Any]) -> list[Tile]:
    base, after = evaluation["base"], evaluation["quantized"]
    number, spread = formatting.number, formatting.spread
    return [
        Tile(
            "perplexity",
            number(after["perplexity"]),
            f"{_change(after['perplexity'], base['perplexity'])}, from {number(base['perplexity'])}"
            f"{spread(base['perplexity'], base['stderr'])} on {formatting.count(after['tokens'])} tokens of "
            f"{evaluation['dataset']}",
            spread(after["perplexity"], after["stderr"]),
        ),
        Tile(
            "KL divergence",
            number(after["kl"]),
            f"nats per token from the original; same first choice {formatting.percent(after['top1_agreement'])}",
            spread(after["kl"], after["kl_stderr"]),
        ),
    ]


def _distillation_tile(distillation: Mapping[str, Any]) -> Tile:
    before, after = distillation["before"], distillation["after"]
    return Tile(
        "KL after distillation",
        formatting.number(after),
        f"{_change(after, before)}, from {formatting.number(before)}, on held-out text; "
        f"{formatting.plural(distillation['trained'], 'value')} trained on {formatting.count(distillation['tokens'])} "
        "tokens",
    )


def _tuning_tiles(layers: Iterable[Record]) -> list[Tile]:
    """The number of blocks that tuning improved, and by how much; empty without tuning."""
    blocks = {layer["block"]: layer for layer in layers if layer.get("block_error")}
    if not blocks:
        return []
    better = [layer["block_error"] for layer in blocks.values() if layer["tuned"]]
    fall = mean(1 - after / before for before, after in better if before > 0)
    gain = (
        ""
        if fall is None
        else f"their squared error on held-out text fell by {formatting.percent(fall)} on average"
    )
    return [Tile("blocks better by tuning", f"{len(better)} of {len(blocks)}", gain)]


def sizes(report: Mapping[str, Any]) -> dict[str, list[Share]]:
    """The parts of the model before and after, on one scale."""
    layers, model = report["layers"], report["model"]
    before_bytes = weights_of(layers) * getattr(torch, model["dtype"]).itemsize
    codes = sum(layer["out_features"] * layer["in_features"] * layer["bits"] for layer in layers) / 8
    parts = {
        "before": {"weights to be quantized": before_bytes, "the rest": model["bytes"] - before_bytes},
        "after": {
            "codes": codes,
            "scales, zero points, g_idx": report["quantized_bytes"] - codes,
            "the rest": report["result_bytes"] - report["quantized_bytes"],
        },
    }
    largest = max(model["bytes"], report["result_bytes"])
    return {
        title: [
            Share(label, max(part, 0) / largest, formatting.size(max(part, 0)))
            for label, part in found.items()
        ]
        for title, found in parts.items()
    }


def settings(layers: Iterable[Record]) -> list[Share]:
    """The share of the weights with each bits and group size, largest first."""
    weights: Counter[str] = Counter()
    amount: Counter[str] = Counter()
    for layer in layers:
        weights[setting(layer)] += weights_of([layer])
        amount[setting(layer)] += 1
    whole = weights.total()
    return [
        Share(name, part / whole, formatting.percent(part / whole), formatting.plural(amount[name], "layer"))
        for name, part in weights.most_common()
    ]


def corrections(layers: Iterable[Record]) -> list[Share]:
    """The number of layers with each correction α, or in each range of α; empty where none was chosen."""
    chosen = [layer["correction"] for layer in layers if layer["correction"] is not None]
    few = len(set(chosen)) <= _MOST_ALPHAS
    labels = Counter(f"α = {a:g}" if few or a == 0 else _alpha_range(a) for a in sorted(chosen))
    return [
        Share(label, amount / len(chosen), formatting.plural(amount, "layer"))
        for label, amount in labels.items()
    ]


def fallbacks(layers: Iterable[Record]) -> list[dict[str, Any]]:
    """Every kind of fallback that was needed: name, meaning, remedy, layers; most layers first."""
    needed: dict[str, list[str]] = {}
    for layer in layers:
        for name in layer["fallbacks"]:
            needed.setdefault(name, []).append(layer["name"])
    result = []
    for name, names in sorted(needed.items(), key=lambda item: -len(item[1])):
        meaning, remedy = explain(name) or ("", "")
        shown, count = names[:_NAMES_SHOWN], len(names)
        result.append({"name": name, "meaning": meaning, "remedy": remedy, "layers": shown, "count": count})
    return result


def skipped_groups(skipped: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Matrices that were not quantized, merged over blocks: reason, name, shape, count."""
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
    """Own time of every phase of the quantization, in order; the time outside of all phases comes last."""
    whole = report["seconds"]
    parts = [
        (_PHASES.get(phase["name"], phase["name"]), phase["own_seconds"])
        for phase in report["phases"]
        if phase["name"] != _EVALUATE
    ]
    rest = whole - sum(seconds for _, seconds in parts)
    if rest > 0.005 * whole:
        parts.append(("everything else", rest))
    return [Share(label, part / whole, formatting.duration(part)) for label, part in parts if whole > 0]


def memory(report: Mapping[str, Any]) -> list[Share]:
    """Memory of the process and of the device by phase; each kind has its own scale."""
    result = []
    for kind, title in (("memory", ""), ("device_memory", " on the device")):
        known = [phase for phase in report["phases"] if phase[kind] is not None]
        largest = max((phase[kind]["bytes"] for phase in known), default=0)
        for phase in known:
            amount = phase[kind]["bytes"]
            text = formatting.size(amount) if phase[kind]["exact"] else f"≥ {formatting.size(amount)}"
            label = _PHASES.get(phase["name"], phase["name"]) + title
            result.append(Share(label, amount / largest if largest else 0.0, text))
    return result


def config_rows(config: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """(name, value, whether it differs from the default) of every setting."""
    default = QuantConfig().to_dict()
    return [
        (
            name,
            formatting.DASH if value is None or value in ([], {}) else str(value),
            name in default and value != default[name],
        )
        for name, value in config.items()
    ]


def shown_layers(layers: Sequence[Record]) -> Sequence[Record]:
    """The layers of the table of all layers; of many, the ones with the largest errors."""
    if len(layers) <= _MOST_LAYERS:
        return layers
    measure = error_measure(layers)
    return sorted(layers, key=lambda layer: -(mean([layer[measure]]) or 0.0))[:_MOST_LAYERS]


def _subtitle(model: Mapping[str, Any]) -> str:
    return f"{model['architecture']}, {formatting.parameters(model['parameters'])} parameters"


def _recipe(report: Mapping[str, Any], found: Iterable[Location]) -> str:
    config, layers, calibration = report["config"], report["layers"], report["calibration"]
    kinds = {setting(layer) for layer in layers}
    bits = kinds.pop() if len(kinds) == 1 else f"{len(kinds)} different settings of bits and group size"
    blocks = {(location.stack, location.block) for location in found if location.block is not None}
    text = (
        f"{formatting.count(calibration['tokens'])} calibration tokens from {calibration['source']}"
        if calibration["sequences"]
        else "no calibration"
    )
    grid = "symmetric" if config["sym"] else "asymmetric"
    amount = f"{formatting.plural(len(layers), 'layer')} in {formatting.plural(len(blocks), 'block')}"
    return f"{bits}, {grid}; {amount}; {text}"


def _alpha_range(alpha: float) -> str:
    """The fifth of 0…1 that contains α."""
    fifth = min(math.ceil(5 * alpha), 5)
    return f"{(fifth - 1) / 5:g} < α ≤ {fifth / 5:g}"


def _change(after: float | None, before: float | None) -> str:
    """Relative change, such as ``−32 %``."""
    if after is None or not before:
        return formatting.DASH
    change = after / before - 1
    return f"{'+' if change > 0 else '−'}{formatting.percent(abs(change))}"


def _breakable(text: str) -> Markup:
    """Allow line breaks in the name of a layer, before each part."""
    return Markup("<wbr>").join(re.split(r"(?<=\w)(?=\.[^\W\d])", text))
