"""`BaseQuantizeConfig`: AutoGPTQ's settings, and its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ...checkpoint.quantization_config import CheckpointSettings, parse
from ...checkpoint.safe_io import read_json
from ...config import QuantConfig
from ...errors import CheckpointError
from ..loading import local_folder
from ..settings import LOG, quant_config

QUANTIZE_CONFIG = "quantize_config.json"
_FILES = (QUANTIZE_CONFIG, "quant_config.json", "config.json")
_SYNONYMS = {"w_bit": "bits", "q_group_size": "group_size"}


@dataclass
class BaseQuantizeConfig:
    """How a model is, or is to be, quantized.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: inputs that share a scale, or −1 for whole rows.
        damp_percent: between 0 and 1, of the mean diagonal of the Hessian.
        desc_act: columns by falling activation, with a g_idx.
        static_groups: with `desc_act`: the same without a g_idx.
        sym: symmetric grids.
        true_sequential: always so.
        is_marlin_format: of a checkpoint that only the Marlin kernel reads; fewbit neither reads nor writes it.
        model_name_or_path: where the checkpoint lies, once it was saved or loaded.
        model_file_base_name: name of its weight file, without the ending.
        awq_gemm_checkpoint: of an AWQ checkpoint; not read.

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
        """These settings for `fewbit.quantize`; `settings` are further ones of its own."""
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
        """Plain JSON types, with the quantization method."""
        values = asdict(self)
        del values["awq_gemm_checkpoint"]
        return {**values, "quant_method": "gptq"}

    def save_pretrained(self, save_dir: str | Path, **kwargs: Any) -> None:
        """Write quantize_config.json into the folder `save_dir`."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
        (Path(save_dir) / QUANTIZE_CONFIG).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, save_dir: str | Path, **kwargs: Any) -> BaseQuantizeConfig:
        """Read it from quantize_config.json, quant_config.json or config.json, the first that is there.

        Args:
            save_dir: a folder or a Hub id.
            **kwargs: ``subfolder``, ``revision``, ``cache_dir``, ``token`` … of a Hub repository.

        Raises:
            CheckpointError: none of the files is there, or they describe something other than GPTQ.
        """
        folder = local_folder(save_dir, **kwargs)
        file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
        if file is None:
            raise CheckpointError(f"{folder} has none of {', '.join(_FILES)}: it is no quantized checkpoint")
        values = read_json(file)
        if file.name == "config.json":
            found = values.get("quantization_config")
            if not isinstance(found, dict):
                raise CheckpointError(
                    f"{file} has no quantization_config: quantize the model first, or pass quantize_config"
                )
            values = found
        return cls.of(values, file)

    @classmethod
    def of(cls, values: Mapping[str, Any], file: Path) -> BaseQuantizeConfig:
        """From a checkpoint's quantization configuration; what AutoGPTQ has no field for is logged.

        Args:
            values: the JSON object. file: where it is from, for messages.

        Raises:
            CheckpointError: it describes something other than GPTQ, or has a value that cannot be meant.
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
