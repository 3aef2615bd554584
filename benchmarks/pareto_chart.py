"""The chart of benchmarks/pareto.py as SVG: KL divergence (logarithmic) against bits per weight."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BEGIN, END = (
    "<!-- points: begin (written by benchmarks/pareto.py --chart --table) -->",
    "<!-- points: end -->",
)
_WIDTH, _HEIGHT = 860, 520
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 190, 50, 60
_BITS = (2.0, 9.0)
_LINES = {  # (tool, mode) → label, color, width, dashes
    ("fewbit", "fast"): ("fewbit fast", "#7fcba4", 2, ""),
    ("fewbit", "default"): ("fewbit default", "#20a36f", 2.5, ""),
    ("fewbit", "default, loss-aware"): ("… loss-aware", "#20a36f", 2.5, "8 3"),
    ("fewbit", "default, loss-aware, rotated"): ("… loss-aware, rotated", "#20a36f", 2.5, "2 3"),
    ("fewbit", "best"): ("fewbit best", "#063b2a", 3, ""),
    ("fewbit", "default, loss-aware, rotated, distilled"): ("… both, distilled", "#063b2a", 3, "8 3"),
    ("fewbit", "asymmetric, 32"): ("fewbit asym, groups of 32", "#b7950b", 1.5, ""),
    ("fewbit", "asymmetric, 32, loss-aware, rotated"): ("… loss-aware, rotated", "#b7950b", 1.5, "2 3"),
    ("gptqmodel", "default"): ("GPTQModel 7.7", "#c0392b", 2, ""),
    ("gptqmodel", "mse"): ("GPTQModel 7.7, mse", "#e08e79", 2, ""),
    ("auto-round", "default"): ("auto-round 0.16", "#8e44ad", 2, ""),
    ("llm-compressor", "default"): ("llm-compressor", "#d68910", 2, ""),
}
_CODEBOOKS = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS")
_STYLE = """
svg { background: #fff; font: 13px system-ui, sans-serif; }
text { fill: #333; } .grid { stroke: #ddd; } .title { font-size: 17px; font-weight: 600; }
@media (prefers-color-scheme: dark) { svg { background: #0d1117; } text { fill: #ddd; } .grid { stroke: #333; } }
"""


def write(path: Path, records: Iterable[dict[str, Any]], text: str = "wiki") -> None:
    """Draw all points that have a score on `text`."""
    points: dict[tuple[str, str], list[tuple[float, float, str]]] = defaultdict(list)
    for record in records:
        kl = record.get("texts", {}).get(text, {}).get("kl")
        if kl:
            one = record["setting"]
            points[one["tool"], one["mode"]].append((record["bits"], kl, one["size"]))
    lowest = min(kl for values in points.values() for _, kl, _ in values)
    scale = _Scale(10 ** math.floor(math.log10(lowest)), 10.0)
    path.write_text(_svg(points, scale), encoding="utf-8")


def write_table(document: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write all points into the page `document`, between its two marks, by size."""
    lines = ["| | stored bits per weight | wiki: KL | Austen: KL |", "|---|---|---|---|"]
    for record in sorted((r for r in records if "texts" in r), key=lambda r: r["bits"]):
        one, texts = record["setting"], record["texts"]
        name = one["size"] if one["tool"] == "gguf" else f"{one['size']} bits"
        kl = [f"{texts[text]['kl']:.4f} ± {texts[text]['kl_stderr']:.4f}" for text in ("wiki", "austen")]
        lines.append(f"| {one['tool']} {one['mode']}: {name} | {record['bits']:.2f} | {kl[0]} | {kl[1]} |")
    text = document.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    document.write_text("\n".join([before + BEGIN, *lines, END + after]), encoding="utf-8")


class _Scale:
    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def x(self, bits: float) -> float:
        return _LEFT + (bits - _BITS[0]) / (_BITS[1] - _BITS[0]) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, kl: float) -> float:
        kl = min(max(kl, self.low), self.high)
        share = math.log(kl / self.low) / math.log(self.high / self.low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _svg(points: dict[tuple[str, str], list[tuple[float, float, str]]], scale: _Scale) -> str:
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        'aria-label="KL divergence against bits per weight">',
        f"<style>{_STYLE}</style>",
        f'<text class="title" x="{_LEFT}" y="26">KL divergence to the original against size '
        "(SmolLM2-135M, held-out Wikipedia; lower is better)</text>",
        *_axes(scale),
    ]
    legend = _TOP + 10
    for key, (label, color, width, dashes) in _LINES.items():
        values = sorted(points.get(key, []))
        if not values:
            continue
        line = " ".join(f"{scale.x(bits):.1f},{scale.y(kl):.1f}" for bits, kl, _ in values)
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="{width}" '
            f'stroke-dasharray="{dashes}"/>'
        )
        parts += [_dot(scale, bits, kl, color, f"{label}, {size}: {kl:.4f}") for bits, kl, size in values]
        parts += _legend(legend, label, color)
        legend += 20
    gguf = points.get(("gguf", "imatrix"), [])
    for label, color, chosen in (
        ("GGUF grids, imatrix", "#2471a3", [p for p in gguf if p[2] not in _CODEBOOKS]),
        ("GGUF codebooks, imatrix", "#85c1e9", [p for p in gguf if p[2] in _CODEBOOKS]),
    ):
        for bits, kl, size in chosen:
            parts.append(_dot(scale, bits, kl, color, f"{size}: {kl:.4f}"))
            parts.append(
                f'<text x="{scale.x(bits) + 6:.1f}" y="{scale.y(kl) - 5:.1f}" font-size="9">{size}</text>'
            )
        if chosen:
            parts += _legend(legend, label, color)
            legend += 20
    return "\n".join([*parts, "</svg>\n"])


def _axes(scale: _Scale) -> list[str]:
    parts = []
    for bits in range(int(_BITS[0]), int(_BITS[1]) + 1):
        x = scale.x(bits)
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text x="{x}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{bits}</text>')
    decade = scale.low
    while decade <= scale.high * 1.001:
        for step in (1, 2, 5):
            if decade * step <= scale.high * 1.001:
                y = scale.y(decade * step)
                parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
                parts.append(f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{decade * step:g}</text>')
        decade *= 10
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - 14}" text-anchor="middle">stored bits per weight of the decoder</text>'
    )
    return parts


def _dot(scale: _Scale, bits: float, kl: float, color: str, title: str) -> str:
    x, y = f"{scale.x(bits):.1f}", f"{scale.y(kl):.1f}"
    return f'<circle cx="{x}" cy="{y}" r="4" fill="{color}"><title>{title}</title></circle>'


def _legend(y: float, label: str, color: str) -> list[str]:
    x = _WIDTH - _RIGHT + 16
    return [
        f'<rect x="{x}" y="{y - 9}" width="14" height="10" fill="{color}"/>',
        f'<text x="{x + 20}" y="{y}">{label}</text>',
    ]
