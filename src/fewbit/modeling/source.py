"""The model to be quantized, as it lies on disk: a transformers folder, a Hub id or a GGUF file.

Everything that is downloaded becomes a local folder first; from there on there is one path.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar, cast

import huggingface_hub
import torch
import transformers  # classes by attribute: each is imported at its first use
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import nn
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging

from .. import transformers_internals
from ..checkpoint.low_precision import METHODS, DequantizedTensor, dequantized, method_of
from ..checkpoint.reader import open_weights
from ..checkpoint.safe_io import WEIGHT_SUFFIXES, files_beside_weights, read_card
from ..checkpoint.safetensors_file import FileTensor, TensorInfo, scan
from ..errors import CheckpointError, DependencyError, FewbitError, ModelError

# Files that go along with the weights: tokenizers, templates, processors, settings of parts such as 1_Pooling.
_COPIED = (
    "*.json", "*.jinja", "*template*", "vocab.*", "merges.txt", "*.model", "*.tiktoken", "*.spm", "LICENSE*", "NOTICE*",
    "USE_POLICY*", "README.md",
)  # fmt: skip
_REPLACED = ("README.md", "config.json", "quantize_config.json", "fewbit_manifest.json", "fewbit_report.*")
_NOT_COPIED = ("trainer_state.json",)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Source:
    """A model on disk.

    Attributes:
        folder: folder of the files.
        gguf: name of the file inside `folder`; None for a transformers folder.
        trust_remote_code: whether Python code that comes with the model may run.
        allow_pickle: whether weights may be read from pickle files.
        name: Hub id, or name of the folder or file, for people.
        hub_id: Hub id, if the model was downloaded.
        notes: sentences for the user about what `load_model` found.
    """

    folder: Path
    gguf: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    name: str = ""
    hub_id: str | None = None
    notes: list[str] = field(default_factory=list, compare=False)

    device: ClassVar[torch.device | None] = None  # the run's own

    @property
    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.gguf is not None:
            options["gguf_file"] = self.gguf
        return options

    @property
    def license(self) -> str | None:
        """The license in the header of the model's card; None where none can be read."""
        found = read_card(self.folder).get("license")
        return found if isinstance(found, str) else None

    def weight_files(self) -> list[Path]:
        """The files that hold the weights, sorted by name."""
        if self.gguf is not None:
            return [self.folder / self.gguf]
        files = sorted(self.folder.glob("*.safetensors"))
        if not files and self.allow_pickle:
            files = sorted(path for suffix in _PICKLE_SUFFIXES for path in self.folder.glob(f"*{suffix}"))
        return files

    def fingerprint(self) -> str:
        """SHA-256 over the configuration and every byte of the weight files.

        Raises:
            ModelError: a safetensors file holds NaN or infinite values: found now, not after hours.
        """
        digest = hashlib.sha256()
        config = self.folder / "config.json"
        if self.gguf is None:
            digest.update(config.read_bytes())
        for path in self.weight_files():
            if path.suffix == ".safetensors":
                scan(path, digest)
                continue
            with open(path, "rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        return digest.hexdigest()

    def load_config(self) -> Any:
        """The transformers configuration."""
        if self.gguf is not None:
            _gguf_dequantize()  # says so if the package is missing
        try:
            return transformers.AutoConfig.from_pretrained(self.folder, **self._options)
        except (ValueError, OSError, KeyError) as error:
            code = "trust_remote_code" in str(error)
            advice = ". If you trust the code that comes with it, pass --trust-remote-code" if code else ""
            raise ModelError(
                f"cannot read the configuration in {self.folder}: {_first_line(error)}{advice}"
            ) from error

    @property
    def streams(self) -> bool:
        """Whether the weights can be read block by block: those in safetensors files can."""
        return self.gguf is None and bool(list(self.folder.glob("*.safetensors")))

    def load_model(self, dtype: str, device: torch.device) -> nn.Module:
        """The whole model in evaluation mode; `dtype` "auto" keeps the stored one.

        Raises:
            ModelError: the weights cannot be read, are missing, or are already quantized.
        """
        config = self.load_config()
        options = dict(self._options, dtype=_dtype(dtype))
        if _low_precision(config) is not None and self.gguf is None:
            tensors, dtype = self._tensors(config, dtype)
            options = {"config": config, "dtype": _dtype(dtype), "state_dict": tensors}
            model = self._from_pretrained(self._concrete_class(config), None, options)
            return cast(nn.Module, model.to(device).eval())
        if self.gguf is not None:
            options["quantization_config"] = _gguf_dequantize()
        elif not self.allow_pickle:
            options["use_safetensors"] = True
        model = self._from_pretrained(self._model_class(config), self.folder, options)
        if self.gguf is not None and hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        loaded: nn.Module = model.to(device).eval()
        return loaded

    def build_model(self, dtype: str) -> tuple[nn.Module, dict[str, FileTensor]]:
        """The model on the meta device, in evaluation mode, and where its weights lie.

        What is in no file, such as the tables of rotary embeddings, is computed and on the CPU.

        Raises:
            ModelError: the headers cannot be read, weights are missing, or they are already quantized.
        """
        config = self.load_config()
        tensors, dtype = self._tensors(config, dtype)
        options = {
            "config": config,
            "dtype": _dtype(dtype),
            "state_dict": {name: _Placeholder(tensor.info) for name, tensor in tensors.items()},
        }
        with without_progress_bars():
            model = self._from_pretrained(self._concrete_class(config), None, options)
        _untie_different(model, tensors)
        return model.eval(), tensors

    def _tensors(self, config: Any, dtype: str) -> tuple[dict[str, FileTensor], str]:
        """Every tensor of the source by its name, dequantized where it is in 8 or 4 bits, and the dtype of the model.

        `config` loses its ``quantization_config``.
        """
        try:
            files = open_weights(self.folder)
        except CheckpointError as error:
            raise ModelError(f"cannot load the weights in {self.folder}: {error}") from error
        tensors = {name: FileTensor(files.file_of[name], info) for name, info in files.tensors.items()}
        quantization = _low_precision(config)
        if quantization is not None:
            tensors = dequantized(tensors, quantization)
            del config.quantization_config
            count = sum(isinstance(tensor, DequantizedTensor) for tensor in tensors.values())
            self.notes.append(
                f"the source is in low precision ({method_of(quantization)}): {count} of its tensors are dequantized "
                "while they are read"
            )
        if dtype == "auto":
            own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
            dtype = str(own or _first_float(tensors)).removeprefix("torch.")
        return tensors, dtype

    def _from_pretrained(self, model_class: Any, folder: Path | None, options: dict[str, Any]) -> Any:
        try:
            model, info = model_class.from_pretrained(folder, output_loading_info=True, **options)
        except (SafetensorError, UnpicklingError, OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"cannot load the weights in {self.folder}: {_first_line(error)}") from error
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ModelError(
                f"{self.folder} lacks {len(missing)} weights of {type(model).__name__}, for example {missing[0]}: "
                "the download may be incomplete, or the architecture in config.json is wrong"
            )
        if info["unexpected_keys"] and folder is not None:  # `build_model` leaves them to the caller
            extra = sorted(info["unexpected_keys"])
            self.notes.append(
                f"{len(extra)} tensors of the source have no place in {type(model).__name__} and are not in the "
                f"result, for example {extra[0]}"
            )
        return model

    def load_tokenizer(self) -> Any:
        """The tokenizer that lies beside the model; None where there is none.

        Raises:
            ModelError: there is one, but it cannot be loaded.
        """
        if self.gguf is None and not any((self.folder / name).is_file() for name in _TOKENIZER_FILES):
            return None
        return load_tokenizer(self.folder, **self._options)

    def config_dict(self, model: nn.Module) -> dict[str, Any]:
        """``config.json`` of the result without its dtype: the source's own where there is one, else the model's."""
        path = self.folder / "config.json"
        if self.gguf is None:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        else:
            config: Any = model.config
            values = json.loads(config.to_json_string(use_diff=True))
            for private in ("_name_or_path", "_model_name_or_path"):
                values.pop(private, None)
        values.setdefault("architectures", [type(model).__name__])
        return values

    def files_to_copy(self) -> dict[str, Path]:
        """Find the files that the checkpoint gets too, in subfolders as well, by relative name.

        Python code is copied only if it was trusted.
        """
        patterns = (*_COPIED, "*.py") if self.trust_remote_code else _COPIED
        return {
            name: path
            for name, path in self._other_files().items()
            if _matches(path, patterns) and not _matches(path, _NOT_COPIED)
        }

    def files_left_out(self) -> list[str]:
        """Return the names of the files that are neither copied nor written anew; they may be private."""
        return sorted(self._other_files().keys() - self.files_to_copy().keys())

    def _other_files(self) -> dict[str, Path]:
        """All files beside the weights, without those that the checkpoint has its own version of."""
        files = {} if self.gguf is not None else files_beside_weights(self.folder)
        return {
            name: path
            for name, path in files.items()
            if not (path.parent == self.folder and _matches(path, _REPLACED))
        }

    def _model_class(self, config: Any) -> Any:
        if (
            self.gguf is None
            and getattr(config, "quantization_config", None)
            and _low_precision(config) is None
        ):
            method = method_of(_as_dict(config.quantization_config))
            raise ModelError(
                f"{self.folder} is already quantized ({method}): quantize the original model, "
                "or use `fewbit convert` to change the format"
            )
        names = getattr(config, "architectures", None) or []
        if self.trust_remote_code and getattr(config, "auto_map", None):
            return getattr(transformers, _auto_class(config))
        found = getattr(transformers, names[0], None) if names else None
        return found or transformers.AutoModelForCausalLM

    def _concrete_class(self, config: Any) -> Any:
        """The class itself, where `_model_class` leaves the choice to an automatic one."""
        found = self._model_class(config)
        mapping = transformers_internals.class_mapping(found)
        if mapping is None:
            return found
        if self.trust_remote_code and getattr(config, "auto_map", None):
            reference = config.auto_map[_auto_class(config)]
            return get_class_from_dynamic_module(reference, str(self.folder))
        if type(config) not in mapping:
            raise ModelError(
                f"transformers knows no causal language model for {type(config).__name__} in {self.folder}: name its "
                "class under architectures in config.json, or pass --trust-remote-code if its code lies beside it"
            )
        return mapping[type(config)]


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, with the methods of `Source` that a run calls."""

    model: nn.Module

    hub_id: ClassVar[None] = None
    license: ClassVar[None] = None
    notes: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if getattr(getattr(self.model, "config", None), "quantization_config", None):
            raise ModelError(f"this {self.name} is already quantized: quantize the original model")

    @property
    def name(self) -> str:
        return type(self.model).__name__

    @property
    def device(self) -> torch.device:
        return next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))

    def weight_files(self) -> None:
        """There are none."""

    def fingerprint(self) -> str:
        """Smallest and largest value of every weight: enough to tell apart models that should be the same."""
        return str(
            [[float(value) for value in p.detach().aminmax()] for p in self.model.parameters() if p.numel()]
        )

    def load_config(self) -> Any:
        return getattr(self.model, "config", None)

    def load_model(self, dtype: str, device: torch.device) -> nn.Module:
        return self.model

    def load_tokenizer(self) -> None:
        """There is none."""


@dataclass(frozen=True)
class _Placeholder:
    """Stands for a tensor of the source while transformers lays the model out: it becomes an empty one."""

    info: TensorInfo

    def __getitem__(self, index: object) -> _Placeholder:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(self.info.shape, dtype=dtype or self.info.dtype, device="meta")


def _low_precision(config: Any) -> dict[str, Any] | None:
    """The ``quantization_config`` of a model in a precision that is dequantized while it is read."""
    quantization = _as_dict(getattr(config, "quantization_config", None) or {})
    return quantization if method_of(quantization) in METHODS else None


def _as_dict(quantization: Any) -> dict[str, Any]:
    return dict(quantization) if isinstance(quantization, Mapping) else dict(quantization.to_dict())


def _matches(path: Path, patterns: Iterable[str]) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in patterns)


def _first_float(tensors: Mapping[str, FileTensor]) -> torch.dtype:
    dtypes = (tensor.info.dtype for tensor in tensors.values())
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def _dtype(name: str) -> Any:
    return name if name == "auto" else getattr(torch, name)


def _auto_class(config: Any) -> str:
    """Find the auto class of transformers for which a model with its own code is registered."""
    known = [key for key in config.auto_map if key.startswith("AutoModel")]
    return known[0] if known else "AutoModelForCausalLM"


def _untie_different(model: Any, tensors: Mapping[str, FileTensor]) -> None:
    """Tie weights that the files hold twice, if they are equal; transformers could not compare empty ones."""
    for target, source in list(getattr(model, "all_tied_weights_keys", {}).items()):
        if model.get_parameter(target) is model.get_parameter(source):
            continue
        if (
            target in tensors
            and source in tensors
            and torch.equal(tensors[target][...], tensors[source][...])
        ):
            module, _, key = target.rpartition(".")
            setattr(model.get_submodule(module), key, model.get_parameter(source))
        else:
            model.all_tied_weights_keys.pop(target)


def open_source(model: str | Path, *, trust_remote_code: bool = False, allow_pickle: bool = False) -> Source:
    """Find `model`: a folder, a ``.gguf`` file, or a Hub id, which is downloaded.

    Raises:
        ModelError: it is none of these, or the folder lacks its configuration or weights.
    """
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path} is a file but not a .gguf file; give the folder that holds config.json")
        return Source(path.parent, path.name, trust_remote_code, allow_pickle, path.resolve().name)
    name, hub_id = path.resolve().name, None
    if not path.is_dir():
        path = download(str(model), ModelError, allow_pickle=allow_pickle)
        name = hub_id = str(model)
    source = Source(path, None, trust_remote_code, allow_pickle, name, hub_id)
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json: it is not a transformers model folder")
    if not source.weight_files():
        pickled = sorted(p.name for suffix in _PICKLE_SUFFIXES for p in path.glob(f"*{suffix}"))
        hint = (
            f"only pickle files ({pickled[0]} …), which can run code when opened; pass --allow-pickle "
            "(allow_pickle=True) if you trust them"
            if pickled
            else "no .safetensors files"
        )
        raise ModelError(f"{path} holds {hint}")
    return source


def load_tokenizer(name: str | Path, **options: Any) -> Any:
    """The tokenizer in a folder or of a Hub id.

    Raises:
        ModelError: it cannot be found or loaded.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(str(name), **options)
    except Exception as error:  # the tokenizers library raises no narrower class than Exception itself
        if type(error) is not Exception and not isinstance(
            error, (ValueError, OSError, KeyError, TypeError, ImportError)
        ):
            raise
        raise ModelError(f"no tokenizer can be loaded from {name}: {_first_line(error)}") from error


def download(
    name: str, error_class: type[FewbitError], *, allow_pickle: bool = False, **options: Any
) -> Path:
    """Download a Hub repository into the local cache; `options` are passed to `snapshot_download`.

    Raises:
        FewbitError: of `error_class`: `name` is no Hub id, or cannot be downloaded.
    """
    ignored = [f"*{suffix}" for suffix in WEIGHT_SUFFIXES if suffix != ".safetensors"]
    if allow_pickle:
        ignored = [pattern for pattern in ignored if pattern[1:] not in _PICKLE_SUFFIXES]
    try:
        return Path(huggingface_hub.snapshot_download(name, ignore_patterns=ignored, **options))
    except HFValidationError as error:
        raise error_class(f"{name} is neither a folder, a .gguf file nor a Hub id") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise error_class(
            f"{name} is no local folder and cannot be downloaded from the Hub: {_first_line(error)}"
        ) from error


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Switch transformers' progress bars off while entered."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _gguf_dequantize() -> Any:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise DependencyError(
            "reading .gguf files needs the packages gguf and sentencepiece: pip install gguf sentencepiece"
        ) from error
    return transformers.GgufConfig(dequantize=True)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
