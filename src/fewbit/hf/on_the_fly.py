"""Quantizing a model that `from_pretrained` has just read, as the `GPTQConfig` given to it asks.

The arguments are optimum's, so its counterpart here does the work. What it does not know is in this file.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from ..compat.optimum.quantizer import GPTQQuantizer
from ..compat.settings import say
from ..config import SKIP, QuantConfig
from ..errors import CalibrationError

_NOT_NEEDED = {
    "use_exllama": "not needed: a kernel of another package runs only where backend asks for it",
    "max_memory": "belongs to from_pretrained, beside device_map",
}
# Of from_pretrained, not of the quantizer; and what `dynamic` and `lm_head` say is translated here.
_OWN = ("tokenizer", "dynamic", "lm_head")
# GPTQModel's words for the settings of a layer, where they are others here.
_SETTINGS = {"damp_percent": "damp"}


class Job:
    """One request to quantize, checked before any weight is read.

    Args:
        asked: arguments of transformers' `GPTQConfig`, of its older versions, and GPTQModel's ``dynamic``.

    Raises:
        ConfigError: a value is out of range.
        CalibrationError: there is no data set.
    """

    def __init__(self, asked: Mapping[str, Any]) -> None:
        if asked.get("dataset") is None:
            raise CalibrationError(
                "this model is not quantized, and quantizing it needs calibration text: pass "
                "GPTQConfig(bits=4, dataset=…) with a list of texts, a .txt, .jsonl or .parquet file, or wikitext2"
            )
        known = set(inspect.signature(GPTQQuantizer).parameters) - {"kwargs"}
        unknown = set(asked) - known - {*_OWN, *_NOT_NEEDED}
        say({key: reason for key, reason in _NOT_NEEDED.items() if asked.get(key) is not None})
        if unknown:
            say({", ".join(sorted(unknown)): "unknown to fewbit and without effect"})
        self._tokenizer = asked.get("tokenizer")
        self._quantizer = _WithRules(
            asked.get("dynamic") or {},
            asked.get("lm_head") or False,
            {key: value for key, value in asked.items() if key in known},
        )

    def run(self, model: PreTrainedModel) -> None:
        """Quantize `model` in place; the tokenizer is the one asked for, or the one beside the model.

        Raises:
            FewbitError: as `fewbit.quantize`.
        """
        self._quantizer.quantize_model(
            model, model.name_or_path if self._tokenizer is None else self._tokenizer
        )


class _WithRules(GPTQQuantizer):
    """optimum's quantizer with settings per layer and for the output embedding, in GPTQModel's words."""

    def __init__(
        self, dynamic: Mapping[str, Mapping[str, Any]], lm_head: bool, arguments: Mapping[str, Any]
    ) -> None:
        self._lm_head = lm_head
        self._override = {
            f"^(?:{pattern.removeprefix('-:').removeprefix('+:')})": SKIP
            if pattern.startswith("-:")
            else _settings(rule)
            for pattern, rule in dynamic.items()
        }
        super().__init__(**arguments)

    def _config(self, **settings: Any) -> QuantConfig:
        return replace(super()._config(**settings), override=self._override, lm_head=self._lm_head)


def _settings(rule: Mapping[str, Any]) -> dict[str, Any]:
    result = {_SETTINGS.get(key, key): value for key, value in rule.items() if key != "desc_act"}
    if "desc_act" in rule:
        result["act_order"] = "full" if rule["desc_act"] else "group"
    return result
