"""fewbit's `GPTQConfig`: the ``quantization_config`` of a checkpoint, or a request to quantize."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import GPTQConfig as TransformersGPTQConfig

from ..checkpoint import quantization_config as quantization
from ..config import FORMATS
from ..errors import ConfigError

METHOD = "gptq"
OWN_METHOD = "fewbit"
_FORMAT_KEYS = ("checkpoint_format", "format")


class GPTQConfig(TransformersGPTQConfig):  # type: ignore[misc]
    """A ``quantization_config`` that keeps every key it was given, known or not, and saves it again.

    It has the name of the class that it replaces, because transformers compares names.

    Attributes:
        written: all keys and values as given.
        backend: kernel name, as `fewbit.load` takes it.
        format: checkpoint format that `save_pretrained` writes, "gptq" or "gptq_v2".
    """

    def __init__(self, **values: Any) -> None:
        # transformers and `fewbit.load` add the backend; it is not part of the checkpoint.
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
        # "fewbit" until transformers has looked up the quantizer; `FewbitQuantizer` then sets "gptq".
        self.quant_method = values.get("quant_method", METHOD)

    @property
    def checkpoint_format(self) -> str:
        """Older name of `format`."""
        return self.format

    @checkpoint_format.setter
    def checkpoint_format(self, value: str) -> None:
        self.format = value

    def post_init(self) -> None:
        """Set the default backend; `quantization_config.parse` has checked the other values."""
        self.backend: Any = self.backend or "auto"

    def to_dict(self) -> dict[str, Any]:
        """Return all keys as they were given, with the format that is saved.

        Raises:
            ConfigError: `format` was set to an unknown name.
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
        """Make the rules in ``dynamic`` independent of their order for the layers `names`.

        The first rule that matches decides, but transformers sorts the keys of the JSON that it writes. The rules are
        rewritten only if sorting would change a layer's settings.
        """
        dynamic = self.written.get("dynamic") or {}
        in_file = {**self.written, "group_size": self.group_size, "dynamic": dict(sorted(dynamic.items()))}
        now = quantization.parse({**in_file, "dynamic": dynamic}, default_method=METHOD)
        then = quantization.parse(in_file, default_method=METHOD)
        if any(now.layer(name) != then.layer(name) for name in names):
            self.written["dynamic"] = _exclusive(dynamic)


def _exclusive(dynamic: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rules with patterns that exclude what an earlier rule matches."""
    result, earlier = {}, ""
    for key, rule in dynamic.items():
        sign = key[:2] if key[:2] in ("-:", "+:") else ""
        pattern = key.removeprefix(sign)
        result[f"{sign}{earlier}(?:{pattern})"] = rule
        earlier += f"(?!{pattern})"
    return result


def kernel_name(backend: Any) -> str:
    """Return the kernel that a `backend` (a name, or a member of an enumeration) asks for; "auto" for None.

    Raises:
        ConfigError: it is no name.
    """
    name = getattr(backend, "value", backend)
    if name is None:
        return "auto"
    if not isinstance(name, str):
        raise ConfigError(f"backend must be the name of a kernel, such as 'auto', not {backend!r}")
    return name.lower()


def needs_gradients(backend: Any) -> bool:
    """Return whether a `backend` asks for kernels with gradients to a layer's inputs."""
    return str(getattr(backend, "value", backend)).lower() == "auto_trainable"
