"""AutoGPTQ's `BaseQuantizeConfig`, its other arguments, and its names and metadata of saved files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ...atomic_io import replacing
from ...checkpoint.quantization_config import parse
from ...checkpoint.safe_io import read_json
from ...checkpoint.writer import CONFIG, INDEX, QUANTIZE_CONFIG, SINGLE
from ...config import QuantConfig
from ...errors import CalibrationError, CheckpointError, ConfigError, OutputError
from ...gptq_arguments import LOG, PadToken, quant_config, write_json
from ...modeling.source import download

_FILES = (QUANTIZE_CONFIG, "quant_config.json", CONFIG)
_SYNONYMS = {"w_bit": "bits", "q_group_size": "group_size"}
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token", "subfolder")


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
        """Make the settings from the quantization configuration in `file`; keys without a field are logged.

        Raises:
            CheckpointError: it does not describe GPTQ, or has an impossible value.
        """
        if values.get("version") == "GEMM":
            raise CheckpointError(f"{file} describes an AWQ checkpoint; fewbit reads GPTQ checkpoints only")
        values = {_SYNONYMS.get(key, key): value for key, value in values.items()}
        settings = parse(values, str(file), default_method="gptq")
        names = {field.name for field in fields(cls)}
        rest = sorted(set(settings.extra) - names)
        if rest:
            LOG.warning("%s: BaseQuantizeConfig has no field for %s", file.name, ", ".join(rest))
        if "sym" in settings.assumed:
            LOG.warning("%s does not say sym: the zero points in the file are used as they are", file.name)
        known = {key: value for key, value in values.items() if key in names and value is not None}
        return cls(**known)


def local_folder(name: str | Path, subfolder: str = "", **hub: Any) -> Path:
    """Return the folder `name`, or the local copy of the Hub repository with that name.

    Raises:
        CheckpointError: there is neither, or the download fails.
    """
    path = Path(name).expanduser()
    return (path if path.exists() else download(str(name), CheckpointError, **hub)) / subfolder


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


def take_hub_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Remove the arguments for downloads from `options`, and return them under their present names."""
    token = options.pop("use_auth_token", None)
    options.pop("resume_download", None)
    hub = {name: options.pop(name) for name in _HUB_ARGUMENTS if name in options}
    return hub if token is None else {"token": token, **hub}


def calibration_examples(examples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries of the examples that calibration needs."""
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


def pad_token_of(config: Any) -> PadToken:
    """Return the pad token of a model's configuration, or its end token."""
    pad, end = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    end = end[0] if isinstance(end, (list, tuple)) else end
    return PadToken(end if pad is None else pad)


def text_metadata(metadata: Mapping[Any, Any] | None) -> dict[str, str]:
    """Convert the metadata of a safetensors file to text."""
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise ConfigError(f"safetensors_metadata must be a dictionary, not {metadata!r}")
    texts = {str(key): str(value) for key, value in metadata.items()}
    if len(texts) < len(metadata):
        raise ConfigError(f"safetensors_metadata has two keys that are the same as text: {list(metadata)}")
    return texts


def add_metadata(folder: Path, metadata: Mapping[str, str]) -> None:
    """Add to the metadata of every safetensors file in `folder`."""
    for path in sorted(folder.glob("*.safetensors")) if metadata else ():
        with path.open("rb") as source, replacing(path) as target:
            header = json.loads(source.read(int.from_bytes(source.read(8), "little")))
            header["__metadata__"] = {**metadata, **header.get("__metadata__", {})}
            data = json.dumps(header, ensure_ascii=False).encode()
            data += b" " * (-len(data) % 8)
            target.write(len(data).to_bytes(8, "little") + data)
            shutil.copyfileobj(source, target)


def rename_weights(folder: Path, base_name: str) -> None:
    """Rename the only weight file to `base_name`.safetensors."""
    if (folder / INDEX).exists():
        raise OutputError(
            f"{folder} has its weights in several files, which keep their names: leave out model_file_base_name"
        )
    os.replace(folder / SINGLE, folder / f"{base_name}.safetensors")
