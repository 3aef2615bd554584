"""The configuration classes: fewbit's `GPTQConfig`, which forgets nothing, and what makes transformers' own as good.

A `GPTQConfig` is one of two things: a checkpoint's ``quantization_config``, or a request to quantize, which also has a
data set. Both keep what they were given, known or not.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import GPTQConfig as TransformersGPTQConfig

from ..checkpoint import quantization_config as quantization
from ..config import FORMATS
from ..errors import ConfigError

METHOD = "gptq"
OWN_METHOD = "fewbit"
_FORMAT_KEYS = ("checkpoint_format", "format")


class GPTQConfig(TransformersGPTQConfig):  # type: ignore[misc]
    """A ``quantization_config``, kept as it was written: what is loaded is what is saved, but for `format`.

    It has the name of the class it replaces, which transformers compares.

    Attributes:
        written: every key as it was given.
        backend: the kernel, under any of its names.
        format: in which `save_pretrained` writes, "gptq" or "gptq_v2".
    """

    def __init__(self, **values: Any) -> None:
        # What transformers adds by itself, or `fewbit.load`, is not the checkpoint's.
        self.written = {key: value for key, value in values.items() if key != "backend"}
        if self.written.get("quant_method") == OWN_METHOD:
            self.written["quant_method"] = METHOD
        known = quantization.parse({"group_size": 128, **self.written}, default_method=METHOD)
        super().__init__(
            bits=known.bits,
            group_size=known.group_size,
            sym=known.sym,
            desc_act=known.desc_act,
            act_group_aware=not known.desc_act,
            format=known.format,
            meta=values.get("meta"),
            backend=values.get("backend"),
        )
        # "fewbit" until transformers has found the quantizer with it; `FewbitQuantizer` then says "gptq".
        self.quant_method = values.get("quant_method", METHOD)

    @property
    def checkpoint_format(self) -> str:
        """`format` under its older name."""
        return self.format

    @checkpoint_format.setter
    def checkpoint_format(self, value: str) -> None:
        self.format = value

    def post_init(self) -> None:
        """Nothing: `fewbit.checkpoint.quantization_config.parse` has checked the values."""
        self.backend: Any = self.backend or "auto"

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it was written, unknown keys included, in the format that is saved.

        Raises:
            ConfigError: `format` was set to a name that is none.
        """
        if self.format not in FORMATS:
            raise ConfigError(f"format must be one of {', '.join(FORMATS)}; got {self.format!r}")
        result = copy.deepcopy(self.written)
        stated = [result[key] for key in _FORMAT_KEYS if result.get(key) is not None]
        if (stated or [FORMATS[0]])[0] != self.format:
            result |= {"checkpoint_format": self.format}
            if "format" in result:
                result["format"] = self.format
        return result

    def fix_rule_order(self, names: Iterable[str]) -> None:
        """Make the rules in ``dynamic`` mean the same for the layers `names` in any order.

        The first rule that matches decides, and transformers sorts the keys of the JSON that it writes. Rules stay as
        they are where that changes nothing.
        """
        dynamic = self.written.get("dynamic") or {}
        in_file = {**self.written, "group_size": self.group_size, "dynamic": dict(sorted(dynamic.items()))}
        now = quantization.parse({**in_file, "dynamic": dynamic}, default_method=METHOD)
        then = quantization.parse(in_file, default_method=METHOD)
        if any(now.layer(name) != then.layer(name) for name in names):
            self.written["dynamic"] = _exclusive(dynamic)


def _exclusive(dynamic: Mapping[str, Any]) -> dict[str, Any]:
    """The same rules, each not matching what an earlier one matches."""
    result, earlier = {}, ""
    for key, rule in dynamic.items():
        sign = key[:2] if key[:2] in ("-:", "+:") else ""
        pattern = key.removeprefix(sign)
        result[f"{sign}{earlier}(?:{pattern})"] = rule
        earlier += f"(?!{pattern})"
    return result


def request(config: Any) -> dict[str, Any]:
    """What a configuration of either class asks for, by argument, as it was given."""
    if isinstance(config, GPTQConfig):
        return {**config.written, "backend": config.backend}
    return {key: value for key, value in vars(config).items() if not key.startswith("_")}


def keeping(original: Callable[..., None]) -> Callable[..., None]:
    """An `__init__` for transformers' `GPTQConfig` that keeps as attributes what `original` drops."""
    known = inspect.signature(original).parameters

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if type(self) is TransformersGPTQConfig:
            for key, value in kwargs.items():
                if key not in known and not hasattr(self, key):
                    setattr(self, key, value)

    return init


def checking(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """A `post_init` for it: `original`, without asking for optimum, and with any data set that fewbit takes."""

    @functools.wraps(original)
    def post_init(self: Any) -> None:
        hidden = {"modules_in_block_to_quantize": self.modules_in_block_to_quantize}
        if not isinstance(self.dataset, str) or Path(self.dataset).expanduser().is_file():
            hidden["dataset"] = self.dataset
        for key in hidden:
            setattr(self, key, None)
        original(self)
        for key, value in hidden.items():
            setattr(self, key, value)

    return post_init
