"""config.json for readers older and newer than transformers 5, which moved the rotary embedding's settings.

Before it they were ``rope_theta``, ``partial_rotary_factor`` and ``rope_scaling`` at the top; now all are in
``rope_parameters``. A reader that finds none of its own keys takes its default, without a word, and computes
something else. Newer versions read a file with both like one with ``rope_parameters`` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MOVED = ("rope_theta", "partial_rotary_factor")


def for_older_readers(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with the older keys beside ``rope_parameters``, in the parts of a multimodal model too.

    Keys that are there already stay. Where every type of layer has settings of its own, ``rope_parameters`` is nested
    and no older key could say so: nothing is added.
    """
    result = {
        key: for_older_readers(value) if _is_part(key, value) else value for key, value in config.items()
    }
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        return result
    for key in _MOVED:
        if rope.get(key) is not None:
            result.setdefault(key, rope[key])
    scaling = {key: value for key, value in rope.items() if key not in _MOVED}
    if scaling not in ({}, {"rope_type": "default"}):
        result.setdefault("rope_scaling", scaling)
    return result


def _is_part(key: str, value: object) -> bool:
    return key.endswith("_config") and isinstance(value, Mapping)
