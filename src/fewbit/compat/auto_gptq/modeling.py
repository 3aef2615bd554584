"""AutoGPTQ's model classes: a transformers model with AutoGPTQ's methods.

Any architecture works without a definition. A subclass of `BaseGPTQForCausalLM` may still name blocks and layers; then
only these are quantized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ...checkpoint.reader import find_weights
from ...checkpoint.safe_io import read_json
from ...checkpoint.writer import QUANTIZE_CONFIG
from ...errors import ConfigError, StateError
from ...gptq_arguments import quantize_in_memory, warn, warn_about_order, warn_not_needed, write_json
from ...hf.blocks import get_seqlen
from ...hf.load import load
from ...hf.quantized_layers import prepare_layers
from ...output import upload
from ..loading import check_weights_name, device_arguments, refuse_disk
from .config import (
    BaseQuantizeConfig,
    add_metadata,
    calibration_examples,
    local_folder,
    pad_token_of,
    rename_weights,
    settings_of,
    take_hub_arguments,
    text_metadata,
)


class BaseGPTQForCausalLM(nn.Module):
    """A causal language model, quantized or to be quantized.

    Attributes:
        model: the transformers model.
        quantize_config: its settings.
        layers_block_name: name of the list of blocks, set by a subclass; None for all numbered blocks.
        inside_layer_modules: layer names inside a block, set by a subclass; None for all.
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
        """Load a model to be quantized, by default on the CPU.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            quantize_config: how to quantize it.
            max_memory: device → bytes; the model is then distributed over these devices.
            trust_remote_code: run Python code that comes with the model.
            torch_dtype: dtype of the forward pass and of weights that are not quantized. On CPUs, bfloat16 is faster.
            **model_init_kwargs: arguments of `AutoModelForCausalLM.from_pretrained`.

        Raises:
            StateError: it is quantized already.
            ConfigError: `max_memory` has disk entries.
        """
        options = {**model_init_kwargs, "dtype": torch_dtype, "trust_remote_code": trust_remote_code}
        options.pop("low_cpu_mem_usage", None)
        refuse_disk(options.get("device_map"), max_memory)
        hub = take_hub_arguments(options)
        name = str(pretrained_model_name_or_path)
        values, _ = PreTrainedConfig.get_config_dict(name, **hub)
        if values.get("quantization_config"):
            raise StateError(f"{name} is quantized already: load it with AutoGPTQForCausalLM.from_quantized")
        if max_memory:
            options = {"device_map": "auto", "max_memory": max_memory, **options}
        model = AutoModelForCausalLM.from_pretrained(name, **options, **hub)
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
        """Load a quantized checkpoint, written by any tool.

        Args:
            model_name_or_path: folder or Hub id.
            device_map: as in transformers.
            max_memory: device → bytes, for a `device_map` given by name.
            device: one device; without `device` and `device_map`, the accelerator, or the CPU if there is none.
            use_marlin: require the Marlin kernel.
            torch_dtype: dtype of the activations; the default is float16, on the CPU the faster bfloat16.
            quantize_config: settings of a checkpoint that has none.
            model_basename: expected name of the weight file; None for any.
            use_safetensors: pickles are refused; False is logged.
            trust_remote_code: run Python code that comes with the model.
            trainable: pass gradients through the layers, for adapters.
            low_cpu_mem_usage, use_triton, use_qigen, inject_fused_attention, inject_fused_mlp, use_cuda_fp16,
                warmup_triton, disable_exllama, disable_exllamav2: not needed.
            **kwargs: ``subfolder``, and ``revision``, ``cache_dir``, ``token`` … for the Hub.

        Raises:
            CheckpointError: the checkpoint is not GPTQ, or is damaged.
            ConfigError: a device does not exist, or `quantize_config` contradicts the checkpoint.
            KernelError: Marlin was asked for and cannot run; the message says why.
        """
        warn_not_needed(
            low_cpu_mem_usage=low_cpu_mem_usage,
            use_triton=use_triton,
            use_qigen=use_qigen,
            inject_fused_attention=inject_fused_attention,
            inject_fused_mlp=inject_fused_mlp,
            use_cuda_fp16=not use_cuda_fp16,
            warmup_triton=warmup_triton,
            disable_exllama=disable_exllama is not None,
            disable_exllamav2=disable_exllamav2,
        )
        if not use_safetensors:
            warn("use_safetensors=False", "safetensors files are read; opening pickles can run code")
        hub = take_hub_arguments(kwargs)
        if kwargs:
            warn(", ".join(kwargs), "unknown to from_quantized and without effect")
        where = device_arguments(device, device_map, max_memory)
        folder = local_folder(model_name_or_path, **hub)
        settings = settings_of(folder, quantize_config)
        if model_basename is not None:
            check_weights_name(
                folder, model_basename, [f"gptq_model-{settings.bits}bit-{settings.group_size}g"]
            )
        index, files = find_weights(folder, settings.model_file_base_name)
        kernel = "marlin" if use_marlin else "auto"
        on_cpu = getattr(where.get("device"), "type", None) == "cpu"
        model = load(
            folder,
            dtype=torch_dtype or (torch.bfloat16 if on_cpu else torch.float16),
            kernel=kernel,
            trust_remote_code=trust_remote_code,
            quantization_config=settings.to_dict(),
            **where,
        )
        settings.model_name_or_path = str(model_name_or_path)
        settings.model_file_base_name = (index or files[0]).name.partition(".safetensors")[0]
        loaded = cls(model, True, settings)
        loaded._kernel = kernel
        if trainable:
            loaded.enable_trainable_mode()
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
        """Quantize the model in place, on its device.

        Args:
            examples: dicts of ``input_ids`` and ``attention_mask``, as lists or tensors; all are used.
            batch_size: examples per forward pass, padded to the longest with the model's pad or end token.
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
        warn_not_needed(
            use_triton=use_triton,
            use_cuda_fp16=not use_cuda_fp16,
            autotune_warmup_after_quantized=autotune_warmup_after_quantized,
            cache_examples_on_gpu=not cache_examples_on_gpu,
        )
        warn_about_order(settings.desc_act, settings.static_groups, settings.true_sequential)
        dataset = calibration_examples(examples)
        quantize_in_memory(
            self.model,
            settings.quant_config(num_samples=len(dataset), seq_len=self.seqlen, batch_size=batch_size),
            dataset,
            pad_token_of(self.config),
            block_name=self.layers_block_name,
            modules=self.inside_layer_modules,
        )
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
            save_dir: folder, created if missing.
            use_safetensors: safetensors files are always written; False is logged.
            safetensors_metadata: entries to add to the files' metadata.

        Raises:
            StateError: the model is not quantized yet.
        """
        if not self.quantized:
            raise StateError("this model is not quantized yet: call quantize first, then save it")
        if not use_safetensors:
            warn("use_safetensors=False", "safetensors files are written; opening pickles can run code")
        metadata = text_metadata(safetensors_metadata)
        folder, settings = Path(save_dir), self.quantize_config
        self.model.save_pretrained(folder)
        base_name = settings.model_file_base_name or "model"
        if base_name != "model":
            rename_weights(folder, base_name)
        add_metadata(folder, metadata)
        settings.model_file_base_name = base_name
        settings.save_pretrained(folder)
        file, written = folder / QUANTIZE_CONFIG, self.config.quantization_config.to_dict()
        write_json(file, {**read_json(file), **written, "model_name_or_path": None})  # paths are private
        settings.model_name_or_path = str(save_dir)

    def save_pretrained(
        self,
        save_dir: str | Path,
        use_safetensors: bool = True,
        safetensors_metadata: Mapping[Any, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Alias of `save_quantized`."""
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
            repo_id: name of the repository, created if missing.
            save_dir: folder to save the model in first; required if it was not saved before.
            use_safetensors, safetensors_metadata: arguments of `save_quantized`.
            commit_message, create_pr: options of the upload.
            private: whether a new repository is private.
            token, use_auth_token: Hub token; the second name is the older one.

        Raises:
            StateError: the model was not saved, and there is no `save_dir`.
            OutputError: the upload failed.
        """
        if save_dir is not None:
            self.save_quantized(save_dir, bool(use_safetensors), safetensors_metadata)
        saved = self.quantize_config.model_name_or_path
        if saved is None or not Path(saved).is_dir():
            raise StateError("the model was not saved yet: call save_quantized first, or pass save_dir")
        token = use_auth_token if token is None else token
        return upload(
            Path(saved), repo_id, commit_message, token=token, private=private, create_pr=bool(create_pr)
        )

    # Running.
    @property
    def quantized(self) -> bool:
        """Whether the model is quantized."""
        return self._quantized

    @property
    def hf_device_map(self) -> Any:
        """The model's device map; None for a model on one device."""
        return getattr(self.model, "hf_device_map", None)

    @property
    def seqlen(self) -> int:
        """Maximum sequence length of the model."""
        return get_seqlen(self.model)

    def to(self, device: Any) -> BaseGPTQForCausalLM:  # type: ignore[override]
        """Move the model."""
        self.model.to(device)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model's `generate` in inference mode."""
        with torch.inference_mode():
            return self.model.generate(*args, **kwargs)

    def enable_trainable_mode(self, enabled: bool = True) -> None:
        """Pass gradients through the quantized layers, for adapters."""
        prepare_layers(self.model, self._kernel, trainable=enabled)
        self.trainable = enabled

    def disable_trainable_mode(self) -> None:
        """Use kernels for inference again."""
        self.enable_trainable_mode(enabled=False)

    def warmup_triton(self, enabled: bool = True) -> None:
        """Do nothing: kernels need no warm-up."""
        if enabled:
            warn_not_needed(warmup_triton=True)

    def __getattr__(self, name: str) -> Any:
        # Every other attribute, such as device and prepare_inputs_for_generation, belongs to the model.
        modules = self.__dict__.get("_modules", {})
        if name == "model" or "model" not in modules:
            return super().__getattr__(name)
        return getattr(modules["model"], name)


class AutoGPTQForCausalLM:
    """Loads any causal language model, dense or quantized."""

    def __init__(self) -> None:
        raise StateError(
            "AutoGPTQForCausalLM is not made directly: AutoGPTQForCausalLM.from_pretrained loads a model to be "
            "quantized, AutoGPTQForCausalLM.from_quantized a quantized one"
        )

    from_pretrained = BaseGPTQForCausalLM.from_pretrained
    from_quantized = BaseGPTQForCausalLM.from_quantized
