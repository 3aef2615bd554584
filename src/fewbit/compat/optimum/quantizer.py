"""`GPTQQuantizer`: optimum's arguments and methods, over `fewbit.quantize`.

What an argument meant there, it means here; where nothing is left for it to do, the log says so once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ... import __version__
from ...calibration.sources import NAMED
from ...config import QuantConfig
from ...delivery import quantization_config
from ...errors import CalibrationError, ConfigError, ModelError
from ...hf.replace import replace_layers
from ...kernels.linear import QuantizedLayer, QuantLinear
from ...modeling.experts import unfuse
from ...modeling.source import load_tokenizer, open_source
from ...planning import Plan, make_plan
from ...preparation import resolve_device
from ...quantization import quantize
from ..loading import prepare
from ..settings import (
    PadToken,
    check_in_memory,
    kernel_name,
    note_device,
    note_order,
    quant_config,
    require_saveable,
    restrict,
    say,
)
from .arguments import NOT_NEEDED, check_exllama, one_format
from .constants import BLOCK_PATTERNS, GPTQ_CONFIG
from .data import require_pad_token
from .packing import check_kernel, empty_tensors, only, packed_tensors
from .utils import get_block_name_with_pattern, get_preceding_modules, get_seqlen

# optimum calibrates on no longer sequences, whatever the model can take.
_MAX_SEQLEN = 4028


class GPTQQuantizer:
    """Quantizes a model with optimum's settings.

    Args:
        bits: 2, 3, 4 or 8.
        dataset: list of texts or of token dicts, all of which are used; or wikitext2, c4, c4-new, or a text file,
            of which 128 windows are.
        group_size: inputs that share a scale, or −1 for whole rows.
        damp_percent: between 0 and 1, of the mean diagonal of the Hessian.
        desc_act: columns by falling activation, with a g_idx.
        act_group_aware: the same inside and between groups, without one; off with `desc_act`.
        sym: symmetric grids.
        true_sequential: always so; False is noted.
        model_seqlen: tokens per sequence, by default what the model can take and at most 4028.
        block_name_to_quantize: list of blocks; by default the one at the usual place, else all numbered blocks.
        module_name_preceding_first_block: checked, not needed.
        batch_size: sequences per forward. pad_token_id: needed for more than one.
        max_input_length: not needed.
        cache_block_outputs: not needed.
        modules_in_block_to_quantize: names in the blocks; by default all layers.
        format: "gptq" or "gptq_v2". meta: kept in the checkpoint.
        backend: kernel of the result: "auto", "auto_trainable", or a name that `fewbit env` lists.
        use_cuda_fp16, disable_exllama, exllama_config, checkpoint_format: of optimum 1.
        **kwargs: kept, so that `to_dict` gives back what `from_dict` got.

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
        self.format = one_format(format, checkpoint_format)
        self.meta = meta
        self.backend = backend
        self.use_cuda_fp16 = use_cuda_fp16
        self.disable_exllama = disable_exllama
        self.exllama_config = exllama_config
        self.quant_method = quant_method
        self.extra = kwargs
        self.quant_linear: type[QuantizedLayer] = QuantLinear
        self.serialization_keys = [
            "bits",
            "dataset",
            "group_size",
            "damp_percent",
            "desc_act",
            "act_group_aware",
            "sym",
            "true_sequential",
            "quant_method",
            "modules_in_block_to_quantize",
            "format",
            "meta",
        ]
        check_exllama(exllama_config)
        if str(getattr(quant_method, "value", quant_method)) != "gptq":
            raise ConfigError(f"quant_method must be 'gptq'; got {quant_method!r}")
        kernel_name(backend)
        self._config()
        if desc_act and act_group_aware:
            say(
                {
                    "act_group_aware": "switched off, because desc_act orders the columns of all groups together"
                }
            )
        note_order(desc_act, static_groups=False, true_sequential=true_sequential)

    def to_dict(self) -> dict[str, Any]:
        """The settings under `serialization_keys`, with what else `from_dict` was given."""
        meta = dict(self.meta or {})
        meta.setdefault("quantizer", [f"fewbit:{__version__}"])
        known = {key: getattr(self, key) for key in self.serialization_keys}
        return {**self.extra, **known, "meta": meta}

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> GPTQQuantizer:
        """Inverse of `to_dict`; unknown keys are kept."""
        return cls(**config_dict)

    def quantize_model(self, model: nn.Module | str | Path, tokenizer: Any = None) -> nn.Module:
        """Quantize a model in place.

        Args:
            model: in memory, on the device where it is to be quantized; or a folder or Hub id, which is loaded.
            tokenizer: for text: a tokenizer, its folder or its Hub id.

        Returns:
            The model, in evaluation mode, its layers quantized.

        Raises:
            FewbitError: as `fewbit.quantize`; a subclass says what is wrong and what to do next.
        """
        if isinstance(model, (str, Path)):
            source = open_source(model)
            tokenizer = tokenizer or source.load_tokenizer()
            model = source.load_model("auto", resolve_device("auto"))
        check_in_memory(model)
        note_device(model)
        self._check_preceding(model)
        self._say_not_needed()
        dataset, tokenizer = self._calibration(tokenizer)
        config = self._for_model(model)
        self._check_backend(make_plan(model, config), next(model.parameters()))
        quantize(model.eval(), config, dataset=dataset, tokenizer=tokenizer)
        self._tell_config(model)
        return self.post_init_model(model)

    def convert_model(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Put empty quantized layers in the place of those that `quantize_model` would quantize.

        Args:
            model: its device decides where the tensors lie; on the meta device they take no memory.
            **kwargs: ``device_map`` is accepted and not needed.

        Returns:
            The model, ready for `load_state_dict`; call `post_init_model` afterwards.
        """
        plan, quantization = self._planned(model)

        def empty(name: str) -> dict[str, Tensor]:
            return empty_tensors(layers[name])

        layers = {layer.name: layer for layer in plan.layers}
        replace_layers(model, plan, empty, quantization)
        self._tell_config(model)
        return model

    def pack_model(self, model: nn.Module, quantizers: Mapping[str, Sequence[Any]]) -> None:
        """Put quantized layers in the place of layers whose weights have been rounded to a grid.

        Args:
            model: with the rounded weights.
            quantizers: layer name → (anything, scales (out, groups), zero points (out, groups), g_idx (in,)).

        Raises:
            ConfigError: a name is no layer of the model that can be quantized.
        """
        plan, _ = self._planned(model)
        known = {layer.name for layer in plan.layers}
        for name in quantizers:
            if name not in known:
                raise ConfigError(
                    f"pack_model: {name!r} is no layer of {type(model).__name__} to be quantized"
                )
        plan = only(plan, quantizers)
        quantization = quantization_config(self._config(), model, plan, self._meta())
        packed = {
            layer.name: packed_tensors(
                model.get_submodule(layer.name), quantizers[layer.name], layer.settings, self.format
            )
            for layer in plan.layers
        }
        replace_layers(model, plan, packed.__getitem__, quantization)
        self._tell_config(model)

    def post_init_model(self, model: nn.Module) -> nn.Module:
        """Choose the kernels for the tensors as they are now.

        Raises:
            KernelError: the `backend` asked for cannot run a layer; the message says why.
        """
        prepare(model, kernel_name(self.backend), trainable=self.backend == "auto_trainable")
        return model

    def select_quant_linear(self, device_map: Any = None, pack: bool = False) -> None:
        """Set `quant_linear`, the class of the quantized layers: there is one for all kernels."""
        self.quant_linear = QuantLinear

    def get_no_split_module_classes(self, model: nn.Module) -> list[str]:
        """The class of the blocks: each should stay on one device."""
        blocks = model.get_submodule(self.block_name_to_quantize or get_block_name_with_pattern(model))
        return [type(next(blocks.children())).__name__]

    def save(
        self,
        model: nn.Module,
        save_dir: str | Path,
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write a checkpoint: `save_pretrained`, and quantize_config.json beside it. No calibration text is written.

        Args:
            model: quantized.
            save_dir: made if missing.
            max_shard_size: of each weight file.
            safe_serialization: False is noted: safetensors files are written in any case.

        Raises:
            ModelError: the model is not quantized, or cannot save itself.
        """
        saveable = require_saveable(model)
        quantization = getattr(saveable.config, "quantization_config", None)
        if quantization is None:
            raise ModelError(f"this {type(model).__name__} is not quantized: call quantize_model first")
        if not safe_serialization:
            say({"safe_serialization=False": "safetensors files are written; opening pickles can run code"})
        saveable.save_pretrained(save_dir, max_shard_size=max_shard_size)
        settings = {**self.to_dict(), **quantization.to_dict()}
        if settings["dataset"] not in NAMED:
            del settings["dataset"]  # texts and paths are nobody else's business
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (Path(save_dir) / GPTQ_CONFIG).write_text(text + "\n", encoding="utf-8")

    # How the arguments become settings.
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
        """The settings for this model; fills in what was to be inferred from it."""
        if self.model_seqlen is None:
            self.model_seqlen = min(_MAX_SEQLEN, get_seqlen(model))
        names = {name for name, _ in model.named_modules()}
        if self.block_name_to_quantize is None and names & set(BLOCK_PATTERNS):
            self.block_name_to_quantize = get_block_name_with_pattern(model)
        given = isinstance(self.dataset, (list, tuple)) and len(self.dataset) > 0
        samples = {"num_samples": len(self.dataset or ())} if given else {}
        config = self._config(seq_len=self.model_seqlen, **samples)
        return restrict(config, model, self.block_name_to_quantize, self.modules_in_block_to_quantize)

    def _planned(self, model: nn.Module) -> tuple[Plan, dict[str, Any]]:
        config = self._for_model(model)
        unfuse(model)
        plan = make_plan(model, config)
        return plan, quantization_config(config, model, plan, self._meta())

    def _calibration(self, tokenizer: Any) -> tuple[Any, Any]:
        """The data set, and what it needs of a tokenizer."""
        require_pad_token(self.batch_size, self.pad_token_id)
        if isinstance(tokenizer, (str, Path)):
            try:
                tokenizer = load_tokenizer(tokenizer)
            except ModelError as error:
                raise CalibrationError(f"{error}; pass the tokenizer itself, or its folder") from error
        if self.batch_size == 1 or not isinstance(self.dataset, list):
            return self.dataset, tokenizer
        tokens = [_tokens(item, tokenizer) for item in self.dataset]
        return tokens, PadToken(self.pad_token_id)

    def _check_preceding(self, model: nn.Module) -> None:
        names = {name for name, _ in model.named_modules()}
        for name in self.module_name_preceding_first_block or ():
            if name not in names:
                block = self.block_name_to_quantize or get_block_name_with_pattern(model)
                found = ", ".join(get_preceding_modules(model, block))
                raise ConfigError(
                    f"Module {name} was not found in {type(model).__name__}; before its blocks come {found}"
                )

    def _check_backend(self, plan: Plan, like: Tensor) -> None:
        """Refuse before the work a kernel that could not run its result."""
        kernel = kernel_name(self.backend)
        if kernel != "auto":
            for layer in plan.layers:
                check_kernel(layer, self.format, like, kernel)

    def _say_not_needed(self) -> None:
        given = {
            "module_name_preceding_first_block": self.module_name_preceding_first_block is not None,
            "cache_block_outputs": not self.cache_block_outputs,
            "max_input_length": self.max_input_length is not None,
            "use_cuda_fp16": self.use_cuda_fp16,
            "disable_exllama": self.disable_exllama,
            "exllama_config": self.exllama_config is not None,
        }
        say({name: f"not needed: {NOT_NEEDED[name]}" for name, is_given in given.items() if is_given})
        if self.extra:
            say({", ".join(self.extra): "kept for to_dict, but unknown to GPTQQuantizer and without effect"})

    def _meta(self) -> dict[str, Any]:
        return {key: value for key, value in (self.meta or {}).items() if key != "quantizer"}

    def _tell_config(self, model: nn.Module) -> None:
        """Write what readers through optimum look for into the model's configuration."""
        config: Any = getattr(model, "config", None)
        quantization = getattr(config, "quantization_config", None)
        if quantization is None:
            return
        values = quantization.to_dict()
        values["meta"] = {**self._meta(), **values["meta"]}
        if self.modules_in_block_to_quantize:
            values["modules_in_block_to_quantize"] = self.modules_in_block_to_quantize
        config.quantization_config = type(quantization)(**values)


def _tokens(item: Any, tokenizer: Any) -> Any:
    if not isinstance(item, str):
        return item
    if tokenizer is None:
        raise CalibrationError("the dataset is text, so a tokenizer is needed: pass it to quantize_model")
    return {"input_ids": tokenizer(item)["input_ids"]}
