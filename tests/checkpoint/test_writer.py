from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from checkpoint_samples import write_fewbit
from fewbit.checkpoint import manifest
from fewbit.checkpoint.reader import open_checkpoint
from fewbit.checkpoint.safetensors_file import read_header
from fewbit.checkpoint.writer import MARKER, CheckpointWriter, parse_size
from fewbit.errors import CheckpointError, ConfigError, OutputError

DTYPES = (
    torch.int8,
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.bool,
    torch.uint8,
    torch.uint16,
    torch.int32,
    torch.int64,
)


def many_dtypes() -> dict[str, torch.Tensor]:
    tensors = {str(dtype): torch.randn(3, 5).mul(3).to(dtype).t() for dtype in DTYPES}
    return tensors | {
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.0),
        "strided": torch.randn(8, 8)[::2, 1::3],
    }


@pytest.mark.parametrize("shard_size", ["5GB", 100, 1])
def test_safetensors_reads_every_dtype_and_layout(tmp_path: Path, shard_size) -> None:
    tensors = many_dtypes()
    with CheckpointWriter(tmp_path / "out", tensors, shard_size) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.finish({}, {"bits": 4})
    read: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        read |= load_file(path)
        for info in read_header(path)[0].values():
            assert info.start % info.dtype.itemsize == 0
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert torch.equal(read[name].double(), tensor.double())


def test_single_file_or_shards_with_an_index(tmp_path: Path) -> None:
    write_fewbit(tmp_path / "one")
    write_fewbit(tmp_path / "many", max_shard_size="2KB")
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {
        "config.json",
        "quantize_config.json",
        "fewbit_manifest.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
    }
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    count = len(shards)
    assert count > 2
    assert [path.name for path in shards] == [
        f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    ]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one, many = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "many")
    assert one.tensors.keys() == many.tensors.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in one.tensors.values())
    # A shard passes the limit only where one tensor does.
    for path in shards:
        infos = read_header(path)[0]
        assert sum(info.nbytes for info in infos.values()) <= 2000 or len(infos) == 1


def test_same_input_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.manual_seed(0)
        write_fewbit(tmp_path / name, max_shard_size="2KB")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_manifest_has_the_hash_of_every_file(tmp_path: Path) -> None:
    write_fewbit(tmp_path / "out")
    listed = json.loads((tmp_path / "out" / manifest.NAME).read_text())["files"]
    present = {path.name for path in (tmp_path / "out").iterdir()} - {manifest.NAME, "README.md"}
    assert listed.keys() == present
    for name, entry in listed.items():
        content = (tmp_path / "out" / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


def test_configuration_is_in_both_files(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", {"x": torch.zeros(1)}) as writer:
        writer.add("x", torch.zeros(1))
        writer.finish(
            {"model_type": "llama", "quantization_config": "old"}, {"bits": 4, "quant_method": "gptq"}
        )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "llama", "quantization_config": {"bits": 4, "quant_method": "gptq"}}
    assert (
        json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == config["quantization_config"]
    )


def test_config_json_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop before each rename in turn: nothing but the last state may open."""
    renames: list[str] = []
    real = os.replace

    def stop_after(count: int):
        def replace(source, target):
            if len(renames) == count:
                raise OSError(errno.EIO, "the power failed")
            renames.append(Path(target).name)
            real(source, target)

        return replace

    write_fewbit(tmp_path / "whole", max_shard_size="2KB")
    steps = len(list((tmp_path / "whole").iterdir()))
    for count in range(steps):
        renames.clear()
        folder = tmp_path / str(count)
        monkeypatch.setattr(os, "replace", stop_after(count))
        with pytest.raises(OutputError, match="the power failed"):
            write_fewbit(folder, max_shard_size="2KB")
        assert not (folder / "config.json").exists()
        with pytest.raises(CheckpointError, match="unfinished: fewbit was interrupted"):
            open_checkpoint(folder)
        monkeypatch.setattr(os, "replace", real)
        write_fewbit(folder)  # the same command again
        assert not (folder / MARKER).exists()
        assert {path.name for path in folder.glob("model*")} == {"model.safetensors"}
        open_checkpoint(folder)
    monkeypatch.setattr(os, "replace", stop_after(steps))
    renames.clear()
    write_fewbit(tmp_path / "last", max_shard_size="2KB")
    assert renames[-1] == "config.json"


def test_an_error_in_the_block_leaves_no_temporaries(tmp_path: Path) -> None:
    def interrupted() -> None:
        tensors = {"a": torch.zeros(4), "b": torch.zeros(4)}
        with CheckpointWriter(tmp_path / "out", tensors, 1) as writer:
            writer.add("a", torch.zeros(4))
            writer.add("b", torch.zeros(4))
            raise KeyError("elsewhere")

    with pytest.raises(KeyError):
        interrupted()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [MARKER]


def test_full_disk_message(tmp_path: Path) -> None:
    tensor = torch.zeros(1 << 20)
    writer = CheckpointWriter(tmp_path / "out", {"x": tensor})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(OutputError) as caught, writer:
            writer.add("x", tensor)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = str(caught.value)
    assert "File too large" in message
    assert str(tmp_path / "out") in message
    assert f"{4 << 20:,} bytes were needed" in message
    assert "run the same command again: it resumes" in message


def test_existing_weights_are_never_overwritten(tmp_path: Path) -> None:
    write_fewbit(tmp_path / "done")
    with pytest.raises(OutputError, match="already holds a finished checkpoint"):
        CheckpointWriter(tmp_path / "done", {})
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"holds model\.safetensors from something else"):
        CheckpointWriter(tmp_path / "theirs", {})
    assert (tmp_path / "theirs" / "model.safetensors").read_bytes() == b"precious"
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        CheckpointWriter(tmp_path / "file", {})


def test_tensors_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensor y is torch\.complex64"):
        CheckpointWriter(tmp_path / "out", {"y": torch.zeros(1, dtype=torch.complex64)})
    with CheckpointWriter(tmp_path / "out", {"x": torch.zeros(1)}) as writer:
        with pytest.raises(CheckpointError, match="1 tensors were not written, for example x"):
            writer.finish({}, {})
        with pytest.raises(CheckpointError, match=r"x is torch.float16 \(1,\); torch.float32 \(1,\) was ann"):
            writer.add("x", torch.zeros(1).half())
        writer.add("x", torch.zeros(1))
        with pytest.raises(CheckpointError, match="tensor x was added twice"):
            writer.add("x", torch.zeros(1))
        with pytest.raises(CheckpointError, match="tensor z was not announced"):
            writer.add("z", torch.zeros(1))
        with pytest.raises(OutputError, match="cannot be called config"):
            writer.finish({}, {}, {"config.json": b""})
        with pytest.raises(OutputError, match="would lie outside"):
            writer.finish({}, {}, {"../evil": b""})
        with pytest.raises(OutputError, match="cannot read"):
            writer.finish({}, {}, {"tokenizer.json": tmp_path / "missing"})


def test_sizes() -> None:
    assert [parse_size(size) for size in ("5GB", "512MiB", 7, "1.5 kb", "10B")] == [
        5 * 10**9,
        512 * 2**20,
        7,
        1500,
        10,
    ]
    for bad in ("", "GB", "5 parsecs", 0, -1, "0.1B"):
        with pytest.raises(ConfigError, match="is no size; write bytes or for example 5GB"):
            parse_size(bad)
