"""Draw the two pictures of the documentation: pipeline.svg and lockstep.svg.

    python docs/draw_pipeline.py

Rectangles and arrows only; the colors follow the reader's light or dark setting.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
STYLE = """
  svg { --line: #57606a; --text: #1f2328; --fill: #f6f8fa; --mark: #0f766e; --soft: #d1ebe7 }
  @media (prefers-color-scheme: dark) {
    svg { --line: #9198a1; --text: #e6edf3; --fill: #21262d; --mark: #2dd4bf; --soft: #134e4a }
  }
  text { font: 13px system-ui, sans-serif; fill: var(--text) }
  .title { font-weight: 600 } .small { font-size: 11.5px } .left { text-anchor: start } .mid { text-anchor: middle }
  rect { fill: var(--fill); stroke: var(--line); rx: 4 }
  .mark { fill: var(--soft); stroke: var(--mark) } .frame { fill: none; stroke-dasharray: 5 4 }
  path { fill: none; stroke: var(--line); stroke-width: 1.4; marker-end: url(#tip) }
  path.mark { fill: none; stroke: var(--mark) } path.plain { marker-end: none } path.dashed { stroke-dasharray: 3 4 }
  circle { fill: var(--mark); stroke: none } #tip path { fill: var(--line); stroke: none; marker-end: none }
"""


def text(x: float, y: float, words: str, kind: str = "mid") -> str:
    """One line of text."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{words}</text>'


def rect(x: float, y: float, width: float, height: float, kind: str = "") -> str:
    """A rectangle."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" class="{kind}"/>'


def box(x: float, y: float, title: str, *lines: str, width: float = 150, kind: str = "") -> str:
    """A rectangle with a title and smaller lines below it."""
    middle = x + width / 2
    parts = [rect(x, y, width, 26 + 16 * len(lines), kind), text(middle, y + 18, title, "mid title")]
    parts += [text(middle, y + 35 + 16 * i, line, "mid small") for i, line in enumerate(lines)]
    return "\n".join(parts)


def arrow(*points: tuple[float, float], kind: str = "") -> str:
    """A line through `points` with a tip at its end."""
    return f'<path class="{kind}" d="M{" L".join(f"{x:g},{y:g}" for x, y in points)}"/>'


def picture(width: int, height: int, label: str, parts: list[str]) -> str:
    """A whole SVG file."""
    tip = (
        '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
    defs = f'<style>{STYLE}</style>\n<defs>{tip}<path d="M0,0 L8,4 L0,8 Z"/></marker></defs>'
    return "\n".join([head, defs, *parts, "</svg>", ""])


def pipeline() -> str:
    """The path of the data from a model folder to a model that runs."""
    top, low = 70, 196
    return picture(
        940,
        352,
        "From a model folder and a text through the calibration pass to a checkpoint and a model that runs",
        [
            text(20, 24, "fewbit.quantize", "left title"),
            box(20, top, "Calibration text", "calibration/", "batches of tokens"),
            box(20, low, "Model folder", "modeling/, planning", "settings per layer"),
            rect(210, 40, 500, 232, "frame"),
            text(222, 58, "pipeline/ : once per layer", "left small"),
            box(230, top, "Forward passes", "scheduler", "all batches pause"),
            box(230, low, "Weights", "streaming:", "one block at a time"),
            box(400, top, "Statistics", "H = X Xᵀ", "C = (X̃ − X) Xᵀ", width=130),
            box(550, top, "gptq/", "target, grid,", "round columns", width=140, kind="mark"),
            box(550, low, "QuantizedMatrix", "codes, scales,", "zero points", width=140, kind="mark"),
            box(770, low, "Journal", "finished blocks,", "for resuming"),
            box(770, top, "Checkpoint", "checkpoint/", "report/"),
            arrow((170, top + 29), (228, top + 29)),
            arrow((170, low + 29), (228, low + 29)),
            arrow((305, low), (305, top + 60)),
            arrow((380, top + 29), (398, top + 29)),
            arrow((530, top + 29), (548, top + 29)),
            arrow((620, top + 58), (620, low - 2)),
            arrow((550, low + 29), (382, low + 29), kind="mark"),
            text(465, low + 20, "quantized weight", "mid small"),
            text(465, low + 46, "for the layers after it", "mid small"),
            arrow((690, low + 29), (768, low + 29)),
            arrow((845, low), (845, top + 60)),
            text(20, 306, "fewbit.load", "left title"),
            *(
                box(x, 318, name, width=width)
                for x, width, name in (
                    (20, 150, "Checkpoint"),
                    (210, 150, "verify, header"),
                    (400, 130, "QuantLinear"),
                    (570, 140, "kernels/"),
                    (750, 170, "transformers model"),
                )
            ),
            *(arrow((a, 331), (b - 2, 331)) for a, b in ((170, 210), (360, 400), (530, 570), (710, 750))),
        ],
    )


def lockstep() -> str:
    """Three batches that wait at one layer."""
    layers = ["q, k, v", "o", "gate, up", "down"]
    xs = [190 + 170 * i for i in range(4)]
    now = 2
    parts = [text(20, 30, "Forward pass of", "left small")]
    for i, (x, name) in enumerate(zip(xs, layers, strict=True)):
        parts += [rect(x - 34, 62, 68, 142, "mark" if i < now else ""), text(x, 222, name, "mid title")]
        state = "quantized" if i < now else "being quantized" if i == now else "original"
        parts.append(text(x, 239, state, "mid small"))
    for row in range(3):
        y = 85 + 48 * row
        parts += [
            text(20, y + 5, f"batch {row + 1}", "left"),
            arrow((84, y), (xs[now] - 8, y), kind="mark plain"),
            f'<circle cx="{xs[now]}" cy="{y}" r="7"/>',
            arrow((xs[now] + 10, y), (800, y), kind="dashed"),
        ]
    parts += [
        text(xs[now], 24, "All batches are paused here:", "mid title"),
        text(xs[now], 43, "build H, round W with GPTQ, replace W, resume", "mid small"),
    ]
    return picture(820, 252, "Three forward passes, all paused at the layer that is being quantized", parts)


PICTURES = {"pipeline.svg": pipeline, "lockstep.svg": lockstep}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
