"""Adapt a saved folder to AutoGPTQ's arguments: file names, metadata, uploads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...atomic_io import replacing
from ...checkpoint.safe_io import read_json
from ...checkpoint.writer import INDEX, SINGLE
from ...errors import ConfigError, OutputError
from ...gptq_arguments import write_json


def text_metadata(metadata: Mapping[Any, Any] | None) -> dict[str, str]:
    """Convert the metadata of a safetensors file to text.

    Raises:
        ConfigError: it is not a dict, or two keys become the same text.
    """
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


def complete_config(file: Path, quantization: Mapping[str, Any]) -> None:
    """Add the checkpoint's own configuration to AutoGPTQ's keys, and remove the local path."""
    write_json(file, {**read_json(file), **quantization, "model_name_or_path": None})


def rename_weights(folder: Path, base_name: str) -> None:
    """Rename the weight file to `base_name`.safetensors.

    Raises:
        OutputError: the weights are in several files.
    """
    if (folder / INDEX).exists():
        raise OutputError(
            f"{folder} has its weights in several files, which keep their names: leave out model_file_base_name"
        )
    os.replace(folder / SINGLE, folder / f"{base_name}.safetensors")


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None,
    token: Any,
    message: str | None,
    create_pr: bool | None,
) -> Any:
    """Upload a folder to the Hub; the repository is created if missing.

    Returns:
        The `CommitInfo` of huggingface_hub.

    Raises:
        OutputError: the upload failed; the folder is complete.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    hub = HfApi()
    try:
        made = hub.create_repo(repo_id, private=private, token=token, exist_ok=True)
        return hub.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            commit_message=message,
            token=token,
            create_pr=bool(create_pr),
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise OutputError(
            f"{folder} is complete, but could not be uploaded to {repo_id}: {error}. Log in with `hf auth login` or "
            "pass a token, then try again"
        ) from error
