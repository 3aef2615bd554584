"""What vLLM asks about a checkpoint: whether fewbit runs it, and how each of its layers is quantized.

The tensors in the files decide which layers are quantized, and config.json decides how; both are known before vLLM
builds the model. vLLM's names of layers may differ from the files': it says how before it asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform
from vllm.transformers_utils.config import get_safetensors_params_metadata

from .. import native
from ..checkpoint.layout import QWEIGHT
from ..checkpoint.quantization_config import CheckpointSettings, parse
from ..checkpoint.reader import LayerSpec, layer_names, layer_spec
from ..checkpoint.safetensors_file import DTYPES, TensorInfo
from ..errors import CheckpointError, ConfigError, KernelError
from .experts_method import FewbitExpertsMethod
from .linear_method import FewbitLinearMethod

NAME = "fewbit"


class FewbitConfig(QuantizationConfig):  # type: ignore[misc]
    """The quantization of one checkpoint.

    Attributes:
        settings: what config.json says.
        layers: every quantized layer under vLLM's name.
    """

    def __init__(self, settings: CheckpointSettings) -> None:
        super().__init__()
        self.settings = settings
        self.layers: dict[str, LayerSpec] = {}

    def __repr__(self) -> str:
        return f"FewbitConfig({self.settings!r})"

    @classmethod
    def get_name(cls) -> str:
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return list(native.DTYPES)

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # of a GPU

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FewbitConfig:
        """Read a ``quantization_config``.

        Raises:
            CheckpointError: fewbit cannot read it.
            KernelError: fewbit has no compiled module here.
        """
        if not native.available():
            raise KernelError(native.unsupported_reason())
        return cls(parse(config, "config.json"))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """ "fewbit" for a GPTQ checkpoint on a CPU, unless the user asks for another method.

        Raises:
            ConfigError: the user asks for fewbit on another device.
        """
        if str(hf_quant_cfg.get("quant_method", "")).lower() != "gptq" or user_quant not in (None, NAME):
            return None
        if current_platform.is_cpu():
            return NAME
        if user_quant == NAME:
            raise ConfigError(
                f"--quantization {NAME} runs on CPUs, and this vLLM runs on {current_platform.device_name}; "
                "leave the option out, and vLLM uses its own kernels"
            )
        return None

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Read the headers of the files.

        Raises:
            CheckpointError: they hold no quantized layer, or contradict config.json.
        """
        headers = get_safetensors_params_metadata(model_name, revision=revision)
        tensors = {
            name: TensorInfo(DTYPES[info["dtype"]], tuple(info["shape"]), *info["data_offsets"])
            for name, info in headers.items()
            if "dtype" in info  # else the metadata of a file
        }
        self.layers = {name: layer_spec(name, self.settings, tensors) for name in layer_names(tensors)}
        if not self.layers:
            raise CheckpointError(
                f"config.json of {model_name} says gptq, but no tensor in its safetensors files is named *.{QWEIGHT}"
            )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Rename the layers as vLLM does."""
        renamed = {hf_to_vllm_mapper.map_name(name): spec for name, spec in self.layers.items()}
        self.layers = {name: spec for name, spec in renamed.items() if name is not None}

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Renames nothing; vLLM's own would drop ``g_idx``."""
        return WeightsMapper()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method for one layer of vLLM's model; None where vLLM's own layers are not quantized.

        Raises:
            CheckpointError: only some experts of a layer are quantized.
        """
        if isinstance(layer, RoutedExperts):
            specs = [spec for name, spec in self.layers.items() if name.startswith(f"{prefix}.")]
            if not specs:
                return UnquantizedFusedMoEMethod(layer.moe_config)
            return FewbitExpertsMethod(layer.moe_config, _formats(specs), self.settings.format, prefix)
        if not isinstance(layer, LinearBase | ParallelLMHead):
            return None
        specs = [self.layers[name] for name in self._merged_names(prefix) if name in self.layers]
        if specs:
            return FewbitLinearMethod(_formats(specs), self.settings.format, prefix)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def _merged_names(self, prefix: str) -> list[str]:
        """Names in the files of the layers that vLLM merges into the layer `prefix`."""
        stem, _, name = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(name, [])
        return [prefix, *(f"{stem}.{part}" if stem else part for part in parts)]


def _formats(specs: list[LayerSpec]) -> list[tuple[int, int]]:
    return sorted({(spec.bits, spec.group_size) for spec in specs})
