"""The page in a real browser: the script runs without errors and draws what it should, in both colour schemes.

A probe is added to a copy of the page; it writes what it finds into the document, which the browser then prints.
"""

import html
import json
import re
import shutil
import subprocess

import pytest

from fewbit.report.html import page
from report_samples import dense_layers, evaluation, expert_layers, report

BROWSER = next(
    filter(
        None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))
    ),
    None,
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed")

PROBE = """
<script>
addEventListener("load", () => setTimeout(() => {
  const visible = node => { const box = node.getBoundingClientRect(); return box.width >= 2 && box.height >= 2; };
  const all = query => [...document.querySelectorAll(query)];
  const point = (node, type) => node.dispatchEvent(new PointerEvent(type, { bubbles: true }));
  const result = {
    cells: all(".heat td.cell").filter(visible).length,
    colours: new Set(all(".heat td.cell").map(cell => getComputedStyle(cell).backgroundColor)).size,
    fallen: all(".heat td.cell.fallen").length,
    gaps: all(".heat td.cell.gap").length,
    ink: getComputedStyle(document.body).color,
    measures: all("#measures button").map(button => button.textContent),
    wide: document.documentElement.scrollWidth - innerWidth,
    elements: all("*").length,
    canvases: all("#experts canvas").filter(visible).map(canvas => [canvas.width, canvas.height]),
  };
  const last = all(".heat td.cell").at(-1);
  point(last, "pointerover");
  result.tip = document.getElementById("tip").innerText;
  point(document.getElementById("maps"), "pointerleave");
  result.hidden = document.getElementById("tip").hidden;
  for (const key of ["ArrowDown", "ArrowDown", "ArrowRight"])
    document.querySelector(".heat").dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  result.reached = document.querySelector("#tip b").textContent;
  all("#measures button").at(-1).click();
  result.other = document.getElementById("meaning").textContent;
  document.getElementById("all").open = true;
  setTimeout(() => {
    const filter = document.getElementById("filter");
    result.rows = all("#layers tbody tr").length;
    filter.value = "q_proj";
    filter.dispatchEvent(new Event("input"));
    result.filtered = document.getElementById("found").textContent;
    all("#layers thead button")[6].click();
    result.sorted = all("#layers tbody tr").map(row => row.children[6].textContent);
    const out = document.createElement("pre");
    out.id = "probe";
    out.textContent = JSON.stringify(result);
    document.body.append(out);
  }, 50);
}, 50));
</script>
"""


def look(folder, text, width=1280, dark=False):
    """What the probe found, and what the console said."""
    path = folder / "page.html"
    path.write_text(text.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=3000",
        f"--window-size={width},900", f"--user-data-dir={folder / 'profile'}", "--dump-dom",
        *(["--blink-settings=preferredColorScheme=0"] if dark else []), path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, console or done.stderr[-2000:]
    return json.loads(html.unescape(found[1])), console


def test_a_dense_model(tmp_path):
    layers = [item for item in dense_layers(30) if item["name"] != "model.layers.4.mlp.up_proj"]
    layers[3]["fallbacks"] = ["float64 factorization"]
    layers[7].update(true_error=None, output_error=None)
    skipped = [{"name": "model.layers.4.mlp.up_proj", "shape": [1, 1], "reason": "asked to stay"}]
    found, console = look(tmp_path, page(report(layers, skipped=skipped, evaluation=evaluation())))
    assert console == []
    assert found["cells"] == 30 * 7
    assert found["colours"] > 100
    assert (found["fallen"], found["gaps"]) == (1, 1)
    assert found["measures"] == ["true error", "own error", "bits per weight", "correction α", "seconds"]
    assert "model.layers.29.mlp.down_proj" in found["tip"]
    assert "576 × 1536" in found["tip"]
    assert found["hidden"]
    assert found["reached"] == "model.layers.1.self_attn.k_proj"
    assert found["other"].startswith("Time for the layer alone")
    assert found["rows"] == 200
    assert found["filtered"] == "30 of 209 layers"
    errors = [float(text.split()[0]) for text in found["sorted"] if text != "–"]
    assert len(errors) == 29
    assert errors == sorted(errors, reverse=True)
    assert found["sorted"][-1] == "–"
    assert found["wide"] <= 0


def test_a_large_mixture_of_experts_in_the_dark(tmp_path):
    found, console = look(tmp_path, page(report(expert_layers(48, 128))), dark=True)
    assert console == []
    assert found["cells"] == 48 * 7
    assert found["canvases"] == [[128, 48]]
    assert found["elements"] < 2000
    assert "128 layers" in found["tip"]
    assert found["ink"] == "rgb(231, 233, 236)"


def test_eighty_blocks_in_a_narrow_window(tmp_path):
    found, console = look(tmp_path, page(report(dense_layers(80))), width=500)
    assert console == []
    assert found["cells"] == 80 * 7
    assert found["wide"] <= 0
