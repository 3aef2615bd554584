from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_samples import (
    CONFIG,
    LAYERS,
    autogptq_tensors,
    edit_json,
    random_codes,
    rewrite,
    write_autogptq,
    write_fewbit,
)
from fewbit.checkpoint.convert import convert
from fewbit.checkpoint.reader import open_checkpoint
from fewbit.config import QuantConfig
from fewbit.errors import CheckpointError, ConfigError, OutputError
from fewbit.quantized_matrix import QuantizedMatrix
from fewbit.verification import verify


def weights(folder: Path) -> dict[str, torch.Tensor]:
    opened = open_checkpoint(folder)
    return {name: opened.codes(name).dequantize() for name in opened.layers}


def assert_same_weights(a: Path, b: Path) -> None:
    mine, its = weights(a), weights(b)
    assert mine.keys() == its.keys()
    for name, weight in mine.items():
        assert torch.equal(weight, its[name]), name


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_there_and_back_gives_the_same_tensors(tmp_path: Path, bits: int) -> None:
    write_fewbit(tmp_path / "v1", QuantConfig(bits=bits, group_size=32, sym=False), "2KB")
    result = convert(tmp_path / "v1", tmp_path / "v2", "gptq_v2")
    assert (result.layers, result.turned_groups) == (2, 0)
    assert open_checkpoint(tmp_path / "v2").settings.format == "gptq_v2"
    assert_same_weights(tmp_path / "v1", tmp_path / "v2")
    convert(tmp_path / "v2", tmp_path / "back", "gptq", max_shard_size="2KB")
    first, last = open_checkpoint(tmp_path / "v1"), open_checkpoint(tmp_path / "back")
    assert first.tensors.keys() == last.tensors.keys()
    for name in first.tensors:
        assert torch.equal(first.tensor(name), last.tensor(name)), name
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == b"{}"
    for folder in ("v2", "back"):
        assert verify(tmp_path / folder).ok


def v2_with_zero_points_of_0(folder: Path, bits: int) -> dict[str, QuantizedMatrix]:
    from fewbit.checkpoint.layout import pack

    config = QuantConfig(bits=bits, group_size=32, sym=False, format="gptq_v2")
    written = write_fewbit(folder, config)
    for codes in written.values():
        codes.zeros[::3] = 0
    change = {
        f"{name}.{part}": t for name, codes in written.items() for part, t in pack(codes, "gptq_v2").items()
    }
    rewrite(folder, lambda tensors: tensors.update(change))
    return written


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_point_0_in_v1_keeps_the_weights(tmp_path: Path, bits: int) -> None:
    written = v2_with_zero_points_of_0(tmp_path / "v2", bits)
    result = convert(tmp_path / "v2", tmp_path / "v1", "gptq")
    assert result.turned_groups == sum(int((codes.zeros == 0).sum()) for codes in written.values())
    assert_same_weights(tmp_path / "v2", tmp_path / "v1")
    assert verify(tmp_path / "v1").ok


def test_an_autogptq_folder_becomes_a_standard_one(tmp_path: Path) -> None:
    written = {name: random_codes(*shape) for name, shape in LAYERS.items()}
    write_autogptq(
        tmp_path / "old", autogptq_tensors(written), {"dynamic": {"b": {"bits": 8}, "a": {"bits": 2}}}
    )
    (tmp_path / "old" / "tokenizer_config.json").write_text("{}")
    convert(tmp_path / "old", tmp_path / "new", "gptq")
    assert verify(tmp_path / "new").ok
    assert_same_weights(tmp_path / "old", tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == CONFIG
    assert quantization["quant_method"] == "gptq"
    assert quantization["checkpoint_format"] == quantization["format"] == "gptq"
    assert list(quantization["dynamic"]) == ["b", "a"]  # the order decides
    assert not any("/home" in str(value) for value in quantization.values())
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "config.json",
        "fewbit_manifest.json",
        "model.safetensors",
        "quantize_config.json",
        "tokenizer_config.json",
    ]


def test_what_the_old_file_did_not_say_the_tensors_say(tmp_path: Path) -> None:
    codes = random_codes(32, 64)
    codes.zeros.fill_(8)
    write_autogptq(tmp_path / "old", autogptq_tensors({"a": codes}))
    (tmp_path / "old" / "quantize_config.json").write_text('{"bits": 4, "group_size": 32}')
    rewrite(tmp_path / "old", lambda t: t.pop("a.g_idx"))
    convert(tmp_path / "old", tmp_path / "new", "gptq")
    opened = open_checkpoint(tmp_path / "new")
    assert opened.settings.assumed == ()
    assert (opened.settings.sym, opened.settings.desc_act) == (True, False)
    assert opened.layers["a"].has_g_idx
    assert verify(tmp_path / "new").ok


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_only_when_allowed(tmp_path: Path, legacy: bool) -> None:
    written = {name: random_codes(*shape) for name, shape in LAYERS.items()}
    write_autogptq(tmp_path / "st", autogptq_tensors(written))
    write_autogptq(tmp_path / "old", {})
    tensors = load_file(tmp_path / "st" / "gptq_model-4bit-32g.safetensors")
    (tmp_path / "old" / "gptq_model-4bit-32g.safetensors").unlink()
    path = tmp_path / "old" / "gptq_model-4bit-32g.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="can run code when it is loaded"):
        convert(tmp_path / "old", tmp_path / "new", "gptq")
    convert(tmp_path / "old", tmp_path / "new", "gptq", allow_pickle=True)
    assert_same_weights(tmp_path / "st", tmp_path / "new")


class Malicious:
    def __reduce__(self):
        return (print, ("run",))


def test_pickles_with_other_objects_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_autogptq(tmp_path / "old", {})
    (tmp_path / "old" / "gptq_model-4bit-32g.safetensors").unlink()
    path = tmp_path / "old" / "model.pt"
    torch.save({"x": Malicious()}, path)
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.pt as tensors"):
        convert(tmp_path / "old", tmp_path / "a", "gptq", allow_pickle=True)
    assert "run" not in capsys.readouterr().out
    torch.save([torch.zeros(1)], path)
    with pytest.raises(CheckpointError, match="holds no state dict"):
        convert(tmp_path / "old", tmp_path / "b", "gptq", allow_pickle=True)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="as tensors"):
        convert(tmp_path / "old", tmp_path / "c", "gptq", allow_pickle=True)
    torch.save({}, tmp_path / "old" / "second.pt")
    with pytest.raises(CheckpointError, match="several weight files and no pytorch_model"):
        convert(tmp_path / "old", tmp_path / "d", "gptq", allow_pickle=True)


def test_outputs_and_sources_that_cannot_be(tmp_path: Path) -> None:
    write_fewbit(tmp_path / "out")
    with pytest.raises(ConfigError, match="format must be one of gptq, gptq_v2; got 'marlin'"):
        convert(tmp_path / "out", tmp_path / "new", "marlin")
    with pytest.raises(OutputError, match="is not empty; choose another output folder"):
        convert(tmp_path / "out", tmp_path / "out", "gptq_v2")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file; give a folder"):
        convert(tmp_path / "out", tmp_path / "file", "gptq_v2")
    rewrite(tmp_path / "out", lambda t: t["model.layers.1.mlp.down_proj.g_idx"].fill_(7))
    with pytest.raises(CheckpointError, match=r"layer model\.layers\.1\.mlp\.down_proj: g_idx holds 7 … 7"):
        convert(tmp_path / "out", tmp_path / "new", "gptq_v2")
    assert not (tmp_path / "new" / "config.json").exists()
    edit_json(tmp_path / "out" / "quantize_config.json", lambda c: None)
    (tmp_path / "out" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json; copy the original model's into it"):
        convert(tmp_path / "out", tmp_path / "new", "gptq_v2")


def test_lost_zero_points_are_not_laundered(tmp_path: Path) -> None:
    codes = random_codes(32, 64)
    codes.zeros[1, 0] = 0
    write_autogptq(tmp_path / "old", autogptq_tensors({"a": codes}))
    with pytest.raises(CheckpointError, match=r"layer a: 1 words of qzeros look overwritten.*fewbit verify"):
        convert(tmp_path / "old", tmp_path / "new", "gptq_v2")


def test_interrupted_conversion_can_be_repeated(tmp_path: Path) -> None:
    write_fewbit(tmp_path / "v1")
    good = (tmp_path / "v1" / "model.safetensors").read_bytes()
    rewrite(tmp_path / "v1", lambda t: t["model.layers.1.mlp.down_proj.g_idx"].fill_(7))
    with pytest.raises(CheckpointError):
        convert(tmp_path / "v1", tmp_path / "v2", "gptq_v2")
    (tmp_path / "v1" / "model.safetensors").write_bytes(good)
    convert(tmp_path / "v1", tmp_path / "v2", "gptq_v2")
    assert verify(tmp_path / "v2").ok
