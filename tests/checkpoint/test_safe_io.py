"""What a stranger's folder can hold: each refused with a `CheckpointError` that says what is wrong."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoint_samples import (
    autogptq_tensors,
    edit_json,
    random_codes,
    rewrite,
    write_autogptq,
    write_fewbit,
)
from fewbit.checkpoint import manifest
from fewbit.checkpoint.convert import convert
from fewbit.checkpoint.reader import open_checkpoint, open_weights
from fewbit.checkpoint.safe_io import is_plain_name, read_json, stays_inside
from fewbit.checkpoint.safetensors_file import read_header
from fewbit.errors import CheckpointError
from fewbit.verification import verify

Q = "model.layers.0.self_attn.q_proj"


def header_file(path: Path, entries: object, data: bytes = b"\0" * 8) -> Path:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def tensor(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"x": tensor(shape=[True, 2])}, r"shape \[True, 2\]"),
        ({"x": tensor(shape=[2.0])}, r"shape \[2.0\]"),
        ({"x": tensor(shape=[float("nan")])}, r"shape \[nan\]"),
        ({"x": tensor(shape=2)}, "shape 2"),
        ({"x": tensor(shape=[-1, -2])}, r"shape \[-1, -2\]"),
        ({"x": tensor(shape=[2**62, 2**62])}, "cannot lie in 8 bytes"),
        ({"x": tensor(shape=[2**63])}, r"shape \[9223372036854775808\]"),
        ({"x": tensor(shape=[2**32, 2**32, 0], data_offsets=[0, 8])}, "cannot lie in 8 bytes"),
        ({"x": tensor(shape=[1] * 65)}, "shape"),
        ({"x": tensor(shape=[10**400] * 1000)}, r"shape \[1000.* …"),
        ({"x": tensor(data_offsets=[8, 0])}, "cannot lie in -8 bytes"),
        ({"x": tensor(data_offsets=[0, True])}, r"data_offsets \[0, True\]"),
        ({"x": tensor(shape=[2**40], data_offsets=[0, 2**42])}, "of a file of"),
        ({"x": tensor(), "y": tensor()}, "overlaps another or leaves a hole"),
        ({"x": tensor(dtype=None)}, "unknown dtype None"),
        ({"x": tensor(dtype=["F32"])}, r"unknown dtype \['F32'\]"),
        ({"x": tensor(dtype="F4")}, "unknown dtype 'F4'"),
        ({"x": []}, r"unknown dtype \[\]"),
        ({"__metadata__": {"format": 1}, "x": tensor()}, "__metadata__ does not map"),
        ({"a\x1b]0;owned\x07": tensor()}, r"is called 'a\\x1b\]0;owned\\x07'"),
        ({"a\ud800": tensor()}, "is no Unicode|is called"),
        ({"a" * 2000: tensor()}, "is called 'aaa.* …"),
        (b'{"x": ' + b"[" * 100_000, "is no valid JSON"),
        (b'{"x": ' * 200 + b"1" + b"}" * 200, "more than 64 levels deep"),
        (b'{"x": ' + b"9" * 5000 + b"}", "is no valid JSON"),
        ('{"x": 1}'.encode("utf-16"), "is no valid JSON"),
        (b'{"\xff": 1}', "is no valid JSON"),
    ],
)
def test_headers_that_lie(tmp_path: Path, entries: object, message: str) -> None:
    path = header_file(tmp_path / "x.safetensors", entries)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert time.perf_counter() - start < 10
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("length", [0, 1, 17, 10**6, 2**31, 2**63, 2**64 - 1])
def test_header_length_is_checked_first(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}" + b" " * 14)
    with pytest.raises(CheckpointError, match=r"is cut short|is no valid JSON|describes"):
        read_header(path)


@pytest.mark.parametrize("kind", ["empty", "folder", "pipe", "device", "dangling link"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "fewbit_manifest.json"])
def test_what_is_no_file_is_never_waited_for(tmp_path: Path, name: str, kind: str) -> None:
    write_fewbit(tmp_path / "out")
    path = tmp_path / "out" / name
    path.unlink()
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else tmp_path / "nowhere")
    if name != "fewbit_manifest.json" or kind != "dangling link":
        assert not verify(tmp_path / "out").ok
    # Without config.json (as a link to nowhere is), quantize_config.json speaks.
    if name == "model.safetensors" or (name == "config.json" and kind != "dangling link"):
        with pytest.raises(CheckpointError, match=re.escape(name) + "|has no weights"):
            open_checkpoint(tmp_path / "out")


def test_linked_files_are_read(tmp_path: Path) -> None:
    write_fewbit(tmp_path / "out")
    (tmp_path / "blobs").mkdir()
    for path in list((tmp_path / "out").iterdir()):
        blob = tmp_path / "blobs" / f"{abs(hash(path.name)):x}"
        path.rename(blob)
        path.symlink_to(blob)
    assert set(open_checkpoint(tmp_path / "out").layers) == {Q, "model.layers.1.mlp.down_proj"}
    assert verify(tmp_path / "out").ok


OUTSIDE = [
    "/etc/passwd",
    "../x.safetensors",
    "a/../../x",
    "a/b",
    "..",
    ".",
    "",
    "a\0b",
    "a\\b",
    "C:x",
    "x" * 300,
]


@pytest.mark.parametrize("file", OUTSIDE)
def test_an_index_never_leaves_its_folder(tmp_path: Path, file: str) -> None:
    write_fewbit(tmp_path / "out", max_shard_size="2KB")
    edit_json(
        tmp_path / "out" / "model.safetensors.index.json",
        lambda i: i["weight_map"].update({f"{Q}.qweight": file}),
    )
    with pytest.raises(CheckpointError, match="which is not a file in its folder"):
        open_checkpoint(tmp_path / "out")
    with pytest.raises(CheckpointError, match="which is not a file in its folder"):
        open_weights(tmp_path / "out")
    assert any("not a file in its folder" in problem.what for problem in verify(tmp_path / "out").problems)


@pytest.mark.parametrize("file", ["../old", "/etc/passwd", 7, ["x"], "a\0b"])
def test_autogptqs_base_name_never_leaves_the_folder(tmp_path: Path, file: object) -> None:
    tensors = autogptq_tensors({Q: random_codes(32, 64)})
    write_autogptq(tmp_path / "old", tensors)
    save_file(tensors, tmp_path / "old.safetensors")
    edit_json(tmp_path / "old" / "quantize_config.json", lambda c: c.update(model_file_base_name=file))
    with pytest.raises(CheckpointError, match=r"model_file_base_name .* which is not a file in its folder"):
        open_checkpoint(tmp_path / "old")
    with pytest.raises(CheckpointError, match=r"model_file_base_name .* which is not a file in its folder"):
        convert(tmp_path / "old", tmp_path / "new", "gptq")
    assert not verify(tmp_path / "old").ok


def test_a_pickles_index_never_leaves_its_folder(tmp_path: Path) -> None:
    write_fewbit(tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, tmp_path / "x.bin")
    index = {"weight_map": {"x": "../x.bin"}}
    (tmp_path / "old" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="which is not a file in its folder"):
        convert(tmp_path / "old", tmp_path / "new", "gptq", allow_pickle=True)


@pytest.mark.parametrize("file", ["/etc/passwd", "../secret", "a/../../secret", "x" * 5000, "a\0b"])
def test_a_manifest_never_leaves_its_folder(tmp_path: Path, file: str) -> None:
    write_fewbit(tmp_path / "out")
    (tmp_path / "secret").write_text("s")
    data = manifest.encode({file: manifest.hash_bytes(b"s")})
    (tmp_path / "out" / manifest.NAME).write_bytes(data)
    assert manifest.problems(tmp_path / "out") == [
        (manifest.NAME, "was changed since fewbit wrote it; nothing it lists can be trusted")
    ]


def test_names() -> None:
    assert is_plain_name("model-00001-of-00002.safetensors")
    assert not any(map(is_plain_name, [*OUTSIDE, 7, None, "a\x1b[2J", "a\ud800"]))
    assert stays_inside("chat_templates/tool.jinja")
    assert not any(map(stays_inside, ["/a", "../a", "a/../../b", "", "a/\0"]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "is no valid JSON"),
        (b'{"a":' * 80 + b"1" + b"}" * 80, "more than 64 levels deep"),
        (b'{"a": "\\ud800"}', "is no Unicode"),
        (b"\xff\xfe", "is no valid JSON"),
        (b"", "is no valid JSON"),
        (b"3", "holds no JSON object"),
    ],
)
def test_json_that_is_none(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_json(tmp_path / "config.json")


def test_a_huge_json_file_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)  # takes no room on disk
    with pytest.raises(CheckpointError, match="has 1,099,511,627,776 bytes; no such file has more than"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": "4"},
        {"bits": True},
        {"bits": 4.0},
        {"bits": 0},
        {"bits": None},
        {"bits": [4] * 10**5},
        {"group_size": 0},
        {"group_size": "32"},
        {"group_size": -2},
        {"group_size": 2**31},
        {"group_size": float("nan")},
        {"sym": "yes"},
        {"desc_act": 0},
        {"checkpoint_format": ["gptq"]},
        {"checkpoint_format": {"a": 1}},
        {"quant_method": {}},
        {"dynamic": ["x"]},
        {"dynamic": {"(": {}}},
        {"dynamic": {"(" * 10**4: {}}},
        {"dynamic": {"a{99999999999}": {}}},
        {"dynamic": {"((a{100}){100}){100}": {}}},
        {"dynamic": {"a{e<=3}": {"bits": 8}, "(?R)": {}}},
        {"dynamic": {"x": {"bits": "8"}}},
        {"dynamic": {"x": {"group_size": 0}}},
        {"dynamic": {"x": 3}},
        {"modules_in_block_to_quantize": "all"},
        {"modules_in_block_to_quantize": [[1]]},
    ],
)
def test_settings_of_the_wrong_kind(tmp_path: Path, changes: dict[str, object]) -> None:
    write_fewbit(tmp_path / "out")
    edit_json(tmp_path / "out" / "config.json", lambda c: c["quantization_config"].update(changes))
    with pytest.raises(CheckpointError, match=rf"config\.json.*{next(iter(changes))}") as caught:
        open_checkpoint(tmp_path / "out")
    assert len(str(caught.value)) < 1000
    assert not verify(tmp_path / "out").ok


def test_an_expression_that_never_ends_is_stopped(tmp_path: Path) -> None:
    write_fewbit(tmp_path / "out")
    hostile = {r"(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)\8.\7.\6.\5(?<!j)$": {"bits": 8}}
    edit_json(tmp_path / "out" / "config.json", lambda c: c["quantization_config"].update(dynamic=hostile))
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"takes more than 1\.0 s to match .*nested repetitions"):
        open_checkpoint(tmp_path / "out")
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("g_idx", torch.zeros(64)),
        ("g_idx", torch.zeros(24, dtype=torch.int32)),
        ("g_idx", torch.zeros(0, dtype=torch.int32)),
        ("g_idx", torch.zeros(8, 8, dtype=torch.int32)),
        ("qweight", torch.zeros(8, 32)),
        ("qweight", torch.zeros(8, 32, dtype=torch.int64)),
        ("qweight", torch.zeros(9, 32, dtype=torch.int32)),
        ("qweight", torch.zeros(256, dtype=torch.int32)),
        ("qzeros", torch.zeros(2, 4, dtype=torch.int16)),
        ("scales", torch.zeros(2, 32, dtype=torch.int32)),
        ("scales", torch.zeros(0, 32)),
    ],
)
def test_tensors_of_the_wrong_kind(tmp_path: Path, part: str, value: torch.Tensor) -> None:
    write_fewbit(tmp_path / "out")
    rewrite(tmp_path / "out", lambda tensors: tensors.update({f"{Q}.{part}": value}))
    with pytest.raises(CheckpointError, match=f"layer {Q} does not (fit|consist)"):
        open_checkpoint(tmp_path / "out")
    assert not verify(tmp_path / "out").ok


@pytest.mark.parametrize("value", [-1, 2, 2**31 - 1, -(2**31)])
def test_groups_out_of_range(tmp_path: Path, value: int) -> None:
    write_fewbit(tmp_path / "out")
    rewrite(tmp_path / "out", lambda tensors: tensors[f"{Q}.g_idx"].__setitem__(5, value))
    with pytest.raises(CheckpointError, match=rf"layer {Q}.*g_idx holds .* 0 … 1 are valid"):
        open_checkpoint(tmp_path / "out").codes(Q)
    assert any("group" in problem.what for problem in verify(tmp_path / "out").problems)


def test_a_block_with_an_absurd_number_is_one_problem(tmp_path: Path) -> None:
    write_fewbit(tmp_path / "out")
    rewrite(tmp_path / "out", lambda tensors: tensors.update({f"model.layers.{10**12}.norm": torch.ones(2)}))
    problems = [problem for problem in verify(tmp_path / "out").problems if "is missing" in problem.what]
    assert problems == [
        ("model.layers.2", f"is missing, as are {10**12 - 3} after it, but there is a model.layers.{10**12}")
    ]
