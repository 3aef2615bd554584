"""The page: it parses, holds every figure, loads nothing, and survives hostile names and missing figures."""

import html.parser
import json
import re

import pytest

from fewbit.gptq import cholesky as fallback
from fewbit.report.explain import explain
from fewbit.report.html import page, view
from fewbit.report.layers import COLUMNS
from fewbit.report.sections import corrections, phases, skipped_groups, tiles
from report_samples import dense_layers, evaluation, expert_layers, layer, report

VOID = {"meta", "link", "input", "br", "wbr"}


class Parsed(html.parser.HTMLParser):
    """Checks that every element is closed in its order; keeps tags, attributes and texts."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("li", "p") and self.open[-1] != tag:
            raise AssertionError(f"</{tag}> inside <{self.open[-1]}>")
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def data(self):
        found = [
            text
            for (tag, attributes), text in zip(self.scripts(), self.script_texts(), strict=True)
            if attributes
        ]
        return json.loads(found[0])

    def scripts(self):
        return [(tag, attributes) for tag, attributes in self.elements if tag == "script"]

    def script_texts(self):
        return [text for tag, text in self.texts if tag == "script"]

    def visible(self):
        return " ".join(" ".join(text for tag, text in self.texts if tag not in ("script", "style")).split())


def names(data):
    """The layers' full names, as page.js puts them together."""
    columns = data["layers"]
    for stack, block, kind, numbers in zip(
        *(columns[key] for key in ("stack", "block", "kind", "numbers")), strict=True
    ):
        at = data["stacks"][stack]
        text = at["kinds"][kind]
        for number in numbers.split("."):
            text = text.replace("*", number, 1)
        yield ".".join(
            str(part) for part in (at["name"], at["blocks"][block], text) if part not in ("", None)
        )


def full(values, count):
    return values * count if len(values) == 1 else values


@pytest.mark.parametrize(
    "layers", [dense_layers(3), expert_layers(2, 5), [layer("lm_head")]], ids=["dense", "moe", "one"]
)
def test_every_figure_of_every_layer_is_in_the_page(layers):
    layers[0].update(fallbacks=["float64 factorization"], output_error=None)
    data = Parsed(page(report(layers))).data()
    assert list(names(data)) == [item["name"] for item in layers]
    for column in COLUMNS:
        if column == "bits_per_weight":
            continue
        values = full(data["layers"][column], len(layers))
        for value, item in zip(values, layers, strict=True):
            assert value == (
                pytest.approx(item[column], rel=1e-3) if isinstance(item[column], float) else item[column]
            )
    fallen = [[data["fallbacks"][i] for i in found] for found in data["layers"]["fallbacks"]]
    assert fallen == [item["fallbacks"] for item in layers]


def test_nothing_is_loaded_from_anywhere():
    text = page(report(evaluation=evaluation()))
    parsed = Parsed(text)
    for tag, attributes in parsed.elements:
        assert attributes.get("src") is None, tag
        assert re.match(r"#|data:", attributes.get("href") or "#"), tag
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttpRequest", text)
    policy = next(
        a["content"] for tag, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'")


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028&'\""


def test_hostile_text_stays_text():
    layers = [layer(f"model.layers.{i}.{HOSTILE}", fallbacks=[HOSTILE]) for i in range(2)]
    hostile = report(
        layers,
        notes=[HOSTILE],
        command=HOSTILE,
        skipped=[{"name": HOSTILE, "shape": [1], "reason": HOSTILE}],
        fingerprint={"model": HOSTILE},
        evaluation={**evaluation(), "dataset": HOSTILE},
    )
    hostile["model"]["name"] = HOSTILE
    parsed = Parsed(page(hostile))
    assert not [tag for tag, _ in parsed.elements if tag == "img"]
    assert len(parsed.scripts()) == 2
    assert not [
        attributes for _, attributes in parsed.elements if any(name.startswith("on") for name in attributes)
    ]
    assert list(names(parsed.data())) == [item["name"] for item in layers]
    assert parsed.visible().count("alert(1)") >= 6


def test_without_fallbacks_the_page_says_so():
    text = Parsed(page(report())).visible()
    assert "All 210 layers were solved as asked; no fallback was needed." in text
    assert "What to do" not in text


def test_every_rung_of_the_ladder_is_explained():
    rungs = [value for name, value in vars(fallback).items() if name.isupper() and isinstance(value, str)]
    assert len(rungs) >= 6
    layers = [layer(f"h.{i}.proj", fallbacks=[name]) for i, name in enumerate(rungs)]
    text = Parsed(page(report(layers))).visible()
    assert f"{len(rungs)} layers of {len(rungs)} needed a fallback" in text
    for name in rungs:
        assert all(part in text for part in explain(name)), name


def test_an_unknown_fallback_is_still_shown():
    text = Parsed(page(report([layer("h.0.proj", fallbacks=["something new"])]))).visible()
    assert "something new 1 layer" in text


def test_long_lists_of_fallen_layers_are_cut():
    layers = expert_layers(1, 40)
    for item in layers:
        item["fallbacks"] = ["float64 factorization"]
    text = Parsed(page(report(layers))).visible()
    assert f"and {len(layers) - 12} more" in text


def test_headline_figures():
    found = {
        tile.label: (tile.value, tile.spread, tile.detail) for tile in tiles(report(evaluation=evaluation()))
    }
    assert found["perplexity"] == (
        "24.90",
        " ± 0.58",
        "+11.9 %, from 22.26 ± 0.51 on 32,704 tokens of wiki.test.txt",
    )
    assert found["KL divergence"] == (
        "0.127",
        " ± 0.004",
        "nats per token from the original; same first choice 84.3 %",
    )
    assert found["size"][0] == "114 MB"
    assert found["size"][2] == "−57.4 %, from 269 MB in bfloat16"
    assert found["time"] == ("62.4 s", "", "peak memory 1.12 GB")


def test_memory_of_several_processes_is_that_of_the_largest():
    found = {tile.label: tile.detail for tile in tiles(report(ranks=2))}
    assert found["time"] == "peak memory 1.12 GB in one of 2 processes"


def test_tuned_blocks_are_counted_and_the_errors_said_to_be_from_before():
    layers = [
        {**layer(f"h.{i}.{kind}"), "tuned": i > 0, "block_error": (0.04, 0.03)}
        for i in range(3)
        for kind in "ab"
    ]
    found = {tile.label: (tile.value, tile.detail) for tile in tiles(report(layers))}
    gain = "their squared error on held-out text fell by 25.0 % on average"
    assert found["blocks better by tuning"] == ("2 of 3", gain)
    assert "adds. Measured before the tuning." in Parsed(page(report(layers))).visible()
    assert "Measured before the tuning" not in page(report())


def test_an_evaluation_that_overflowed():
    broken = evaluation()
    broken["quantized"].update(perplexity=None, stderr=None, kl_stderr=None)
    found = {tile.label: (tile.value, tile.spread) for tile in tiles(report(evaluation=broken))}
    assert found["perplexity"] == ("–", "")
    Parsed(page(report(evaluation=broken)))


def test_without_any_known_error_the_page_still_stands():
    layers = [layer(f"h.{i}.proj", output_error=None, method="rtn", tokens=0) for i in range(3)]
    calibration = {"source": "none", "sequences": 0, "tokens": 0}
    bare = report(
        layers, peak_memory_bytes=None, phases=[], calibration=calibration, output=None, fingerprint={}
    )
    parsed = Parsed(page(bare))
    assert parsed.data()["measures"] == []
    assert "no calibration" in parsed.visible()
    assert "This system does not say" in parsed.visible()


def test_measures_are_offered_where_they_say_something():
    def offered(layers):
        return [measure["key"] for measure in view(report(layers))["data"]["measures"]]

    assert offered(dense_layers(2)) == [
        "true_error",
        "output_error",
        "bits_per_weight",
        "correction",
        "seconds",
    ]
    assert "tokens" in offered(expert_layers())
    assert offered([layer("h.0.x"), layer("h.1.x")]) == ["output_error"]


def test_tokens_have_a_section_only_where_they_differ():
    assert not view(report())["tokens_differ"]
    assert view(report(expert_layers()))["tokens_differ"]
    rtn = [layer("h.0.x"), layer("h.1.x", method="rtn", tokens=0)]
    assert not view(report(rtn))["tokens_differ"]


def test_a_large_mixture_of_experts_stays_small():
    layers = expert_layers(48, 128)
    assert len(layers) == 18624
    text = page(report(layers))
    assert len(text) < 1_500_000
    assert len(Parsed(text).elements) < 600
    assert [stack["kinds"] for stack in Parsed(text).data()["stacks"]] == [
        [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.experts.*.{x}_proj" for x in ("gate", "up", "down")]
    ]


def test_left_out_layers_are_gaps_in_the_map():
    layers = [item for item in dense_layers(3) if item["name"] != "model.layers.1.mlp.down_proj"]
    skipped = [
        {"name": "model.layers.1.mlp.down_proj", "shape": [576, 1536], "reason": "asked"},
        {"name": "model.layers.3.mlp.down_proj", "shape": [576, 1536], "reason": "asked"},
        {"name": "model.layers.0.mlp.gate", "shape": [8, 576], "reason": "router"},
    ]
    data = view(report(layers, skipped=skipped))["data"]
    assert data["stacks"][0]["blocks"] == (0, 1, 2, 3)
    assert data["gaps"] == [[0, 1, 6, "asked"], [0, 3, 6, "asked"]]


def test_skipped_matrices_of_all_blocks_are_one_row():
    skipped = [
        {"name": f"model.layers.{i}.mlp.gate", "shape": [8, 576], "reason": "router"} for i in range(48)
    ]
    skipped += [
        {"name": "lm_head", "shape": [100, 576], "reason": "head"},
        {"name": "4", "shape": [2, 2], "reason": "x"},
    ]
    assert skipped_groups(skipped) == [
        {"reason": "router", "name": "model.layers.*.mlp.gate", "shape": "8 × 576", "count": 48},
        {"reason": "head", "name": "lm_head", "shape": "100 × 576", "count": 1},
        {"reason": "x", "name": "*", "shape": "2 × 2", "count": 1},
    ]


def test_own_times_fill_the_bar():
    evaluated = [*report()["phases"], {
        "name": "evaluate", "parent": None, "seconds": 31.0, "own_seconds": 31.0, "memory": None, "device_memory": None,
    }]  # fmt: skip
    shares = phases(report(phases=evaluated))
    assert sum(share.part for share in shares) == pytest.approx(1)
    assert {share.label: share.text for share in shares}["everything else"] == "0.80 s"
    assert "The evaluation took 31.0 s more." in Parsed(page(report(phases=evaluated))).visible()


def test_memory_that_is_only_a_lower_bound_is_marked():
    text = Parsed(page(report())).visible()
    assert "forward passes 1.12 GB" in text
    assert "solve ≥ 1.09 GB" in text


def test_device_memory_has_its_own_bars():
    measured = report()
    measured["phases"][2]["device_memory"] = {"bytes": 7 * 10**9, "exact": True}
    assert "forward passes on the device 7.00 GB" in Parsed(page(measured)).visible()


def test_a_resumed_run_says_whose_figures_these_are():
    text = Parsed(page(report(resumed_layers=70))).visible()
    assert "70 layers of 210 come from an interrupted run" in text


def test_what_differs_from_the_defaults_is_marked():
    rows = {name: changed for name, _, changed in view(report())["config"]}
    assert {name for name, changed in rows.items() if changed} == {
        "group_size",
        "num_samples",
        "seq_len",
        "dtype",
    }


def test_bits_and_corrections_are_counted():
    layers = [layer("h.0.x", bits=4, correction=0.5), layer("h.1.x", bits=2, correction=0.5)]
    shown = view(report(layers))
    assert [(s.label, s.part, s.note) for s in shown["settings"]] == [
        ("4 bits, group 64", 0.5, "1 layer"),
        ("2 bits, group 64", 0.5, "1 layer"),
    ]
    assert [(s.label, s.text) for s in shown["corrections"]] == [("α = 0.5", "2 layers")]


def test_many_corrections_are_counted_in_ranges():
    layers = [
        layer(f"h.{i}.x", correction=alpha)
        for i, alpha in enumerate((0.0, 0.0, 0.01, 0.2, 0.21, 0.5, 0.9, 1.0))
    ]
    assert [(share.label, share.text) for share in corrections(layers)] == [
        ("α = 0", "2 layers"),
        ("0 < α ≤ 0.2", "2 layers"),
        ("0.2 < α ≤ 0.4", "1 layer"),
        ("0.4 < α ≤ 0.6", "1 layer"),
        ("0.8 < α ≤ 1", "2 layers"),
    ]
