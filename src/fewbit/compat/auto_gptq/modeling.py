"""`BaseGPTQForCausalLM`: a model with AutoGPTQ's methods around a transformers model.

Any architecture will do: fewbit needs no definition of it. A subclass of `BaseGPTQForCausalLM` may still name
blocks and layers, and then only these are quantized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ...checkpoint.reader import find_weights
from ...errors import ConfigError, ModelError
from ...quantization import quantize
from ..loading import (
    HUB_ARGUMENTS,
    check_weights_name,
    load_quantized,
    local_folder,
    placement,
    prepare,
    refuse_disk,
)
from ..optimum.utils import get_seqlen
from ..settings import check_in_memory, note_device, note_order, restrict, say
from .arguments import dataset_of, pad_token_of, rename_token, say_not_needed, settings_of
from .config import QUANTIZE_CONFIG, BaseQuantizeConfig
from .files import add_metadata, complete_config, rename_weights, text_metadata, upload


class StateError(ModelError, EnvironmentError):
    """A model is quantized already, or is not yet; or a class is used that is only a name."""


class BaseGPTQForCausalLM(nn.Module):
    """A causal language model, quantized or to be quantized.

    Attributes:
        model: the transformers model. quantize_config: its settings.
        layers_block_name: list of blocks, for a subclass; by default all numbered blocks.
        inside_layer_modules: layers in a block, for a subclass; by default all.
    """

    layer_type: ClassVar[Any] = None
    layers_block_name: ClassVar[str | None] = None
    outside_layer_modules: ClassVar[Sequence[str] | None] = None
    inside_layer_modules: ClassVar[Sequence[Sequence[str]] | None] = None
    lm_head_name: ClassVar[str] = "lm_head"

    def __init__(
        self,
        model: PreTrainedModel,
        quantized: bool,
        quantize_config: BaseQuantizeConfig,
        is_triton_backend: bool = False,
        injected_fused_attention: bool = False,
        injected_fused_mlp: bool = False,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.model_type = model.config.model_type
        self.config = model.config
        self.quantize_config = quantize_config
        self.is_triton_backend = is_triton_backend
        self.injected_fused_attention = injected_fused_attention
        self.injected_fused_mlp = injected_fused_mlp
        self.trainable = trainable
        self._quantized = quantized
        self._kernel = "auto"

    # Loading.
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        quantize_config: BaseQuantizeConfig,
        max_memory: Mapping[Any, Any] | None = None,
        trust_remote_code: bool = False,
        torch_dtype: torch.dtype = torch.float16,
        **model_init_kwargs: Any,
    ) -> BaseGPTQForCausalLM:
        """Load a model to be quantized, on the CPU unless told otherwise.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            quantize_config: how to quantize it.
            max_memory: device → bytes; the model is then spread over these devices.
            trust_remote_code: run Python code that comes with the model.
            torch_dtype: of the weights that stay, and of the forward pass. On CPUs, bfloat16 is faster.
            **model_init_kwargs: of `AutoModelForCausalLM.from_pretrained`.

        Raises:
            StateError: it is quantized already.
            ConfigError: `max_memory` has disk entries.
        """
        options = {**model_init_kwargs, "dtype": torch_dtype, "trust_remote_code": trust_remote_code}
        options.pop("low_cpu_mem_usage", None)
        rename_token(options)
        refuse_disk(options.get("device_map"), max_memory)
        _refuse_quantized(pretrained_model_name_or_path, options)
        if max_memory:
            options = {"device_map": "auto", "max_memory": max_memory, **options}
        model = AutoModelForCausalLM.from_pretrained(str(pretrained_model_name_or_path), **options)
        return cls(model.eval(), False, quantize_config)

    @classmethod
    def from_quantized(
        cls,
        model_name_or_path: str | Path,
        device_map: Any = None,
        max_memory: Mapping[Any, Any] | None = None,
        device: str | int | torch.device | None = None,
        low_cpu_mem_usage: bool = False,
        use_triton: bool = False,
        use_qigen: bool = False,
        use_marlin: bool = False,
        torch_dtype: torch.dtype | None = None,
        inject_fused_attention: bool = False,
        inject_fused_mlp: bool = False,
        use_cuda_fp16: bool = True,
        quantize_config: BaseQuantizeConfig | None = None,
        model_basename: str | None = None,
        use_safetensors: bool = True,
        trust_remote_code: bool = False,
        warmup_triton: bool = False,
        trainable: bool = False,
        disable_exllama: bool | None = None,
        disable_exllamav2: bool = False,
        **kwargs: Any,
    ) -> BaseGPTQForCausalLM:
        """Load a quantized checkpoint, from any tool.

        Args:
            model_name_or_path: folder or Hub id.
            device_map: as in transformers. device: one device. Neither: the accelerator, or else the CPU.
            max_memory: device → bytes, for a `device_map` by name.
            use_marlin: ask for that kernel.
            torch_dtype: of the activations; by default float16, and on the CPU bfloat16, which is the fast one.
            quantize_config: of a checkpoint that has none of its own.
            model_basename: weight file, if it is to be checked.
            use_safetensors: False is noted: pickles are refused.
            trust_remote_code: run Python code that comes with the model.
            trainable: gradients go through the layers, for adapters.
            low_cpu_mem_usage, use_triton, use_qigen, inject_fused_attention, inject_fused_mlp, use_cuda_fp16,
                warmup_triton, disable_exllama, disable_exllamav2: not needed.
            **kwargs: ``subfolder``, ``revision``, ``cache_dir``, ``token`` … of a Hub repository.

        Raises:
            CheckpointError: no GPTQ checkpoint, or damaged.
            ConfigError: a device is not there, or `quantize_config` contradicts the checkpoint.
            KernelError: Marlin was asked for and cannot run; the message says why.
        """
        given = {
            "low_cpu_mem_usage": low_cpu_mem_usage,
            "use_triton": use_triton,
            "use_qigen": use_qigen,
            "inject_fused_attention": inject_fused_attention,
            "inject_fused_mlp": inject_fused_mlp,
            "use_cuda_fp16": not use_cuda_fp16,
            "warmup_triton": warmup_triton,
            "disable_exllama": disable_exllama is not None,
            "disable_exllamav2": disable_exllamav2,
        }
        say_not_needed(name for name, is_given in given.items() if is_given)
        if not use_safetensors:
            say({"use_safetensors=False": "safetensors files are read; opening pickles can run code"})
        rename_token(kwargs)
        hub = {name: kwargs.pop(name) for name in (*HUB_ARGUMENTS, "subfolder") if name in kwargs}
        if kwargs:
            say({", ".join(kwargs): "unknown to from_quantized and without effect"})
        where = placement(device, device_map, max_memory)
        folder = local_folder(model_name_or_path, **hub)
        settings = settings_of(folder, quantize_config)
        if model_basename is not None:
            usual = f"gptq_model-{settings.bits}bit-{settings.group_size}g"
            check_weights_name(folder, model_basename, (usual,))
        index, files = find_weights(folder, settings.model_file_base_name)
        kernel = "marlin" if use_marlin else "auto"
        on_cpu = getattr(where.get("device"), "type", None) == "cpu"
        model = load_quantized(
            folder,
            where,
            kernel=kernel,
            trainable=trainable,
            dtype=torch_dtype or (torch.bfloat16 if on_cpu else torch.float16),
            trust_remote_code=trust_remote_code,
            quantization_config=settings.to_dict(),
        )
        settings.model_name_or_path = str(model_name_or_path)
        settings.model_file_base_name = (index or files[0]).name.partition(".safetensors")[0]
        loaded = cls(model, True, settings, trainable=trainable)
        loaded._kernel = kernel
        return loaded

    # Quantizing.
    def quantize(
        self,
        examples: Sequence[Mapping[str, Any]],
        batch_size: int = 1,
        use_triton: bool = False,
        use_cuda_fp16: bool = True,
        autotune_warmup_after_quantized: bool = False,
        cache_examples_on_gpu: bool = True,
    ) -> None:
        """Quantize the model in place, on the device where it is.

        Args:
            examples: dicts of ``input_ids`` and ``attention_mask``, lists or tensors; all are used.
            batch_size: examples per forward, padded to the longest with the model's pad or end token.
            use_triton, use_cuda_fp16, autotune_warmup_after_quantized, cache_examples_on_gpu: not needed.

        Raises:
            StateError: it is quantized already.
            CalibrationError: there are no examples, or they cannot be read.
            ConfigError: parts of the model are offloaded, or the Marlin format is asked for.
        """
        if self.quantized:
            raise StateError("this model is quantized already: load the original with from_pretrained")
        settings = self.quantize_config
        if settings.is_marlin_format:
            raise ConfigError(
                "is_marlin_format: fewbit writes the format that every engine reads, Marlin kernels too; leave it out"
            )
        given = {
            "use_triton": use_triton,
            "use_cuda_fp16": not use_cuda_fp16,
            "autotune_warmup_after_quantized": autotune_warmup_after_quantized,
            "cache_examples_on_gpu": not cache_examples_on_gpu,
        }
        say_not_needed(name for name, is_given in given.items() if is_given)
        note_order(settings.desc_act, settings.static_groups, settings.true_sequential)
        check_in_memory(self.model)
        note_device(self.model)
        dataset = dataset_of(examples)
        config = settings.quant_config(num_samples=len(dataset), seq_len=self.seqlen, batch_size=batch_size)
        config = restrict(config, self.model, self.layers_block_name, self.inside_layer_modules)
        quantize(self.model, config, dataset=dataset, tokenizer=pad_token_of(self.config))
        self._quantized = True

    # Saving.
    def save_quantized(
        self,
        save_dir: str | Path,
        use_safetensors: bool = True,
        safetensors_metadata: Mapping[Any, Any] | None = None,
    ) -> None:
        """Write a checkpoint into the folder `save_dir`.

        The weights are called model.safetensors, as transformers and serving engines expect, unless
        `quantize_config.model_file_base_name` says otherwise.

        Args:
            save_dir: made if missing.
            use_safetensors: False is noted: safetensors files are written in any case.
            safetensors_metadata: added to the files' own.

        Raises:
            StateError: the model is not quantized yet.
        """
        if not self.quantized:
            raise StateError("this model is not quantized yet: call quantize first, then save it")
        if not use_safetensors:
            say({"use_safetensors=False": "safetensors files are written; opening pickles can run code"})
        metadata = text_metadata(safetensors_metadata)
        folder, settings = Path(save_dir), self.quantize_config
        self.model.save_pretrained(folder)
        base_name = settings.model_file_base_name or "model"
        if base_name != "model":
            rename_weights(folder, base_name)
        add_metadata(folder, metadata)
        settings.model_file_base_name = base_name
        settings.save_pretrained(folder)
        complete_config(folder / QUANTIZE_CONFIG, self.config.quantization_config.to_dict())
        settings.model_name_or_path = str(save_dir)

    def save_pretrained(
        self,
        save_dir: str | Path,
        use_safetensors: bool = True,
        safetensors_metadata: Mapping[Any, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """The same as `save_quantized`."""
        self.save_quantized(save_dir, use_safetensors, safetensors_metadata)

    def push_to_hub(
        self,
        repo_id: str,
        save_dir: str | Path | None = None,
        use_safetensors: bool | None = True,
        safetensors_metadata: Mapping[Any, Any] | None = None,
        commit_message: str | None = "Upload of a model quantized with fewbit",
        use_auth_token: bool | str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        create_pr: bool | None = False,
    ) -> Any:
        """Upload the saved folder to the Hub.

        Args:
            repo_id: its name there; made if missing.
            save_dir: save the model there first; needed if it was not saved before.
            use_safetensors, safetensors_metadata: of `save_quantized`.
            commit_message: of the upload.
            use_auth_token: older name of `token`. private, create_pr: of the repository and the upload.

        Raises:
            StateError: the model was not saved, and there is no `save_dir`.
            OutputError: it cannot be uploaded.
        """
        if save_dir is not None:
            self.save_quantized(save_dir, bool(use_safetensors), safetensors_metadata)
        saved = self.quantize_config.model_name_or_path
        if saved is None or not Path(saved).is_dir():
            raise StateError("the model was not saved yet: call save_quantized first, or pass save_dir")
        return upload(
            Path(saved),
            repo_id,
            private=private,
            token=token if token is not None else use_auth_token,
            message=commit_message,
            create_pr=create_pr,
        )

    # Running.
    @property
    def quantized(self) -> bool:
        """Whether the model is quantized."""
        return self._quantized

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        device: torch.device = self.model.device
        return device

    @property
    def hf_device_map(self) -> Any:
        """The model's device map; None if it is on one device."""
        return getattr(self.model, "hf_device_map", None)

    @property
    def seqlen(self) -> int:
        """The longest sequence that the model takes."""
        return get_seqlen(self.model)

    def to(self, device: Any) -> BaseGPTQForCausalLM:  # type: ignore[override]
        """Move the model."""
        self.model.to(device)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward."""
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`, without gradients."""
        with torch.inference_mode():
            return self.model.generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self.model.prepare_inputs_for_generation(*args, **kwargs)

    def enable_trainable_mode(self, enabled: bool = True) -> None:
        """Let gradients go through the quantized layers, for adapters."""
        prepare(self.model, self._kernel, trainable=enabled)
        self.trainable = enabled

    def disable_trainable_mode(self) -> None:
        """Use kernels for inference again."""
        self.enable_trainable_mode(enabled=False)

    def warmup_triton(self, enabled: bool = True) -> None:
        """Nothing: kernels need no warm-up."""
        if enabled:
            say_not_needed(["warmup_triton"])

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name == "model" or "model" not in modules:
            return super().__getattr__(name)
        return getattr(modules["model"], name)


def _refuse_quantized(name: str | Path, options: Mapping[str, Any]) -> None:
    hub = {key: options[key] for key in (*HUB_ARGUMENTS, "subfolder") if key in options}
    values, _ = PreTrainedConfig.get_config_dict(str(name), **hub)
    if values.get("quantization_config"):
        raise StateError(f"{name} is quantized already: load it with AutoGPTQForCausalLM.from_quantized")
