"""Which layers get the same input, known before they are met: what came together in one block does so in the next.

A GPU has too little to do with one small layer, so layers that share a Hessian are solved together when the first of
them is met. Which ones they will be is learned from names: where ``layers.0.attn.k`` got what ``layers.0.attn.q`` had
got, ``layers.7.attn.k`` is expected to get what ``layers.7.attn.q`` gets. This is a guess; whoever uses it compares the
Hessians when the layer is met.
"""

from __future__ import annotations

import re
import weakref

import torch

from ..gptq import why_no_triton

_NUMBER = re.compile(r"\d+")


def gains_from_company(device: torch.device) -> bool:
    """Whether several layers at once take less time on this device than one after the other."""
    return device.type != "cpu" and not why_no_triton(device)


class Kin:
    """Learns from the layers that were met."""

    def __init__(self) -> None:
        self._last: weakref.ref[object] | None = None  # a Hessian is large, and its time is over soon
        self._first = ""
        self._patterns: dict[str, list[str]] = {}

    def met(self, name: str, input_of: object) -> None:
        """The layer `name` was met; layers with one input come with one object, one after the other."""
        if self._last is None or self._last() is not input_of:
            self._last, self._first = weakref.ref(input_of), name
            return
        numbers = _NUMBER.findall(name)
        if numbers == _NUMBER.findall(self._first):
            known = self._patterns.setdefault(_pattern(self._first), [])
            if _pattern(name) not in known:
                known.append(_pattern(name))

    def expected(self, name: str) -> list[str]:
        """The layers that are expected to get the input that `name`, the first of them, has got."""
        numbers = _NUMBER.findall(name)
        return [pattern.format(*numbers) for pattern in self._patterns.get(_pattern(name), [])]


def _pattern(name: str) -> str:
    """The name with a place for every number."""
    return _NUMBER.sub("{}", name.replace("{", "{{").replace("}", "}}"))
