"""What each fallback of the solver means for the result, and what to do about it."""

from __future__ import annotations

from typing import NamedTuple

from ..gptq import cholesky as fallback


class Explanation(NamedTuple):
    """What happened, and the remedy."""

    meaning: str
    remedy: str


_MORE_TEXT = "Give more calibration text (--num-samples, --seq-len), or text of more kinds."

_EXPLANATIONS = {
    fallback.TOKENS_DROPPED: Explanation(
        "Some calibration tokens reached the layer as NaN or infinity. They were left out; the others were used.",
        "If they are many, the model overflows in this dtype: try --dtype bfloat16 or float32.",
    ),
    fallback.UNDER_ROUTED: Explanation(
        "The router sent too few calibration tokens to this expert to know its inputs. It was also calibrated with as "
        "many other tokens of the same layer as it lacked.",
        _MORE_TEXT,
    ),
    fallback.NO_TOKENS: Explanation(
        "No calibration token with a signal reached the layer: an expert that was never chosen, or a part of the "
        "model that this text does not use. Nothing is known about its inputs.",
        _MORE_TEXT,
    ),
    fallback.FLOAT64: Explanation(
        "The Hessian was too nearly singular for float32 and was factored in float64. The result is as good.",
        "Nothing; more calibration text would avoid it.",
    ),
    fallback.DAMP_RAISED: Explanation(
        "The Hessian was not positive definite at the damping asked for, so more was added. The layer follows the "
        "calibration data less closely.",
        f"{_MORE_TEXT} Or set a higher --damp for all layers.",
    ),
    fallback.EIGENVALUES_CLAMPED: Explanation(
        "No damping up to 1 made the Hessian positive definite; its negative eigenvalues were set to zero.",
        f"Look at the layer's inputs: their scale is probably extreme. {_MORE_TEXT}",
    ),
    fallback.ROUND_TO_NEAREST: Explanation(
        "The layer was rounded to nearest: no error was carried from column to column, so its own error is larger "
        "than GPTQ's would be.",
        f"{_MORE_TEXT} Or give such layers more bits with --override.",
    ),
    fallback.NO_CORRECTION: Explanation(
        "The matrix behind the correction towards the full-precision outputs could not be factored; the layer was "
        "solved without the correction.",
        _MORE_TEXT,
    ),
    fallback.SCALES_CLAMPED: Explanation(
        "The weights are so small or so large that float16 cannot hold the best scales: some are the smallest or the "
        "largest float16.",
        "Leave such layers as they are with --ignore if their error is large.",
    ),
}  # fmt: skip


def explain(name: str) -> Explanation | None:
    """The explanation of a fallback; None for one that is not known here."""
    return _EXPLANATIONS.get(name)
