"""Which layers of a module read the same input: one table for fused kernels, shared settings and merged names.

Names are relative to the parent module, in the order in which models call the layers. That is also the
order of their rows in a merged layer.
"""

from __future__ import annotations

from typing import NamedTuple


class GroupPattern(NamedTuple):
    """Layers of one module that read the same input.

    Attributes:
        names: Names of the layers inside their parent module, in the order of the calls.
        engines_merge: True if vLLM and SGLang merge them into one layer, which has one quantization setting.
        merged_name: Name under which these engines look up the settings of the merged layer; None if they use the
            names of the layers.
    """

    names: tuple[str, ...]
    engines_merge: bool = False
    merged_name: str | None = None


INPUT_GROUPS = (
    GroupPattern(("q_proj", "k_proj", "v_proj"), engines_merge=True, merged_name="qkv_proj"),
    GroupPattern(("gate_proj", "up_proj"), engines_merge=True, merged_name="gate_up_proj"),
    GroupPattern(("w1", "w3"), engines_merge=True),
    GroupPattern(("q_a_proj", "kv_a_proj_with_mqa"), engines_merge=True),
    GroupPattern(("query", "key", "value")),
    GroupPattern(("q", "k", "v")),
    GroupPattern(("wi_0", "wi_1")),
)


def merged_layers(name: str) -> tuple[str, ...]:
    """Names of the layers that engines merge with the layer `name`, itself included; only `name` if they merge none."""
    for group in INPUT_GROUPS:
        if group.engines_merge and name in group.names:
            return group.names
    return (name,)
