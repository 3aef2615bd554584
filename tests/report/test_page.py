"""The page: valid HTML, complete, static, and safe with hostile names and missing figures."""

import hashlib
import html.parser
import re
import shutil
import subprocess
from base64 import b64decode, b64encode
from xml.etree import ElementTree

import pytest

from fewbit import formatting
from fewbit.gptq import cholesky as fallback
from fewbit.report.explain import explain
from fewbit.report.heat_map import Scale
from fewbit.report.layer_stats import setting
from fewbit.report.page import corrections, page, phases, skipped_groups, tiles, view
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

    def visible(self):
        return " ".join(" ".join(text for tag, text in self.texts if tag not in ("style", "script")).split())


@pytest.mark.parametrize(
    "layers", [dense_layers(3), expert_layers(2, 5), [layer("lm_head")]], ids=["dense", "moe", "one"]
)
def test_every_layer_is_in_the_table(layers):
    layers[0].update(fallbacks=["float64 factorization"], output_error=None)
    text = Parsed(page(report(layers))).visible()
    for item in layers:
        shape = f"{item['out_features']} × {item['in_features']}"
        errors = " ".join(formatting.percent(item[name]) for name in ("true_error", "output_error"))
        row = f"{item['name']} {errors} {shape} {setting(item)} {item['tokens']:,}"
        assert row in text, row


def test_the_picture_can_be_saved():
    parsed = Parsed(page(report(dense_layers())))
    (link,) = [a for _, a in parsed.elements if "download" in a]
    kind, data = link["href"].split(",")
    assert kind == "data:image/svg+xml;base64"
    root = ElementTree.fromstring(b64decode(data))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(root.findall(".//{*}rect")) >= 210


@pytest.mark.parametrize(("kl", "style"), [(0.03, "good"), (0.3, "warn")])
def test_the_verdict_is_on_top(kl, style):
    measured = evaluation()
    measured["quantized"]["kl"] = kl
    text = page(report(evaluation=measured))
    verdict = formatting.verdict(kl)[1:]
    assert re.search(rf'<main>\s*<p class="verdict {style}">.{verdict}', text)
    assert "was not measured" in page(report())


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
    digest = b64encode(hashlib.sha256(script(parsed).encode()).digest()).decode()
    assert policy.endswith(f"; script-src 'sha256-{digest}'")


def script(parsed):
    [text] = [text for tag, text in parsed.texts if tag == "script"]
    return text


# What sort.js needs of a document: a table of one column of figures and one of names.
DOM = """
const cell = (text, value) => ({ textContent: text, dataset: value === undefined ? {} : { value } });
const attributes = () => {
  const kept = {}, listeners = {};
  return {
    getAttribute: (name) => kept[name], setAttribute: (name, value) => kept[name] = value,
    removeAttribute: (name) => delete kept[name],
    addEventListener: (name, call) => listeners[name] = call, fire: (name, event) => listeners[name](event),
  };
};
const headings = [attributes(), attributes()];
const rows = [["5 %", "0.05", "layers.10"], ["10 %", "0.1", "layers.2"], ["–", "", "layers.1"]].map(
  ([text, value, name]) => ({ cells: [cell(text, value), cell(name)] }));
const body = { rows, append: (...sorted) => { body.rows = sorted; } };
const table = { tHead: { rows: [{ cells: headings }] }, tBodies: [body] };
globalThis.document = { querySelectorAll: (what) => what === "table.sortable" ? [table] : [] };
const names = () => body.rows.map((row) => row.cells[1].textContent.slice(7));
"""


def test_a_click_sorts_the_table_of_layers():
    node = shutil.which("node") or pytest.skip("node is not installed")
    parsed = Parsed(page(report()))
    assert [a["class"] for tag, a in parsed.elements if "sortable" in a.get("class", "")] == [
        "figures sortable"
    ]
    clicks = [(0, "click", "{}"), (0, "click", "{}"), (1, "keydown", "{key: 'Enter'}"), (1, "click", "{}")]
    fired = "".join(
        f"headings[{column}].fire('{name}', {event});"
        f"console.log(names().join(), headings[{column}].getAttribute('aria-sort'));"
        for column, name, event in clicks
    )
    done = subprocess.run([node, "-e", DOM + script(parsed) + fired], capture_output=True, text=True)
    assert done.stdout.split("\n")[:-1] == [
        "2,10,1 descending",
        "1,10,2 ascending",
        "1,2,10 ascending",
        "10,2,1 descending",
    ], done.stderr


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
    assert [tag for tag, _ in parsed.elements].count("script") == 1
    assert "alert" not in script(parsed)
    assert not [
        attributes for _, attributes in parsed.elements if any(name.startswith("on") for name in attributes)
    ]
    assert parsed.visible().count("alert(1)") >= 6


def test_without_fallbacks_the_page_says_so():
    text = Parsed(page(report())).visible()
    assert "All 210 layers were solved as asked; no fallback was needed." in text
    assert "What to do" not in text


def test_every_fallback_is_explained():
    names = [value for name, value in vars(fallback).items() if name.isupper() and isinstance(value, str)]
    assert len(names) >= 6
    layers = [layer(f"h.{i}.proj", fallbacks=[name]) for i, name in enumerate(names)]
    text = Parsed(page(report(layers))).visible()
    assert f"{len(names)} layers of {len(names)} needed a fallback" in text
    for name in names:
        assert all(part in text for part in explain(name)), name


def test_unknown_fallback_is_shown():
    text = Parsed(page(report([layer("h.0.proj", fallbacks=["something new"])]))).visible()
    assert "something new 1 layer" in text


def test_long_lists_of_layers_are_cut():
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


def test_memory_of_several_processes():
    found = {tile.label: tile.detail for tile in tiles(report(ranks=2))}
    assert found["time"] == "peak memory 1.12 GB in one of 2 processes"


def test_tuned_blocks_are_counted():
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


def test_page_without_known_errors():
    layers = [layer(f"h.{i}.proj", output_error=None, method="rtn", tokens=0) for i in range(3)]
    calibration = {"source": "none", "sequences": 0, "tokens": 0}
    bare = report(
        layers, peak_memory_bytes=None, phases=[], calibration=calibration, output=None, fingerprint={}
    )
    parsed = Parsed(page(bare))
    assert view(bare)["scale"] is None
    assert "no calibration" in parsed.visible()
    assert "This system does not say" in parsed.visible()


def test_tokens_section_only_where_they_differ():
    assert not view(report())["tokens_differ"]
    assert view(report(expert_layers()))["tokens_differ"]
    rtn = [layer("h.0.x"), layer("h.1.x", method="rtn", tokens=0)]
    assert not view(report(rtn))["tokens_differ"]


def test_a_large_mixture_stays_small():
    layers = expert_layers(48, 128)
    assert len(layers) == 18624
    text = page(report(layers))
    assert len(text) < 1_000_000
    shown = view(report(layers))
    (heat_map,) = shown["maps"]
    assert [kind for _, kind, _ in heat_map.rows] == [
        *(f"self_attn.{x}_proj" for x in "qkvo"),
        *(f"mlp.experts.*.{x}_proj" for x in ("gate", "up", "down")),
    ]
    assert len(heat_map.cells) == 48 * 7
    assert len(shown["layers"]) == 1000
    assert shown["layers"][0]["output_error"] == max(item["output_error"] or 0 for item in layers)


def test_skipped_layers_are_gaps_in_the_map():
    layers = [item for item in dense_layers(3) if item["name"] != "model.layers.1.mlp.down_proj"]
    skipped = [
        {"name": "model.layers.1.mlp.down_proj", "shape": [576, 1536], "reason": "asked"},
        {"name": "model.layers.3.mlp.down_proj", "shape": [576, 1536], "reason": "asked"},
        {"name": "model.layers.0.mlp.gate", "shape": [8, 576], "reason": "router"},
    ]
    (heat_map,) = view(report(layers, skipped=skipped))["maps"]
    assert [block for _, block in heat_map.blocks] == ["0", "1", "2", "3"]
    gaps = {cell.hint for cell in heat_map.cells if cell.style == "gap"}
    assert gaps == {f"model.layers.{block}.mlp.down_proj: asked" for block in (1, 3)}


def test_cells_have_colors_fallbacks_and_hints():
    layers = dense_layers(30)
    layers[3]["fallbacks"] = ["float64 factorization"]
    layers[7].update(true_error=None, output_error=None)
    shown = view(report(layers))
    cells = shown["maps"][0].cells
    assert {cell.style for cell in cells} > {"h0", "h9", "unknown"}
    assert cells[7].style == "unknown"
    assert [cell.fallback for cell in cells].count(True) == 1
    assert cells[3].hint.startswith("model.layers.0.self_attn.o_proj\n4 bits, group 64; true error")
    assert cells[3].hint.endswith("fallbacks: float64 factorization")
    low, _, high = shown["scale"].ticks()
    errors = [item["true_error"] for item in layers if item["true_error"] is not None]
    assert (low, high) == (formatting.percent(min(errors)), formatting.percent(max(errors)))


def test_the_scale_is_logarithmic_for_wide_ranges():
    assert not Scale(0.01, 0.05).logarithmic
    wide = Scale(0.0001, 1.0)
    assert wide.logarithmic
    assert [wide.style(error) for error in (0.0001, 0.0099, 0.0101, 1.0)] == ["h0", "h4", "h5", "h9"]
    assert Scale(0.1, 0.1).style(0.1) == "h5"


def test_skipped_matrices_are_merged_over_blocks():
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


def test_lower_bounds_of_memory_are_marked():
    text = Parsed(page(report())).visible()
    assert "forward passes 1.12 GB" in text
    assert "solve ≥ 1.09 GB" in text


def test_device_memory_has_its_own_bars():
    measured = report()
    measured["phases"][2]["device_memory"] = {"bytes": 7 * 10**9, "exact": True}
    assert "forward passes on the device 7.00 GB" in Parsed(page(measured)).visible()


def test_resumed_layers_are_counted():
    text = Parsed(page(report(resumed_layers=70))).visible()
    assert "70 layers of 210 come from an interrupted run" in text


def test_changed_settings_are_marked():
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
