"""The report as one page: from the JSON of a run to what the template shows, then to HTML.

`page` is a pure function of the report's JSON. Everything static is laid out here and in ``page/page.html.j2``; the
heat map and the table of all layers are drawn by ``page/page.js`` from the figures embedded as JSON. The page loads
nothing from anywhere, and its own content policy forbids it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .. import formatting as words
from . import sections
from .layers import (
    MEASURES,
    Place,
    columns,
    error_measure,
    kind_rows,
    place_of_skipped,
    places,
    setting,
    stacks,
)

_ALWAYS = ("true_error", "output_error")


def page(report: Mapping[str, Any]) -> str:
    """The page for a report in plain JSON types."""
    environment = Environment(
        loader=PackageLoader("fewbit.report", "page"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    filters = (
        words.alpha,
        words.percent,
        words.number,
        words.size,
        words.count,
        words.duration,
        words.plural,
    )
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
        "tiles": sections.tiles(report),
        "fallen": sum(bool(layer["fallbacks"]) for layer in layers),
        "resumed": report["resumed_layers"],
        "notes": report["notes"],
        "measure": MEASURES[measure][0],
        "measure_meaning": _meaning(measure, layers),
        "kinds": rows,
        "stack_count": len({row.stack for row in rows}),
        "largest_error": max((row.worst or 0.0 for row in rows), default=0.0),
        "has_correction": any(row.correction is not None for row in rows),
        "sizes": sections.sizes(report, width),
        "settings": sections.settings(layers),
        "corrections": sections.corrections(layers),
        "tokens_differ": len({layer["tokens"] for layer in layers if layer["method"] == "gptq"}) > 1,
        "fallbacks": sections.fallbacks(layers),
        "skipped": sections.skipped_groups(report["skipped"]),
        "phases": sections.phases(report),
        "evaluation_seconds": sections.evaluation_seconds(report),
        "memory": sections.memory(report),
        "config": sections.config_rows(report["config"]),
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
            {"key": key, "label": label, "unit": unit, "meaning": _meaning(key, layers)}
            for key, (label, unit, _) in MEASURES.items()
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


def _meaning(key: str, layers: Iterable[Mapping[str, Any]]) -> str:
    late = key in _ALWAYS and any(layer.get("tuned") for layer in layers)
    return MEASURES[key][2] + (" Measured before the tuning." if late else "")


def _offered(key: str, values: Sequence[Any]) -> bool:
    """Errors wherever they are known; other measures where they differ between layers."""
    known = {value for value in values if value is not None}
    return bool(known) if key in _ALWAYS else len(known) > 1


def _breakable(text: str) -> Markup:
    """Names of layers may break before a part, not anywhere."""
    return Markup("<wbr>").join(re.split(r"(?<=\w)(?=\.[^\W\d])", text))
