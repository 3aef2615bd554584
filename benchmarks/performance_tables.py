"""The tables and the plot of docs/performance-measurements.md, from the JSON of kernels_cpu.py and decode_cpu.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

BASE = "Linear"
_OTHER_BASE = "Linear (GPTQModel's torch)"
_OF_GPTQMODEL = ("torch_cpu_avx512", "torch_aten")
_LABELS = {
    "cpu": "**fewbit** (`cpu`)",
    "cpu_a16": "fewbit, 16-bit activations (`cpu_a16`)",
    "cpu_a8": "fewbit, 8-bit activations (`cpu_a8`)",
    "Linear": "bfloat16 Linear",
    "torch operator": "torch's int4 operator",
    "dequantize": "dequantize, then oneDNN bfloat16",
    "onnxruntime": "onnxruntime MatMulNBits",
    "torch_cpu_avx512": "GPTQModel `torch_cpu_avx512`",
    "torch_aten": "GPTQModel `torch_aten`",
}


def base_seconds(row: dict[str, Any], name: str) -> float | None:
    """What `name` is compared with: the bfloat16 Linear of the same process."""
    base = _OTHER_BASE if name in _OF_GPTQMODEL else BASE
    return row[base]["minimum"] if base in row else None


def shape_lines(name: str, results: dict[str, Any]) -> str:
    """One shape for the screen: a line per number of tokens, milliseconds and ratio to the bfloat16 Linear."""
    lines = [name]
    for tokens, row in results["shapes"][name]["tokens"].items():
        cells = []
        for candidate, one in row.items():
            base = base_seconds(row, candidate)
            ratio = f" ({base / one['minimum']:.2f}x)" if base else ""
            cells.append(f"{candidate} {one['minimum'] * 1e3:.3f}{ratio}")
        lines.append(f"  {tokens:>4} tokens: " + ", ".join(cells))
    return "\n".join(lines)


def kernels(results: dict[str, Any]) -> str:
    """One table per shape: milliseconds, share of bandwidth at one token, speed against the bfloat16 Linear."""
    machine = results["machine"]
    peaks = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in machine["peaks"].items())
    parts = [
        f"{machine['threads']} threads; measured limits: {machine['read_bandwidth'] / 1e9:.1f} GB/s read from "
        f"memory, {peaks}. Milliseconds; in brackets, times as fast as the bfloat16 Linear in the same run."
    ]
    for name, found in results["shapes"].items():
        parts.append(_shape_table(name, found, machine["read_bandwidth"]))
    return "\n\n".join(parts)


def _shape_table(name: str, found: dict[str, Any], bandwidth: float) -> str:
    counts = sorted(found["tokens"], key=int)
    lines = [
        f"**{name}**",
        "",
        "| | "
        + " | ".join(f"{count} token{'s' if count != '1' else ''}" for count in counts)
        + " | of bandwidth | error |",
        "|---|" + "---|" * (len(counts) + 2),
    ]
    candidates = dict.fromkeys(name for count in counts for name in found["tokens"][count])
    candidates.pop(_OTHER_BASE, None)
    for candidate in candidates:
        cells = [_cell(found["tokens"][count], candidate) for count in counts]
        first = found["tokens"].get("1", {}).get(candidate)
        quantized = not candidate.endswith("Linear") and candidate != "dequantize"
        share = f"{found['nbytes'] / first['minimum'] / bandwidth:.0%}" if first and quantized else ""
        error = max(found["tokens"][c][candidate]["error"] for c in counts if candidate in found["tokens"][c])
        lines.append(f"| {_LABELS.get(candidate, candidate)} | {' | '.join(cells)} | {share} | {error:.1e} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any], candidate: str) -> str:
    if candidate not in row:
        return ""
    seconds, base = row[candidate]["minimum"], base_seconds(row, candidate)
    digits = 3 if seconds < 0.01 else 1
    ratio = f" ({base / seconds:.2f}×)" if base and candidate != BASE else ""
    return f"{seconds * 1e3:.{digits}f}{ratio}"


def decode(results: dict[str, Any]) -> str:
    """One table per model: tokens/s, ratios to transformers' bfloat16, memory."""
    parts = []
    for model, found in results["models"].items():
        base = found.get("transformers bfloat16")
        lines = [
            f"**{model}**, {results['threads']} threads, {results['prefill']} and {results['decode']} tokens",
            "",
            "| | prefill tokens/s | decode tokens/s | load | peak memory of the process |",
            "|---|---|---|---|---|",
        ]
        for name, one in found.items():
            cells = []
            for phase in ("prefill", "decode"):
                ratio = (
                    f" ({base[phase] / one[phase]:.2f}×)" if base and name != "transformers bfloat16" else ""
                )
                cells.append(f"{1 / one[phase]:.1f}{ratio}")
            memory = f"{one['peak_bytes'] / 2**20:.0f} MiB"  # after loading, files may only be mapped
            lines.append(f"| {name} | {cells[0]} | {cells[1]} | {one['load_seconds']:.1f} s | {memory} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def put(document: Path, mark: str, text: str) -> None:
    """Replace what is between ``<!-- mark -->`` and ``<!-- /mark -->``."""
    whole = document.read_text()
    pattern = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    if not pattern.search(whole):
        raise SystemExit(f"{document} has no place for it: <!-- {mark} --> and <!-- /{mark} -->")
    document.write_text(pattern.sub(lambda found: f"{found[1]}{text}\n{found[2]}", whole))


_COLOURS = ("#1b6ca8", "#c8552b", "#2a8f5b", "#8456a8", "#a08a1f", "#b03a6b", "#4a4a4a", "#1fa0a0")


def sweep_svg(results: dict[str, Any]) -> str:
    """Speed relative to the bfloat16 Linear by number of tokens, both axes logarithmic, as SVG."""
    import math

    found = max(results["shapes"].items(), key=lambda item: len(item[1]["tokens"]))
    name, rows = found[0], found[1]["tokens"]
    counts = sorted(map(int, rows))
    names = [
        n for n in dict.fromkeys(n for row in rows.values() for n in row) if n not in (BASE, _OTHER_BASE)
    ]
    width, height, left, top, right, bottom = 860, 460, 60, 40, 240, 50

    def x(count: int) -> float:
        span = math.log2(counts[-1] / counts[0]) or 1.0
        return left + (width - left - right) * math.log2(count / counts[0]) / span

    lowest, highest = 0.125, 16.0

    def y(ratio: float) -> float:
        inside = min(max(ratio, lowest), highest)
        return (
            height
            - bottom
            - (height - top - bottom) * math.log2(inside / lowest) / math.log2(highest / lowest)
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="20" font-size="14">{name}: times as fast as a bfloat16 Linear, by tokens</text>',
    ]
    ratio = lowest
    while ratio <= highest:
        line = "#222" if ratio == 1 else "#ddd"
        parts.append(f'<path d="M{left} {y(ratio):.1f}H{width - right}" stroke="{line}"/>')
        parts.append(f'<text x="{left - 8}" y="{y(ratio) + 4:.1f}" text-anchor="end">{ratio:g}×</text>')
        ratio *= 2
    for count in counts:
        parts.append(
            f'<text x="{x(count):.1f}" y="{height - bottom + 18}" text-anchor="middle">{count}</text>'
        )
    for index, candidate in enumerate(names):
        points = []
        for count in counts:
            row = rows[str(count)]
            base = base_seconds(row, candidate)
            if candidate in row and base:
                points.append(f"{x(count):.1f},{y(base / row[candidate]['minimum']):.1f}")
        colour = _COLOURS[index % len(_COLOURS)]
        thick = 3 if candidate in ("cpu", "cpu_a8") else 1.5
        parts.append(
            f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="{thick}"/>'
        )
        label = top + 16 + 18 * index
        parts.append(
            f'<path d="M{width - right + 14} {label - 4}h22" stroke="{colour}" stroke-width="{thick}"/>'
        )
        parts.append(f'<text x="{width - right + 42}" y="{label}">{candidate}</text>')
    return "\n".join([*parts, "</svg>\n"])
