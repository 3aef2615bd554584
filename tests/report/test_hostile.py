"""Hostile text anywhere in a report is shown as text."""

import copy
from importlib.resources import files

import pytest
from test_page import HOSTILE, Parsed

from fewbit.report.page import page
from report_samples import dense_layers, evaluation, phases, report

SCRIPT = files("fewbit.report") / "page" / "sort.js"

# Texts that are compared, not shown.
CHOSEN = {"act_order", "method", "parent", "dtype"}


def sample():
    layers = dense_layers(2)
    layers[0]["fallbacks"] = ["damped"]
    return report(
        layers,
        notes=["a note"],
        plan_notes=["another"],
        evaluation=evaluation(),
        fallbacks={"damped": 1},
        phases=phases(),
    )


def paths(value, path=()):
    """Paths to all texts."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value[:1]):
            yield from paths(inner, (*path, number))
    elif isinstance(value, str):
        yield path


def with_hostile(path):
    value = copy.deepcopy(sample())
    at = value
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = HOSTILE
    return value


def check(value):
    text = page(value)
    parsed = Parsed(text)
    assert not [tag for tag, _ in parsed.elements if tag in ("img", "iframe", "object", "embed", "base")]
    scripts = [text for tag, text in parsed.texts if tag == "script"]
    assert scripts == [SCRIPT.read_text()]
    assert [tag for tag, _ in parsed.elements].count("script") == 1
    handlers = [names for _, names in parsed.elements if any(name.startswith("on") for name in names)]
    assert not handlers
    links = [names["href"] for _, names in parsed.elements if names.get("href")]
    assert not [link for link in links if not link.startswith(("#", "data:"))]
    return text


PATHS = [path for path in paths(sample()) if path[-1] not in CHOSEN]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
def test_a_hostile_text_anywhere(path):
    check(with_hostile(path))


@pytest.mark.parametrize("key", ["config", "fingerprint", "versions", "fallbacks"])
def test_a_hostile_name_of_a_value(key):
    value = sample()
    value[key][HOSTILE] = 1 if key == "fallbacks" else "x"
    check(value)


def test_overrides_and_ignored_names_are_texts_too():
    value = sample()
    value["config"]["override"] = {HOSTILE: {"bits": 8}}
    value["config"]["ignore"] = [HOSTILE]
    assert "alert(1)" in check(value)


def test_the_sample_without_hostile_texts_passes():
    check(sample())
    assert len(PATHS) > 20
