"""Numbers as text for people. None, an unknown value, becomes a dash."""

from __future__ import annotations

import math

DASH = "–"

# KL divergence below which a verdict holds, in nats per token. The scale: Llama-3-8B on wikitext in the
# formats of llama.cpp, as its documentation measured them: Q8_0 0.001, Q6_K 0.005, Q4_K_M 0.03, Q4_0 0.07, Q3_K_M 0.10,
# IQ3_XXS 0.18, Q2_K 0.45.
_VERDICTS = (
    (0.01, "hardly to be told from the original"),
    (0.05, "close to the original"),
    (0.1, "a small loss"),
    (0.25, "a clear loss"),
    (0.5, "a large loss"),
)
ACCEPTABLE_KL = 0.1
_BROKEN = "broken for most uses"


def percent(value: float | None) -> str:
    """A fraction with three digits: ``12.3 %``, ``0.417 %``."""
    return DASH if value is None else f"{_digits(100 * value)} %"


def number(value: float | None) -> str:
    """At least three digits, with commas for thousands: ``0.0127``, ``24.90``, ``3,215,000``."""
    return DASH if value is None else _fixed(value, _decimals(value))


def spread(value: float | None, error: float | None) -> str:
    """`error` with the decimals of `number` (value), such as `` ± 0.53``; empty if either is unknown."""
    return "" if value is None or error is None else f" ± {_fixed(error, _decimals(value))}"


def verdict(kl: float) -> str:
    """What a KL divergence from the original means, in words."""
    return next((words for limit, words in _VERDICTS if kl < limit), _BROKEN)


def alpha(value: float | None) -> str:
    """The correction, 0 to 1: two decimals."""
    return DASH if value is None else f"{value:.2f}"


def size(count: float | None) -> str:
    """Bytes, in powers of ten: ``538 MB``, ``4.12 GB``."""
    if count is None:
        return DASH
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{_digits(value) if unit != 'bytes' else round(value)} {unit}"
        value /= 1000
    return f"{_digits(value)} TB"


def count(value: float | None) -> str:
    """A whole number, with commas for thousands."""
    return DASH if value is None else f"{round(value):,}"


def parameters(value: int) -> str:
    """``135 M``, ``6.74 B``."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{_digits(value / limit)} {unit}"
    return str(value)


def duration(seconds: float | None) -> str:
    """``0.42 s``, ``38.1 s``, ``2 min 05 s``, ``3 h 12 min``."""
    if seconds is None:
        return DASH
    if seconds < 99.95:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def plural(amount: int, one: str, many: str | None = None) -> str:
    """``1 layer``, ``1,204 layers``."""
    return f"{amount:,} {one if amount == 1 else many or one + 's'}"


def _digits(value: float) -> str:
    """Three significant digits."""
    rounded = float(f"{value:.3g}")
    decimals = 2 - math.floor(math.log10(abs(rounded))) if rounded else 2
    return _fixed(value, min(max(decimals, 0), 9))


def _decimals(value: float) -> int:
    """Number of decimals that `number` writes."""
    magnitude = abs(value)
    if magnitude >= 1000:
        return 0
    return 2 if magnitude >= 1 or not value else min(2 - math.floor(math.log10(magnitude)), 9)


def _fixed(value: float, decimals: int) -> str:
    return f"{value:,.{decimals}f}"
