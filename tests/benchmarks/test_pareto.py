"""The chart of sizes and divergences, and rounding to ggml's types."""

from xml.etree import ElementTree

import pareto
import pareto_chart
import pytest
import torch


def record(tool, mode, size, bits, kl):
    setting = {"tool": tool, "mode": mode, "size": size}
    return {"setting": setting, "bits": bits, "texts": {"wiki": {"kl": kl}}}


def test_the_chart_shows_every_point(tmp_path):
    records = [
        record("fewbit", "best", "2", 2.3, 0.8),
        record("fewbit", "best", "4", 4.3, 0.09),
        record("gptqmodel", "default", "4", 4.3, 0.25),
        record("gguf", "imatrix", "Q4_0", 4.5, 0.2),
        record("gguf", "imatrix", "IQ2_XS", 2.4, 0.9),
        {"setting": {"tool": "gptqmodel", "mode": "default", "size": "2"}, "error": "refused"},
    ]
    pareto_chart.write(tmp_path / "chart.svg", records)
    tree = ElementTree.parse(tmp_path / "chart.svg")
    circles = [e for e in tree.iter() if e.tag.endswith("circle")]
    assert len(circles) == 5
    lines = [e for e in tree.iter() if e.tag.endswith("polyline")]
    assert len(lines) == 2
    texts = [e.text for e in tree.iter() if e.tag.endswith("text")]
    assert {"fewbit best", "GPTQModel 7.7", "GGUF codebooks, imatrix", "Q4_0", "0.1", "9"} <= set(texts)
    lower = {e[0].text: float(e.get("cy")) for e in circles}
    assert lower["fewbit best, 4: 0.0900"] > lower["fewbit best, 2: 0.8000"]  # smaller divergences lie lower


def test_the_points_are_listed_by_size(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{pareto_chart.BEGIN}\nold\n{pareto_chart.END}\nafter\n")
    records = [record("fewbit", "best", "4", 4.36, 0.09), record("gguf", "imatrix", "Q2_K", 2.625, 1.3)]
    for one in records:
        one["texts"] = {key: {**one["texts"]["wiki"], "kl_stderr": 0.01} for key in ("wiki", "austen")}
    pareto_chart.write_table(page, [*records, {"setting": records[0]["setting"], "error": "refused"}])
    lines = page.read_text().splitlines()
    assert lines[0] == "before"
    assert lines[-1] == "after"
    assert "| gguf imatrix: Q2_K | 2.62 | 1.3000 ± 0.0100 | 1.3000 ± 0.0100 |" in lines
    assert lines.index("| fewbit best: 4 bits | 4.36 | 0.0900 ± 0.0100 | 0.0900 ± 0.0100 |") == 5
    assert "old" not in lines


def test_points_are_listed_once():
    found = list(pareto.settings(["fewbit", "gguf", "gptqmodel"]))
    assert len(found) == len(set(found)) == 48 + 15 + 8


def test_ggml_types_come_back(tmp_path):
    pytest.importorskip("llama_cpp")
    from ggml_types import Ggml

    W = torch.randn(8, 576)
    found, nbytes = Ggml(None).round_trip(W, "Q4_K", torch.ones(576))  # Q5_0: 576 is no multiple of 256
    assert nbytes == 8 * 576 // 32 * 22
    assert (found - W).norm() < 0.06 * W.norm()
