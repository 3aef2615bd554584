"""compressed-tensors, read as GPTQ: there and back gives the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fewbit
from checkpoint_samples import edit_json, write_fewbit
from fewbit.checkpoint.convert import convert
from fewbit.checkpoint.pack_quantized import open_any
from fewbit.checkpoint.reader import open_checkpoint
from fewbit.config import QuantConfig
from fewbit.errors import CheckpointError
from fewbit.verification import verify
from models import save_tiny


def there_and_back(folder: Path, fmt: str) -> None:
    """Export the checkpoint in `folder`/in, convert the result back, and compare every tensor."""
    fewbit.export(folder / "in", folder / "there", "compressed-tensors")
    convert(folder / "there", folder / "back", fmt)
    first, last = open_checkpoint(folder / "in"), open_checkpoint(folder / "back")
    assert first.tensors.keys() == last.tensors.keys()
    for name in first.tensors:
        a, b = first.tensor(name), last.tensor(name)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a, b), name
    formats = [{name: spec.layer_format for name, spec in one.layers.items()} for one in (first, last)]
    assert formats[0] == formats[1]
    assert verify(folder / "back").ok


@pytest.mark.parametrize("fmt", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(
    "settings",
    [*({"bits": bits, "sym": sym} for bits in (2, 3, 4, 8) for sym in (True, False)), {"group_size": -1}],
    ids=str,
)
def test_there_and_back_gives_the_same_bytes(fmt: str, settings: dict[str, Any], tmp_path: Path) -> None:
    write_fewbit(tmp_path / "in", QuantConfig(**{"group_size": 32, "format": fmt, **settings}), "2KB")
    there_and_back(tmp_path, fmt)


def test_layers_with_their_own_settings(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", hidden_size=64, intermediate_size=96)
    override = {"down_proj": {"bits": 8, "group_size": -1}, "v_proj": {"sym": False, "bits": 3}}
    config = QuantConfig(group_size=32, method="rtn", override=override)
    fewbit.quantize(tmp_path / "model", config, output=tmp_path / "in")
    there_and_back(tmp_path, "gptq")


def test_other_targets_take_it_too(tmp_path: Path) -> None:
    write_fewbit(tmp_path / "in", QuantConfig(bits=4, group_size=32, sym=False))
    fewbit.export(tmp_path / "in", tmp_path / "there", "compressed-tensors")
    for source in ("in", "there"):
        fewbit.export(tmp_path / source, tmp_path / f"{source}-awq", "awq")
    found, expected = (load_file(tmp_path / f"{name}-awq" / "model.safetensors") for name in ("there", "in"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q: q.update(format="float-quantized"), "says format 'float-quantized'"),
        (lambda q: _with_weights(q, actorder="group"), "layers with act-order"),
        (lambda q: _with_weights(q, type="float"), "floating-point codes"),
    ],
)
def test_other_forms_are_refused(change: Any, words: str, tmp_path: Path) -> None:
    write_fewbit(tmp_path / "in", QuantConfig(bits=4, group_size=32))
    fewbit.export(tmp_path / "in", tmp_path / "there", "compressed-tensors")
    edit_json(tmp_path / "there" / "config.json", lambda values: change(values["quantization_config"]))
    with pytest.raises(CheckpointError, match=words):
        open_any(tmp_path / "there")


def _with_weights(quantization: dict[str, Any], **changes: Any) -> None:
    for group in quantization["config_groups"].values():
        group["weights"].update(changes)


def test_damaged_layers_are_refused(tmp_path: Path) -> None:
    write_fewbit(tmp_path / "in", QuantConfig(bits=4, group_size=32))
    fewbit.export(tmp_path / "in", tmp_path / "there", "compressed-tensors")
    file = tmp_path / "there" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(".weight_packed"))
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, file)
    with pytest.raises(CheckpointError, match="does not fit words"):
        open_any(tmp_path / "there")
    save_file({key: value for key, value in tensors.items() if key != name.replace("packed", "scale")}, file)
    with pytest.raises(CheckpointError, match="has no weight_scale"):
        open_any(tmp_path / "there")
