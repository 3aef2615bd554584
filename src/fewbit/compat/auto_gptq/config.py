"""AutoGPTQ's settings and arguments: `BaseQuantizeConfig` and its files, checks, and translation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ...checkpoint.quantization_config import CheckpointSettings, parse
from ...checkpoint.safe_io import read_json
from ...checkpoint.writer import CONFIG, QUANTIZE_CONFIG
from ...config import QuantConfig
from ...errors import CalibrationError, CheckpointError, ConfigError
from ...gptq_arguments import LOG, PadToken, quant_config, warn, write_json
from ..loading import local_folder

_FILES = (QUANTIZE_CONFIG, "quant_config.json", CONFIG)
_SYNONYMS = {"w_bit": "bits", "q_group_size": "group_size"}
_ON_REQUEST = "a kernel of another package runs only where it is asked for"
_NOT_NEEDED = {
    "use_triton": "the kernel is chosen from those that can run here",
    "use_qigen": "fewbit has CPU kernels of its own",
    "use_cuda_fp16": "kernels follow the dtype of the activations",
    "inject_fused_attention": "fewbit.load(fuse=True) fuses attention on CPUs; the results are the same",
    "inject_fused_mlp": "fewbit.load(fuse=True) fuses feed-forward layers on CPUs; the results are the same",
    "warmup_triton": "kernels need no warm-up",
    "autotune_warmup_after_quantized": "kernels need no warm-up",
    "cache_examples_on_gpu": "examples stay on the model's device; every batch runs through the model once",
    "low_cpu_mem_usage": "weights are read from mapped files straight to their device",
    "disable_exllama": _ON_REQUEST,
    "disable_exllamav2": _ON_REQUEST,
}


@dataclass
class BaseQuantizeConfig:
    """Settings of a quantized model, or of a quantization.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: number of inputs that share a scale, or −1 for whole rows.
        damp_percent: damping as a fraction of the mean diagonal of the Hessian, between 0 and 1.
        desc_act: quantize columns by decreasing activation, with a g_idx.
        static_groups: with `desc_act`: the same without a g_idx.
        sym: use symmetric grids.
        true_sequential: always true.
        is_marlin_format: format that only the Marlin kernel reads; fewbit neither reads nor writes it.
        model_name_or_path: folder or Hub id of the checkpoint, after it was saved or loaded.
        model_file_base_name: name of its weight file, without the ending.
        awq_gemm_checkpoint: flag of AWQ checkpoints, which fewbit does not read.

    Raises:
        ConfigError: a value is out of range.
    """

    bits: int = 4
    group_size: int = -1
    damp_percent: float = 0.01
    desc_act: bool = True
    static_groups: bool = False
    sym: bool = True
    true_sequential: bool = True
    is_marlin_format: bool = False
    model_name_or_path: str | None = None
    model_file_base_name: str | None = None
    awq_gemm_checkpoint: bool | None = False

    def __post_init__(self) -> None:
        self.quant_config()

    def quant_config(self, **settings: Any) -> QuantConfig:
        """Translate to `QuantConfig`; `settings` are further fields of it."""
        return quant_config(
            bits=self.bits,
            group_size=self.group_size,
            damp_percent=self.damp_percent,
            desc_act=self.desc_act,
            static_groups=self.static_groups,
            sym=self.sym,
            **settings,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, with the quantization method."""
        values = asdict(self)
        del values["awq_gemm_checkpoint"]
        return {**values, "quant_method": "gptq"}

    def save_pretrained(self, save_dir: str | Path, **kwargs: Any) -> None:
        """Write quantize_config.json into the folder `save_dir`."""
        write_json(Path(save_dir) / QUANTIZE_CONFIG, self.to_dict())

    @classmethod
    def from_pretrained(cls, save_dir: str | Path, **kwargs: Any) -> BaseQuantizeConfig:
        """Read the settings from the first of quantize_config.json, quant_config.json and config.json that exists.

        Args:
            save_dir: a folder or a Hub id.
            **kwargs: ``subfolder``, and ``revision``, ``cache_dir``, ``token`` … for the Hub.

        Raises:
            CheckpointError: none of the files exists, or they do not describe GPTQ.
        """
        folder = local_folder(save_dir, **kwargs)
        file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
        if file is None:
            raise CheckpointError(f"{folder} has none of {', '.join(_FILES)}: it is no quantized checkpoint")
        values = read_json(file)
        if file.name == CONFIG:
            found = values.get("quantization_config")
            if not isinstance(found, dict):
                raise CheckpointError(
                    f"{file} has no quantization_config: quantize the model first, or pass quantize_config"
                )
            values = found
        return cls.of(values, file)

    @classmethod
    def of(cls, values: Mapping[str, Any], file: Path) -> BaseQuantizeConfig:
        """Make the settings from a checkpoint's quantization configuration; keys without a field are logged.

        Args:
            values: the JSON object.
            file: its file, for messages.

        Raises:
            CheckpointError: it does not describe GPTQ, or has an impossible value.
        """
        if values.get("version") == "GEMM":
            raise CheckpointError(f"{file} describes an AWQ checkpoint; fewbit reads GPTQ checkpoints only")
        values = {_SYNONYMS.get(key, key): value for key, value in values.items()}
        settings = parse(values, str(file), default_method="gptq")
        names = {field.name for field in fields(cls)}
        _note_rest(settings, names, file)
        known = {key: value for key, value in values.items() if key in names and value is not None}
        return cls(**known)


def _note_rest(settings: CheckpointSettings, names: set[str], file: Path) -> None:
    rest = sorted(set(settings.extra) - names)
    if rest:
        LOG.warning("%s: BaseQuantizeConfig has no field for %s", file.name, ", ".join(rest))
    if "sym" in settings.assumed:
        LOG.warning("%s does not say sym: the zero points in the file are used as they are", file.name)


def settings_of(folder: Path, given: BaseQuantizeConfig | None) -> BaseQuantizeConfig:
    """Return the checkpoint's own settings, or `given` if it has none.

    Raises:
        ConfigError: both exist and contradict each other.
    """
    if given is None:
        return BaseQuantizeConfig.from_pretrained(folder)
    file = folder / CONFIG
    stated = file.exists() and "quantization_config" in read_json(file)
    if not stated and not (folder / QUANTIZE_CONFIG).exists():
        return given
    own = BaseQuantizeConfig.from_pretrained(folder)
    for name in ("bits", "group_size"):
        if getattr(own, name) != getattr(given, name):
            raise ConfigError(
                f"quantize_config says {name} {getattr(given, name)}, but the checkpoint in {folder} has "
                f"{getattr(own, name)}: leave quantize_config out"
            )
    return given


def dataset_of(examples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries of the examples that calibration needs.

    Raises:
        CalibrationError: there are no examples, or one is not a dict of token ids.
    """
    if not isinstance(examples, Sequence) or not examples:
        raise CalibrationError(
            "no examples were given: pass a list of dicts with input_ids and attention_mask"
        )
    for number, example in enumerate(examples):
        if not isinstance(example, Mapping) or "input_ids" not in example:
            raise CalibrationError(
                f"example {number} must be a dict with input_ids and attention_mask, as a tokenizer returns it, not "
                f"{type(example).__name__}"
            )
    return [{key: e[key] for key in ("input_ids", "attention_mask") if key in e} for e in examples]


def rename_token(options: dict[str, Any]) -> None:
    """Replace `use_auth_token` and `resume_download`, which transformers no longer accepts."""
    token = options.pop("use_auth_token", None)
    if token is not None:
        options.setdefault("token", token)
    options.pop("resume_download", None)


def warn_not_needed(names: Iterable[str]) -> None:
    """Log why the arguments called `names` have no effect."""
    warn({name: f"not needed: {_NOT_NEEDED[name]}" for name in names})


def pad_token_of(config: Any) -> PadToken:
    """Return the pad token of a model's configuration, or its end token."""
    pad, end = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    end = end[0] if isinstance(end, (list, tuple)) else end
    return PadToken(end if pad is None else pad)
