"""Quantization arguments of older GPTQ tools: checks, warnings, and their translation to fewbit's settings.

`GPTQArguments` takes the arguments that optimum's `GPTQQuantizer` and transformers' `GPTQConfig` share, and quantizes a
model in memory with `fewbit.quantize`. An argument without effect here is logged once, with the reason.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .atomic_io import write_whole
from .config import FORMATS, ActOrder, QuantConfig
from .context import resolve_device
from .errors import CalibrationError, ConfigError, ModelError
from .hf import blocks
from .hf.quantized_layers import kernel_spec, prepare_layers
from .hf.quantizer import TRAINABLE, kernel_name
from .kernels import registry
from .modeling.source import load_tokenizer, open_source
from .planning import make_plan
from .quantization import quantize

LOG = logging.getLogger("fewbit")

_ON_REQUEST = "a kernel of another package runs only where it is asked for"
_WARM_UP = "kernels need no warm-up"
_MAPPED = "weights are read from mapped files straight to their device"
_NOT_NEEDED = {
    "module_name_preceding_first_block": "the model's own forward runs, so nothing before its blocks has to be named",
    "cache_block_outputs": "every batch runs through the model once, whether block outputs could be cached or not",
    "cache_examples_on_gpu": "examples stay on the model's device; every batch runs through the model once",
    "max_input_length": "no kernel here has a buffer that depends on it",
    "exllama_set_max_input_length": "no kernel here has a buffer that depends on the input's length",
    "use_cuda_fp16": "kernels follow the dtype of the activations",
    "use_triton": "the kernel is chosen from those that can run here",
    "use_qigen": "fewbit has CPU kernels of its own",
    "use_exllama": _ON_REQUEST,
    "disable_exllama": _ON_REQUEST,
    "disable_exllamav2": _ON_REQUEST,
    "exllama_config": _ON_REQUEST,
    "inject_fused_attention": "fewbit.load(fuse=True) fuses attention on CPUs; the results are the same",
    "inject_fused_mlp": "fewbit.load(fuse=True) fuses feed-forward layers on CPUs; the results are the same",
    "warmup_triton": _WARM_UP,
    "autotune_warmup_after_quantized": _WARM_UP,
    "no_split_module_classes": "transformers knows them for its models",
    "low_cpu_mem_usage": _MAPPED,
    "offload_folder": _MAPPED,
    "offload_buffers": _MAPPED,
    "offload_state_dict": _MAPPED,
}
_MAX_SEQLEN = 4028  # optimum's limit for calibration sequences, whatever the model can take


def warn(argument: str, reason: str) -> None:
    """Log why an argument has no effect, or another one."""
    LOG.warning("%s: %s", argument, reason)


def warn_not_needed(**given: Any) -> None:
    """Log why each argument with a true value has no effect."""
    for argument, value in given.items():
        if value:
            warn(argument, f"not needed: {_NOT_NEEDED[argument]}")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_whole(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


@dataclass(frozen=True)
class PadToken:
    """A tokenizer reduced to what batches of token ids need."""

    pad_token_id: int | None


def require_pad_token(batch_size: int, pad_token_id: int | None) -> None:
    """Raise CalibrationError for batches of several sequences without a pad token."""
    if batch_size > 1 and pad_token_id is None:
        raise CalibrationError(
            f"batch_size {batch_size} needs a pad token: pass pad_token_id, for example tokenizer.eos_token_id"
        )


def quant_config(
    *,
    damp_percent: float,
    desc_act: bool,
    act_group_aware: bool = True,
    static_groups: bool = False,
    **same: Any,
) -> QuantConfig:
    """Translate the older tools' settings; those in `same` have the same name here."""
    order: ActOrder = (
        "full" if desc_act and not static_groups else "group" if desc_act or act_group_aware else "none"
    )
    return QuantConfig(damp=damp_percent, act_order=order, **same)


def warn_about_order(desc_act: bool, static_groups: bool, true_sequential: bool) -> None:
    """Log where columns or layers are quantized in another order than requested."""
    if desc_act and static_groups:
        warn(
            "static_groups",
            "groups are always static here; with desc_act, columns are ordered inside their groups, which needs no "
            "g_idx, so the checkpoint says desc_act: false",
        )
    if not true_sequential:
        warn(
            "true_sequential=False",
            "every layer sees its inputs through the quantized layers before it, which costs nothing extra here",
        )


def check_exllama(exllama_config: Mapping[str, Any] | None) -> None:
    """Raise ConfigError unless the configuration names version 1 or 2."""
    if exllama_config is not None and exllama_config.get("version") not in (1, 2):
        raise ConfigError(f"exllama_config needs a version key that is 1 or 2; got {exllama_config!r}")


def quantize_in_memory(
    model: nn.Module,
    config: QuantConfig,
    dataset: Any,
    tokenizer: Any,
    *,
    block_name: str | None,
    modules: Sequence[Sequence[str]] | None,
    kernel: str = "auto",
) -> None:
    """Quantize the selected layers of a model on its device; see `blocks.restrict` for the selection.

    Raises:
        ConfigError: parts of the model are offloaded, or a selected name is not in it.
        KernelError: the `kernel` could not run the result.
    """
    _check_device(model)
    config = blocks.restrict(config, model, block_name, modules)
    if kernel != "auto":
        like = next(model.parameters())
        for layer in make_plan(model, config).layers:
            registry.choose(kernel_spec(layer, config.format), like.device, like.dtype, kernel)
    quantize(model, config, dataset=dataset, tokenizer=tokenizer)


def _check_device(model: nn.Module) -> None:
    """Refuse parts that accelerate has offloaded, and log how a model on the CPU could be quantized faster."""
    device_map = getattr(model, "hf_device_map", None) or {}
    offloaded = [name for name, device in device_map.items() if device == "disk"]
    offloaded += [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if offloaded:
        raise ConfigError(
            f"device_map keeps {offloaded[0] or 'the model'} offloaded, and a model in memory is quantized where it "
            "is. Nothing needs to be offloaded: fewbit.quantize(FOLDER, output=OUT) streams the weights block by block"
        )
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.device.type != "cpu":
        return
    best = resolve_device("auto").type
    if best != "cpu":
        warn(
            "device",
            f"the model is on the CPU and is quantized there. Move it first (model.to({best!r})), or let "
            f"fewbit.quantize(FOLDER, output=OUT) stream it through the {best} device",
        )
    elif parameter.dtype == torch.float16:
        warn(
            "torch_dtype",
            "float16 is slow on CPUs: load the model in bfloat16, which is several times faster",
        )


class GPTQArguments:
    """The arguments of optimum's `GPTQQuantizer`, which transformers' `GPTQConfig` shares.

    Args:
        bits: 2, 3, 4 or 8.
        dataset: list of texts or of token dicts, which are all used; or wikitext2, c4, c4-new, or a text file,
            from which 128 windows are drawn.
        group_size: number of inputs that share a scale, or −1 for whole rows.
        damp_percent: damping as a fraction of the mean diagonal of the Hessian, between 0 and 1.
        desc_act: quantize columns by decreasing activation, with a g_idx.
        act_group_aware: the same inside and between groups, without a g_idx; off with `desc_act`.
        sym: use symmetric grids.
        true_sequential: always true; False is logged.
        model_seqlen: tokens per sequence; the default is the model's maximum, but not more than 4028.
        block_name_to_quantize: name of the list of blocks; the default is the first of `BLOCK_PATTERNS` that exists,
            otherwise all numbered blocks.
        module_name_preceding_first_block: checked, but not needed.
        max_input_length, cache_block_outputs: not needed.
        batch_size: sequences per forward pass.
        pad_token_id: needed for a `batch_size` above 1.
        modules_in_block_to_quantize: layer names inside the blocks; the default is all layers.
        format: "gptq" or "gptq_v2".
        meta: entries that are kept in the checkpoint.
        backend: kernel of the result: "auto", "auto_trainable", or a name that `fewbit env` lists.
        use_cuda_fp16, disable_exllama, exllama_config, checkpoint_format: arguments of optimum 1.
        **kwargs: unknown arguments, kept as `extra`.

    Raises:
        ConfigError: a value is out of range.
    """

    def __init__(
        self,
        bits: int,
        dataset: list[Any] | str | None = None,
        group_size: int = 128,
        damp_percent: float = 0.1,
        desc_act: bool = False,
        act_group_aware: bool = True,
        sym: bool = True,
        true_sequential: bool = True,
        model_seqlen: int | None = None,
        block_name_to_quantize: str | None = None,
        module_name_preceding_first_block: list[str] | None = None,
        batch_size: int = 1,
        pad_token_id: int | None = None,
        max_input_length: int | None = None,
        cache_block_outputs: bool | None = True,
        modules_in_block_to_quantize: list[list[str]] | None = None,
        format: str | None = None,
        meta: dict[str, Any] | None = None,
        backend: Any = None,
        *,
        use_cuda_fp16: bool = False,
        disable_exllama: bool = False,
        exllama_config: dict[str, Any] | None = None,
        checkpoint_format: str | None = None,
        quant_method: str = "gptq",
        **kwargs: Any,
    ) -> None:
        self.bits = bits
        self.dataset = dataset
        self.group_size = group_size
        self.damp_percent = damp_percent
        self.desc_act = desc_act
        self.act_group_aware = act_group_aware and not desc_act
        self.sym = sym
        self.true_sequential = true_sequential
        self.model_seqlen = model_seqlen
        self.block_name_to_quantize = block_name_to_quantize
        self.module_name_preceding_first_block = module_name_preceding_first_block
        self.batch_size = batch_size
        self.pad_token_id = pad_token_id
        self.max_input_length = max_input_length
        self.cache_block_outputs = cache_block_outputs
        self.modules_in_block_to_quantize = modules_in_block_to_quantize
        self.format = _single_format(format, checkpoint_format)
        self.meta = meta
        self.backend = backend
        self.use_cuda_fp16 = use_cuda_fp16
        self.disable_exllama = disable_exllama
        self.exllama_config = exllama_config
        self.quant_method = quant_method
        self.extra = kwargs
        check_exllama(exllama_config)
        if str(getattr(quant_method, "value", quant_method)) != "gptq":
            raise ConfigError(f"quant_method must be 'gptq'; got {quant_method!r}")
        kernel_name(backend)  # these two calls check the other values
        self._config()
        if desc_act and act_group_aware:
            warn("act_group_aware", "switched off: desc_act orders the columns of all groups together")
        warn_about_order(desc_act, False, true_sequential)

    def quantize_model(self, model: nn.Module | str | Path, tokenizer: Any = None) -> nn.Module:
        """Quantize a model in place.

        Args:
            model: a model in memory, quantized on its device; or a folder or Hub id, which is loaded.
            tokenizer: for text: a tokenizer, its folder or its Hub id.

        Returns:
            The model, in evaluation mode, with quantized layers.

        Raises:
            FewbitError: as `fewbit.quantize`.
        """
        if isinstance(model, (str, Path)):
            source = open_source(model)
            tokenizer = tokenizer or source.load_tokenizer()
            model = source.load_model("auto", resolve_device("auto"))
        self._check_preceding(model)
        self._warn_not_needed()
        dataset, tokenizer = self._calibration(tokenizer)
        quantize_in_memory(
            model.eval(),
            self._for_model(model),
            dataset,
            tokenizer,
            block_name=self.block_name_to_quantize,
            modules=self.modules_in_block_to_quantize,
            kernel=kernel_name(self.backend),
        )
        self._complete_config(model)
        return self.post_init_model(model)

    def post_init_model(self, model: nn.Module) -> nn.Module:
        """Choose the kernels of all quantized layers; raise KernelError if `backend` cannot run one."""
        kernel = kernel_name(self.backend)
        prepare_layers(model, kernel, trainable=kernel == TRAINABLE)
        return model

    def _config(self, **settings: Any) -> QuantConfig:
        return quant_config(
            bits=self.bits,
            group_size=self.group_size,
            sym=self.sym,
            damp_percent=self.damp_percent,
            desc_act=self.desc_act,
            act_group_aware=self.act_group_aware,
            format=self.format,
            batch_size=self.batch_size,
            **settings,
        )

    def _for_model(self, model: nn.Module) -> QuantConfig:
        """Return the settings for this model, and set the arguments that are inferred from it."""
        if self.model_seqlen is None:
            self.model_seqlen = min(_MAX_SEQLEN, blocks.get_seqlen(model))
        names = {name for name, _ in model.named_modules()}
        if self.block_name_to_quantize is None and names & set(blocks.BLOCK_PATTERNS):
            self.block_name_to_quantize = blocks.get_block_name_with_pattern(model)
        given = isinstance(self.dataset, (list, tuple)) and len(self.dataset) > 0
        samples = {"num_samples": len(self.dataset or ())} if given else {}
        return self._config(seq_len=self.model_seqlen, **samples)

    def _calibration(self, tokenizer: Any) -> tuple[Any, Any]:
        """Return the dataset and the tokenizer for `fewbit.quantize`."""
        require_pad_token(self.batch_size, self.pad_token_id)
        if isinstance(tokenizer, (str, Path)):
            try:
                tokenizer = load_tokenizer(tokenizer)
            except ModelError as error:
                raise CalibrationError(f"{error}; pass the tokenizer itself, or its folder") from error
        if self.batch_size == 1 or not isinstance(self.dataset, list):
            return self.dataset, tokenizer
        if tokenizer is None and any(isinstance(item, str) for item in self.dataset):
            raise CalibrationError("the dataset is text, so a tokenizer is needed: pass it to quantize_model")
        tokens = [
            {"input_ids": tokenizer(item)["input_ids"]} if isinstance(item, str) else item
            for item in self.dataset
        ]
        return tokens, PadToken(self.pad_token_id)

    def _check_preceding(self, model: nn.Module) -> None:
        names = {name for name, _ in model.named_modules()}
        for name in self.module_name_preceding_first_block or ():
            if name not in names:
                block = self.block_name_to_quantize or blocks.get_block_name_with_pattern(model)
                found = ", ".join(blocks.get_preceding_modules(model, block))
                raise ConfigError(
                    f"Module {name} was not found in {type(model).__name__}; before its blocks come {found}"
                )

    def _warn_not_needed(self) -> None:
        warn_not_needed(
            module_name_preceding_first_block=self.module_name_preceding_first_block is not None,
            cache_block_outputs=not self.cache_block_outputs,
            max_input_length=self.max_input_length is not None,
            use_cuda_fp16=self.use_cuda_fp16,
            disable_exllama=self.disable_exllama,
            exllama_config=self.exllama_config is not None,
        )
        if self.extra:
            warn(", ".join(self.extra), "kept for to_dict, but unknown to GPTQQuantizer and without effect")

    def _meta(self) -> dict[str, Any]:
        return {key: value for key, value in (self.meta or {}).items() if key != "quantizer"}

    def _complete_config(self, model: nn.Module) -> None:
        """Add the keys that optimum reads to the model's quantization configuration."""
        config: Any = getattr(model, "config", None)
        quantization = getattr(config, "quantization_config", None)
        if quantization is None:
            return
        values = quantization.to_dict()
        values["meta"] = {**self._meta(), **values["meta"]}
        if self.modules_in_block_to_quantize:
            values["modules_in_block_to_quantize"] = self.modules_in_block_to_quantize
        config.quantization_config = type(quantization)(**values)


def _single_format(format: str | None, checkpoint_format: str | None) -> str:
    """Return the format that either argument names; "gptq" if neither does."""
    given = {str(name).lower() for name in (format, checkpoint_format) if name is not None}
    if len(given) > 1 or not given <= set(FORMATS):
        raise ConfigError(
            f"format must be one of {', '.join(FORMATS)} (checkpoint_format is its older name); got {format!r} and "
            f"{checkpoint_format!r}"
        )
    return given.pop() if given else "gptq"
