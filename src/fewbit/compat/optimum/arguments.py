"""Arguments that optimum's functions share: what is checked, and why some are not needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...config import FORMATS
from ...errors import ConfigError

NOT_NEEDED = {
    "module_name_preceding_first_block": "the model's own forward runs, so nothing before its blocks has to be named",
    "cache_block_outputs": "every batch runs through the model once, whether block outputs could be cached or not",
    "max_input_length": "no kernel here has a buffer that depends on it",
    "use_cuda_fp16": "kernels follow the dtype of the activations",
    "disable_exllama": "a kernel of another package runs only where backend asks for it",
    "exllama_config": "a kernel of another package runs only where backend asks for it",
}


def one_format(format: str | None, checkpoint_format: str | None) -> str:
    """The format that either of both names says; "gptq" if none does.

    Raises:
        ConfigError: both, or an unknown one.
    """
    given = {str(name).lower() for name in (format, checkpoint_format) if name is not None}
    if len(given) > 1 or not given <= set(FORMATS):
        raise ConfigError(
            f"format must be one of {', '.join(FORMATS)} (checkpoint_format is its older name); got {format!r} and "
            f"{checkpoint_format!r}"
        )
    return given.pop() if given else "gptq"


def check_exllama(exllama_config: Mapping[str, Any] | None) -> None:
    """Raises ConfigError unless it names version 1 or 2."""
    if exllama_config is not None and exllama_config.get("version") not in (1, 2):
        raise ConfigError(f"exllama_config needs a version key that is 1 or 2; got {exllama_config!r}")
