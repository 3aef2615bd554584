"""The one configuration of a quantization run: frozen, validated once, unknown keys refused.

`QuantConfig` is what the user says; `LayerSettings` is what one layer gets after the overrides.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from .errors import ConfigError

ActOrder = Literal["group", "none", "full"]
Method = Literal["gptq", "rtn"]
Format = Literal["gptq", "gptq_v2"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quality = Literal["fast", "default", "best"]
ExportTarget = Literal["compressed-tensors", "awq", "gguf", "mlx", "auto-round", "dense"]
PlainDtype = Literal["float16", "bfloat16", "float32", "q8_0"]  # of exported weights that stay unquantized

BITS = (2, 3, 4, 8)
EVALUATION_TOKENS = 32_768  # on which a result is measured, unless told otherwise
# Other names of the dtypes.
DTYPE_NAMES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
}
ACT_ORDERS, METHODS, FORMATS, DTYPES, QUALITIES = map(get_args, (ActOrder, Method, Format, Dtype, Quality))
WITHOUT_CALIBRATION = ("rtn",)  # methods that need no inputs of the layers
AUTO: Final = "auto"
GROUP_SIZES = (128, 64, 32)  # what "auto" chooses from: the largest that divides the inputs of every layer
SKIP = "skip"
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "fast": {"fast": True},
    "default": {},
    "best": {"tune": True, "distill": True},
}

# What users of other tools type, and what it is called here.
_FOREIGN_KEYS = {
    "desc_act": "act_order='full' (False: 'group' or 'none')",
    "act_group_aware": "act_order='group'",
    "static_groups": "nothing: groups are always static",
    "damp_percent": "damp",
    "nsamples": "num_samples",
    "seqlen": "seq_len",
    "model_seqlen": "seq_len",
    "checkpoint_format": "format",
    "true_sequential": "nothing: fewbit is always true-sequential",
    "dynamic": "override and ignore",
    "w_bit": "bits",
    "q_group_size": "group_size",
    "refit": "nothing: refit was removed, whole models gained nothing from it",
}


@dataclass(frozen=True)
class LayerSettings:
    """How one layer is quantized, after all overrides."""

    bits: int
    group_size: int
    sym: bool
    act_order: ActOrder
    damp: float
    method: Method

    def __post_init__(self) -> None:
        _one_of("bits", self.bits, BITS)
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, int):
            raise ConfigError(f"group_size must be an integer, not {self.group_size!r}")
        if self.group_size != -1 and self.group_size <= 0:
            raise ConfigError(
                f"group_size must be positive, or -1 for one group per row; got {self.group_size}. "
                "Common choices are 128, 64 and 32."
            )
        if not isinstance(self.sym, bool):
            raise ConfigError(f"sym must be True or False, not {self.sym!r}")
        _one_of("act_order", self.act_order, ACT_ORDERS)
        _one_of("method", self.method, METHODS)
        if isinstance(self.damp, bool) or not isinstance(self.damp, (int, float)) or not 0 < self.damp < 1:
            raise ConfigError(
                f"damp must lie between 0 and 1 (both excluded); got {self.damp}. Usual: 0.01 to 0.1."
            )

    @property
    def needs_inputs(self) -> bool:
        """Whether the method needs the inputs of the layer."""
        return self.method not in WITHOUT_CALIBRATION


LAYER_KEYS = tuple(f.name for f in dataclasses.fields(LayerSettings))


@dataclass(frozen=True)
class QuantConfig:
    """Everything that decides the bytes of a quantized checkpoint, beside the model and the text.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: inputs that share one scale and zero point; −1 for one group per row. "auto" is the largest of
            128, 64 and 32 that divides the inputs of every layer, and 128 if none does.
        sym: symmetric grids (zero point fixed at 2^(bits−1)) or asymmetric ones.
        act_order: column order of the solver. "group" sorts inside and between groups and needs no
            g_idx; "full" is the classic desc_act and writes one; "none" keeps the order.
        damp: λ as a fraction of the mean of diag(H).
        method: "gptq", or "rtn": round to nearest on the same grid, without calibration.
        ignore: regular expressions; a layer whose full name one of them matches (`re.search`) stays as it is.
        override: regular expression → settings for the layers it matches, or "skip". The first match
            decides. Settings: bits, group_size, sym, act_order, damp, method.
        correction: how far each layer's target is moved towards the full-precision outputs, 0 to 1, or "auto":
            chosen per layer on held-out calibration sequences. Above 0 every batch also runs on the full-precision
            path.
        quality: "fast" sets `fast`; "best" sets `tune` and `distill`; "default" sets nothing.
        fast: run the quantized path only: no correction, in half the time. Excludes tune.
        target_bits: average stored bits per weight (codes, scales and zero points); bits and group sizes are then
            chosen per layer to meet it, and `bits` and `group_size` are not used. None: no budget.
        tune: after a block is solved, optimise its rounding and scales by gradient against the full-precision
            block. tune_steps: steps per block.
        loss_aware: weight the outputs of every layer by the gradients of the model's loss, and let rows absorb each
            other's errors. The model first runs forward and backward over 32,768 calibration tokens.
        rotate: multiply the residual stream by a random orthogonal matrix first, folded into the weights: less error,
            at the same speed. An output embedding that shares the matrix of the input embedding gets its own.
        distill: after all layers are solved, train scales, norms and biases against the original's logits
            (`fewbit.distill`). distill_tokens: tokens to train on.
        lm_head: also quantize the output embedding.
        mtp: also round the matrices for multi-token prediction to nearest, which the model class does not run.
        format: "gptq" (v1, read by everything) or "gptq_v2".
        num_samples: calibration sequences. seq_len: tokens in each. batch_size: sequences per batch.
        seed: chooses the calibration windows.
        dtype: in which the model is read: for the forward pass, and for what is stored unquantized. "auto"
            keeps the model's; where a CPU multiplies that slowly, only the forward pass is in float32.
        strict: every fallback is an error.

    Raises:
        ConfigError: a value is out of range or a key is unknown.
    """

    bits: int = 4
    group_size: int | Literal["auto"] = "auto"
    sym: bool = True
    act_order: ActOrder = "group"
    damp: float = 0.01
    method: Method = "gptq"
    ignore: tuple[str, ...] | str = ()
    override: Mapping[str, Mapping[str, Any] | str] = field(default_factory=dict)
    correction: float | Literal["auto"] = "auto"
    quality: Quality = "default"
    fast: bool = False
    target_bits: float | None = None
    tune: bool = False
    tune_steps: int = 100
    loss_aware: bool = False
    rotate: bool = False
    distill: bool = False
    distill_tokens: int = 500_000
    lm_head: bool = False
    mtp: bool = False
    format: Format = "gptq"
    num_samples: int = 128
    seq_len: int = 2048
    batch_size: int = 1
    seed: int = 0
    dtype: Dtype = "auto"
    strict: bool = False

    def __new__(cls, *values: Any, **settings: Any) -> QuantConfig:
        """Refuse unknown names with a hint, before Python does without one."""
        _refuse_unknown(settings, [f.name for f in dataclasses.fields(cls)], "QuantConfig")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        _one_of("quality", self.quality, QUALITIES)
        for name, value in PRESETS[self.quality].items():
            object.__setattr__(self, name, value)
        if isinstance(self.ignore, str):  # a single pattern, not its letters
            object.__setattr__(self, "ignore", (self.ignore,))
        if not isinstance(self.ignore, (list, tuple)) or not isinstance(self.override, Mapping):
            raise ConfigError(
                "ignore must be a list of regular expressions and override a dict of regular expression → settings; "
                f"got {self.ignore!r} and {self.override!r}"
            )
        object.__setattr__(self, "ignore", tuple(self.ignore))
        object.__setattr__(self, "override", dict(self.override))
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        for name in ("lm_head", "mtp", "strict", "fast", "tune", "loss_aware", "rotate", "distill"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"seed must be a whole number, not {self.seed!r}")
        _one_of("format", self.format, FORMATS)
        _one_of("dtype", self.dtype, DTYPES)
        for name in ("num_samples", "seq_len", "batch_size", "tune_steps", "distill_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1; got {value!r}")
        self._check_accuracy_options()
        for pattern in (*self.ignore, *self.override):
            _check_pattern(pattern)
        self.defaults  # noqa: B018 - validates the global settings
        for pattern, settings in self.override.items():
            self._overridden(pattern, settings)

    def _check_accuracy_options(self) -> None:
        if self.correction != AUTO and not (_is_number(self.correction) and 0 <= float(self.correction) <= 1):
            raise ConfigError(f"correction must lie between 0 and 1, or be 'auto'; got {self.correction!r}")
        if self.target_bits is not None and not (_is_number(self.target_bits) and 2 < self.target_bits <= 9):
            raise ConfigError(
                "target_bits is the average number of stored bits per weight, scales and zero points counted: "
                f"above 2, at most 9; got {self.target_bits!r}"
            )
        if self.target_bits is not None and self.method in WITHOUT_CALIBRATION:
            raise ConfigError(
                f"target_bits measures the layers on calibration text, which method {self.method!r} has none of: use "
                "method gptq, or choose bits with override"
            )
        wants_activations = self.tune or self.loss_aware or self.correction not in (AUTO, 0)
        if wants_activations and not self.needs_calibration:
            raise ConfigError(
                f"method {self.method} looks at no activations, which correction, tune and loss_aware need: leave them "
                "out, or use gptq"
            )
        if self.fast and (self.tune or self.correction not in (AUTO, 0)):
            raise ConfigError(
                "fast runs no full-precision path, which correction and tune need: leave out fast or those"
            )

    @property
    def needs_calibration(self) -> bool:
        """Whether a layer may have a method that needs inputs."""
        own = [
            rule["method"]
            for rule in self.override.values()
            if isinstance(rule, Mapping) and "method" in rule
        ]
        return any(method not in WITHOUT_CALIBRATION for method in (self.method, *own))

    @property
    def effective_correction(self) -> float | Literal["auto"]:
        """The correction in use: 0 in a fast run."""
        return 0.0 if self.fast else self.correction

    @property
    def defaults(self) -> LayerSettings:
        """The settings of a layer that no override touches; "auto" counts as the largest group size."""
        settings = {key: getattr(self, key) for key in LAYER_KEYS}
        if self.group_size == AUTO:
            settings["group_size"] = GROUP_SIZES[0]
        return LayerSettings(**settings)

    def layer(self, name: str) -> LayerSettings | None:
        """The settings of the layer called `name`; None where it is to stay as it is."""
        if any(re.search(pattern, name) for pattern in self.ignore):
            return None
        for pattern, settings in self.override.items():
            if re.search(pattern, name):
                return self._overridden(pattern, settings)
        return self.defaults

    def rule(self, pattern: str) -> LayerSettings | None:
        """The settings that the override for `pattern` gives; None for "skip"."""
        return self._overridden(pattern, self.override[pattern])

    def overridden(self, name: str) -> frozenset[str]:
        """Names of the settings that an override gives the layer called `name`."""
        for pattern, settings in self.override.items():
            if re.search(pattern, name):
                return frozenset() if isinstance(settings, str) else frozenset(settings)
        return frozenset()

    def _overridden(self, pattern: str, settings: Mapping[str, Any] | str) -> LayerSettings | None:
        if settings == SKIP:
            return None
        if not isinstance(settings, Mapping):
            raise ConfigError(f"override for {pattern!r} must be {SKIP!r} or settings; got {settings!r}")
        _refuse_unknown(settings, LAYER_KEYS, f"override for {pattern!r}")
        return dataclasses.replace(self.defaults, **settings)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is the inverse."""
        result = dataclasses.asdict(self)
        result["ignore"] = list(self.ignore)
        return result

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantConfig:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: a key is unknown; the message names the nearest known one.
        """
        return cls(**values)

    @classmethod
    def of(
        cls,
        config: QuantConfig | Mapping[str, Any] | None,
        settings: Mapping[str, Any],
        function: Callable[..., Any],
    ) -> QuantConfig:
        """What a caller of `function` means by a config, a dict of its fields, or its fields as keyword arguments.

        Raises:
            ConfigError: a key is unknown, a setting is given twice, or `config` is something else.
        """
        known = [*inspect.signature(function).parameters, *(f.name for f in dataclasses.fields(cls))]
        _refuse_unknown(settings, known, "fewbit", "argument")
        if config is None or isinstance(config, Mapping):
            twice = sorted(set(config or ()) & set(settings))
            if not twice:
                return cls(**(config or {}), **settings)
            raise ConfigError(f"{twice[0]} is given twice: in config, and by itself")
        if not isinstance(config, QuantConfig):
            raise ConfigError(f"config must be a QuantConfig or a dict of its fields; got {config!r}")
        if settings:
            raise ConfigError(f"{next(iter(settings))} is given beside config: set it in the config")
        return config


def dtype_name(dtype: Any) -> Any:
    """The name that fewbit uses for a dtype: of "bf16" and of torch.bfloat16 too; other values stay as they are."""
    name = str(dtype).removeprefix("torch.")
    return DTYPE_NAMES.get(name, name if name in DTYPES else dtype)


def parse_overrides(texts: Iterable[str]) -> dict[str, dict[str, Any] | str]:
    """Read the command line's ``REGEX=bits:8,group_size:32`` and ``REGEX=skip``.

    Raises:
        ConfigError: a text does not have this form.
    """
    result: dict[str, dict[str, Any] | str] = {}
    for text in texts:
        pattern, separator, settings = text.rpartition("=")
        if not separator or not pattern or not settings:
            raise ConfigError(
                f"cannot read override {text!r}: write REGEX=bits:8,group_size:32 or REGEX=skip"
            )
        if pattern in result:
            raise ConfigError(f"two overrides have the pattern {pattern!r}: put all its settings into one")
        result[pattern] = SKIP if settings == SKIP else _parse_settings(text, settings)
    return result


def _parse_settings(text: str, settings: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for item in settings.split(","):
        key, separator, value = (part.strip() for part in item.partition(":"))
        key = key.replace("-", "_")
        if not separator or not value:
            raise ConfigError(
                f"cannot read {item!r} in override {text!r}: write key:value, for example bits:8"
            )
        _refuse_unknown([key], LAYER_KEYS, f"override {text!r}")
        result[key] = _parse_value(key, value, text)
    return result


def _parse_value(key: str, value: str, text: str) -> Any:
    if key in ("act_order", "method"):
        return value
    if key == "sym":
        if value.lower() not in ("true", "false"):
            raise ConfigError(f"sym in override {text!r} must be true or false, not {value!r}")
        return value.lower() == "true"
    number = float if key == "damp" else int
    if not re.fullmatch(r"-?\d+" if number is int else r"-?\d*\.?\d+(e-?\d+)?", value):
        raise ConfigError(f"{key} in override {text!r} must be a number, not {value!r}")
    return number(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _one_of(name: str, value: object, allowed: tuple[Any, ...]) -> None:
    if isinstance(value, bool) or value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}")


def _check_pattern(pattern: object) -> None:
    if not isinstance(pattern, str):
        raise ConfigError(f"a layer pattern must be a string, not {pattern!r}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{pattern!r} is not a regular expression: {error}") from error


def _refuse_unknown(given: Iterable[str], known: Iterable[str], where: str, what: str = "setting") -> None:
    known = list(known)
    for key in given:
        if key in known:
            continue
        hint = _FOREIGN_KEYS.get(key)
        if hint is None:
            near = difflib.get_close_matches(key, known, n=1)
            hint = near[0] if near else f"one of {', '.join(known)}"
        raise ConfigError(f"{where} has no {what} {key!r}; use {hint}")
