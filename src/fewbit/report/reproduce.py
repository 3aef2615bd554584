"""The command that repeats a run: for the shell or, where the shell cannot express it, a few lines of Python.

It contains only arguments that differ from the defaults. Paths stay as the user typed them, or lose their folders:
files with the command are published.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..config import EVALUATION_TOKENS, QuantConfig

# Arguments of `fewbit.quantize` that change the result → (option of the command line, default).
_OPTIONS: dict[str, tuple[str, Any]] = {
    "output": ("--output", None),
    "dataset": ("--dataset", None),
    "device": ("--device", "auto"),
    "max_shard_size": ("--max-shard-size", "5GB"),
    "trust_remote_code": ("--trust-remote-code", False),
    "allow_pickle": ("--allow-pickle", False),
    "evaluate_on": ("--eval", None),
    "evaluate_tokens": ("--eval-tokens", EVALUATION_TOKENS),
}
_PATHS = ("output", "dataset", "evaluate_on")


def reproduce(
    model: Any, config: QuantConfig, arguments: Mapping[str, Any], *, published: bool = False
) -> str:
    """The command that repeats a run.

    Args:
        model: first argument of `fewbit.quantize`.
        config: settings of the run.
        arguments: keyword arguments of `fewbit.quantize`, at least the ones that differ from the defaults.
        published: leave out the folders of paths.
    """
    values = {
        name: arguments[name]
        for name, (_, default) in _OPTIONS.items()
        if name in arguments and not _same(arguments[name], default)
    }
    if published:
        model = without_folders(model)
        values |= {name: without_folders(values[name]) for name in _PATHS if name in values}
    given = [model, *values.values()]
    if arguments.get("tokenizer") is None and all(isinstance(v, (str, Path, bool, int)) for v in given):
        return _shell(model, config, values)
    return _python(model, config, {**values, "tokenizer": arguments.get("tokenizer")})


def without_folders(value: Any) -> Any:
    """The last name of a path; Hub ids and names of data sets stay, and whatever is no path."""
    if not isinstance(value, (str, Path)) or not str(value):
        return value
    path = Path(value)
    local = isinstance(value, Path) or path.is_absolute() or str(value)[0] in ".~" or path.exists()
    return (path.name or path.resolve().name) if local else value


def _same(value: Any, default: Any) -> bool:
    """True for the default value. Compares texts and numbers only, because data sets may define other comparisons."""
    return value is default or (isinstance(value, (str, int)) and value == default)


def _shell(model: Any, config: QuantConfig, values: Mapping[str, Any]) -> str:
    words = ["fewbit", "quantize", str(model)]
    for name, value in values.items():
        words += [_OPTIONS[name][0]] if value is True else [_OPTIONS[name][0], str(value)]
    for name, value in _changed(config).items():
        words += _config_words(name, value)
    return shlex.join(words)


def _config_words(name: str, value: Any) -> Iterator[str]:
    option = "--" + name.replace("_", "-")
    if name == "sym":
        yield "--sym" if value else "--asym"
    elif isinstance(value, bool):
        yield option if value else option.replace("--", "--no-", 1)
    elif name == "ignore":
        for pattern in value:
            yield from (option, pattern)
    elif name == "override":
        for pattern, settings in value.items():
            yield from (option, f"{pattern}={_settings(settings)}")
    else:
        yield from (option, _text(value))


def _settings(settings: Mapping[str, Any] | str) -> str:
    if isinstance(settings, str):
        return settings
    return ",".join(f"{key}:{_text(value)}" for key, value in settings.items())


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return np.format_float_positional(value, trim="-") if isinstance(value, float) else str(value)


def _python(model: Any, config: QuantConfig, values: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{name}={value!r}" for name, value in _changed(config).items())
    comments, arguments = [], ["config"]
    for name, value in {"model": model, **values}.items():
        if value is None:
            continue
        plain = isinstance(value, (str, Path, bool, int))
        shown = repr(str(value) if isinstance(value, Path) else value) if plain else name
        if not plain:
            comments.append(f"# {name}: {_kind(value)}\n")
        if name == "model":
            arguments.insert(0, shown)
        else:
            arguments.append(f"{name}={shown}")
    return (
        "import fewbit\n\n"
        f"{''.join(comments)}config = fewbit.QuantConfig({settings})\n"
        f"fewbit.quantize({', '.join(arguments)})"
    )


def _kind(value: Any) -> str:
    sized = isinstance(value, (list, tuple)) or hasattr(value, "num_rows")
    return f"{type(value).__name__} of {len(value)} items" if sized else type(value).__name__


def _changed(config: QuantConfig) -> dict[str, Any]:
    """The settings that differ from the defaults."""
    default = QuantConfig()
    names = (field.name for field in dataclasses.fields(config))
    return {name: value for name in names if (value := getattr(config, name)) != getattr(default, name)}
