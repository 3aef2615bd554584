"""`register` and `unregister`: transformers' GPTQ, done by fewbit.

transformers' own GPTQ needs optimum and gptqmodel. `register` replaces its quantizer and configuration, makes its
`GPTQConfig` keep unknown arguments, and lets `save_pretrained` also write quantize_config.json. `unregister` restores
everything.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from transformers import GPTQConfig as TransformersGPTQConfig
from transformers import PreTrainedModel

from . import transformers_internals
from .checkpoint.writer import CONFIG, QUANTIZE_CONFIG, with_legacy_keys
from .config import SKIP, QuantConfig
from .errors import CalibrationError, ConfigError
from .gptq_arguments import GPTQArguments, warn, warn_not_needed, write_json
from .hf.fuse import make_fast
from .hf.quantizer import METHOD, FewbitQuantizer, GPTQConfig, kernel_name


class OnTheFlyQuantizer(FewbitQuantizer):
    """A `FewbitQuantizer` that also quantizes a dense model right after `from_pretrained` has read it.

    A quantized model is made fast, as by `fewbit.load`.
    """

    fast: ClassVar[bool] = True

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # Checked now, before any weight is read.
        self._request = None if self.pre_quantized else _OnTheFlyArguments(quantization_config)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if self._request is None:
            super()._process_model_before_weight_loading(model, checkpoint_files, **kwargs)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self._request is None:
            return super()._process_model_after_weight_loading(model, **kwargs)
        del model.config.quantization_config  # the request; quantizing sets the result's configuration
        self._request.run(model)
        model.config.quantization_config.backend = self.quantization_config.backend
        model.hf_quantizer = OnTheFlyQuantizer(model.config.quantization_config, pre_quantized=True)
        return model

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Make the model fast, when its weights are loaded and tied."""
        result: PreTrainedModel = super().postprocess_model(model, **kwargs)
        if self.fast:
            make_fast(result, kernel_name(self.quantization_config.backend))
        return result


class _AsItIs(OnTheFlyQuantizer):
    """The same without `make_fast`."""

    fast = False


class _OnTheFlyArguments(GPTQArguments):
    """The arguments of transformers' `GPTQConfig`, of its older versions, and GPTQModel's ``dynamic``."""

    def __init__(self, config: Any) -> None:
        if isinstance(config, GPTQConfig):
            given = {**config.written, "backend": config.backend}
        else:
            given = {key: value for key, value in vars(config).items() if not key.startswith("_")}
        if given.get("dataset") is None:
            raise CalibrationError(
                "this model is not quantized, and quantizing it needs calibration text: pass "
                "GPTQConfig(bits=4, dataset=…) with a list of texts, a .txt, .jsonl or .parquet file, or wikitext2"
            )
        known = set(inspect.signature(GPTQArguments).parameters) - {"kwargs"}
        unknown = set(given) - known - {"tokenizer", "dynamic", "lm_head", "use_exllama", "max_memory"}
        warn_not_needed(use_exllama=given.get("use_exllama") is not None)
        if given.get("max_memory") is not None:
            warn("max_memory", "belongs to from_pretrained, beside device_map")
        if unknown:
            warn(", ".join(sorted(unknown)), "unknown to fewbit and without effect")
        self._tokenizer = given.get("tokenizer")
        self._lm_head = given.get("lm_head") or False
        self._override = {
            f"^(?:{pattern.removeprefix('-:').removeprefix('+:')})": SKIP
            if pattern.startswith("-:")
            else _layer_settings(pattern, rule)
            for pattern, rule in (given.get("dynamic") or {}).items()
        }
        super().__init__(**{key: value for key, value in given.items() if key in known})

    def run(self, model: PreTrainedModel) -> None:
        """Quantize `model` in place; the default tokenizer is in the model's folder."""
        self.quantize_model(model, model.name_or_path if self._tokenizer is None else self._tokenizer)

    def _config(self, **settings: Any) -> QuantConfig:
        return replace(super()._config(**settings), override=self._override, lm_head=self._lm_head)


def _layer_settings(pattern: str, rule: object) -> dict[str, Any]:
    """Translate GPTQModel's names for the settings of a layer."""
    if not isinstance(rule, Mapping):
        raise ConfigError(
            f"dynamic {pattern!r} must hold settings, such as {{'bits': 8}}, not {rule!r}; '-:' before the pattern "
            "leaves its layers as they are"
        )
    result = dict(rule)
    if "damp_percent" in result:
        result["damp"] = result.pop("damp_percent")
    if "desc_act" in result:
        result["act_order"] = "full" if result.pop("desc_act") else "group"
    return result


@dataclass(frozen=True)
class _Patch:
    """A replaced entry of a dict, or a replaced attribute of a class."""

    target: dict[str, Any] | type
    name: str
    original: Any
    replacement: Any

    @classmethod
    def apply(cls, target: dict[str, Any] | type, name: str, make: Callable[[Any], Any]) -> _Patch:
        """Replace the entry by what `make` returns for the original."""
        original = target[name] if isinstance(target, dict) else getattr(target, name)
        patch = cls(target, name, original, make(original))
        patch._set(patch.replacement)
        return patch

    def undo(self) -> None:
        """Restore the original, unless another library has replaced the entry since."""
        now = self.target[self.name] if isinstance(self.target, dict) else getattr(self.target, self.name)
        if now is self.replacement:
            self._set(self.original)

    def _set(self, value: Any) -> None:
        if isinstance(self.target, dict):
            self.target[self.name] = value
        else:
            setattr(self.target, self.name, value)


_patches: list[_Patch] = []


def register(*, fast: bool = True) -> None:
    """Let transformers quantize and load GPTQ with fewbit from here on. Calling it again replaces the former call.

    Args:
        fast: make loaded models fast on CPUs, as `fewbit.load` does by default: fused operations, 8-bit output layer.
    """
    unregister()
    quantizer = OnTheFlyQuantizer if fast else _AsItIs
    _patches.extend(
        [
            _Patch.apply(transformers_internals.AUTO_QUANTIZER_MAPPING, METHOD, lambda _: quantizer),
            _Patch.apply(
                transformers_internals.AUTO_QUANTIZATION_CONFIG_MAPPING, METHOD, lambda _: GPTQConfig
            ),
            _Patch.apply(TransformersGPTQConfig, "__init__", _keep_unknown),
            _Patch.apply(TransformersGPTQConfig, "post_init", _without_optimum),
            _Patch.apply(PreTrainedModel, "save_pretrained", _with_quantize_config),
        ]
    )


def unregister() -> None:
    """Undo `register`. Models that are loaded keep working."""
    while _patches:
        _patches.pop().undo()


def _keep_unknown(original: Callable[..., None]) -> Callable[..., None]:
    """Return an `__init__` for transformers' `GPTQConfig` that keeps unknown arguments as attributes."""
    known = inspect.signature(original).parameters

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if type(self) is TransformersGPTQConfig:
            for key, value in kwargs.items():
                if key not in known and not hasattr(self, key):
                    setattr(self, key, value)

    return init


def _without_optimum(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return a `post_init` for it that does not require optimum and accepts every data set that fewbit takes."""

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


def _with_quantize_config(original: Callable[..., None]) -> Callable[..., None]:
    """Return a `save_pretrained` that also writes quantize_config.json, and config.json's former keys."""

    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        original(self, save_directory, *args, **kwargs)
        config = getattr(self.config, "quantization_config", None)
        saved = not transformers_internals.has_adapter(self) and kwargs.get("is_main_process", True)
        if isinstance(config, GPTQConfig) and saved:
            write_json(Path(save_directory) / QUANTIZE_CONFIG, config.to_dict())
            saved_config = json.loads((Path(save_directory) / CONFIG).read_text(encoding="utf-8"))
            write_json(Path(save_directory) / CONFIG, with_legacy_keys(saved_config))

    return save_pretrained
