"""Damaged and hostile checkpoints through everything that reads one: a `FewbitError` or an answer, and soon.

The fast set draws the same examples every time. The large one draws new ones:

    pytest -m slow tests/checkpoint/test_fuzz.py
"""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import fewbit
from fewbit.checkpoint.convert import convert
from fewbit.checkpoint.reader import open_checkpoint
from fewbit.cli.display import quiet_libraries
from fewbit.cli.main import app
from fewbit.errors import FewbitError
from fewbit.hf.quantized_layers import quantized_layers
from fewbit.verification import verify
from tiny_gptq import llama, write_checkpoint

STYLES: dict[str, dict[str, Any]] = {
    "one file": {},
    "shards": {"shards": 3, "fmt": "gptq_v2"},
    "autogptq": {"legacy": True, "order": True},
}
ROOM = 3 << 30  # bytes of address space that reading may add to what the process has; the files have 300 KB


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    quiet_libraries()
    folder = tmp_path_factory.mktemp("whole")
    for style, options in STYLES.items():
        write_checkpoint(folder / style, llama(), **options)
        fewbit.load(folder / style)  # also loads what is imported late
    return {style: folder / style for style in STYLES}


@pytest.fixture
def little_memory() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


NAMES = st.sampled_from(
    ["bits", "group_size", "sym", "desc_act", "format", "checkpoint_format", "quant_method", "dynamic", "meta", "self",
     "lm_head", "modules_in_block_to_quantize", "model_file_base_name", "weight_map", "metadata", "num_hidden_layers",
     "vocab_size", "hidden_size", "architectures", "model_type", "auto_map", "dtype", "shape", "data_offsets",
     "rope_parameters", "num_attention_heads", "transformers_weights", "quantization_config", "text_config"]
)  # fmt: skip
HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-3, 300),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        ["..", "../x", "/etc/passwd", "", "4", "gptq", "gptq_v2", "F16", "I32", "U8", "\x1b[2J", "[/b]", "a" * 3000,
         "LlamaModel", "GPT2LMHeadModel", "BertModel", "llama", "gpt2", "mixtral", "model.safetensors", "float16",
         2**31, 2**63, 10**30, [], {}, [[[]]], {"(a+)+$": {"bits": 8}}, {"-:.*": {}}, [0, 0], [1, 2, 3], [2**40, 2**40]]
    ),
)  # fmt: skip
NUMBERS = st.integers(0, 2**32 - 1)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["flip", "cut", "insert"]), NUMBERS, NUMBERS, st.binary(max_size=8)),
        st.tuples(
            st.sampled_from(["json", "json", "json add", "json remove"]), NUMBERS, NUMBERS, NAMES, HOSTILE
        ),
        st.tuples(st.sampled_from(["header", "header", "header add"]), NUMBERS, NUMBERS, NAMES, HOSTILE),
        st.tuples(
            st.sampled_from(["tensor"]),
            NUMBERS,
            NUMBERS,
            st.sampled_from(["dtype", "shape", "value", "name"]),
        ),
        st.tuples(st.sampled_from(["remove", "empty", "folder", "swap"]), NUMBERS, NUMBERS),
    ),
    min_size=1,
    max_size=3,
)


def damage(folder: Path, step: tuple[Any, ...]) -> None:
    """One step of damage. A file that an earlier step has made unreadable stays as it is."""
    kind, which, *rest = step
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if kind.startswith("json"):
        files = [path for path in files if path.suffix == ".json"]
    elif kind.startswith(("header", "tensor")):
        files = [path for path in files if path.suffix == ".safetensors"]
    if not files:
        return
    path = files[which % len(files)]
    data = path.read_bytes()
    try:
        if kind in ("flip", "cut", "insert"):
            path.write_bytes(damaged_bytes(kind, data, *rest))
        elif kind.startswith("json"):
            path.write_text(json.dumps(damaged_json(kind, json.loads(data), *rest)))
        elif kind.startswith("header"):
            length = int.from_bytes(data[:8], "little")
            header = damaged_json(kind, json.loads(data[8 : 8 + length]), *rest)
            text = json.dumps(header).encode()
            path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        elif kind == "tensor":
            tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
            damaged_tensor(tensors, *rest)
            save_file(tensors, path, metadata={"format": "pt"})
        else:
            damaged_file(kind, path, files[rest[0] % len(files)])
    except (ValueError, OverflowError, OSError, RecursionError, SafetensorError):
        return


def damaged_bytes(kind: str, data: bytes, where: int, more: bytes) -> bytes:
    at = where % (len(data) + 1)
    if kind == "cut":
        return data[:at]
    return data[:at] + more + data[at + (len(more) if kind == "flip" else 0) :]


def damaged_json(kind: str, values: Any, where: int, name: str, hostile: Any) -> Any:
    """Replace, add or remove one value, somewhere."""
    places = [(values, key) for key in values] if isinstance(values, dict) else []
    for container, key in places:
        inner = container[key]
        places += (
            [(inner, k) for k in (inner if isinstance(inner, dict) else range(len(inner)))]
            if isinstance(inner, (dict, list))
            else []
        )
    if not places:
        return hostile
    container, key = places[where % len(places)]
    if kind.endswith("remove"):
        del container[key]
    elif kind.endswith("add"):
        (container if isinstance(container, dict) else values)[name] = hostile
    else:
        container[key] = hostile
    return values


def damaged_tensor(tensors: dict[str, torch.Tensor], where: int, what: str) -> None:
    name = sorted(tensors)[where % len(tensors)]
    tensor = tensors[name]
    if what == "dtype":
        kinds = [torch.int32, torch.int64, torch.float16, torch.float32, torch.uint8, torch.bool]
        tensors[name] = tensor.to(kinds[where % len(kinds)])
    elif what == "shape":
        shapes = [
            tensor.reshape(-1),
            tensor[:0],
            tensor[1:],
            tensor[None],
            tensor.t() if tensor.ndim == 2 else tensor,
        ]
        tensors[name] = shapes[where % len(shapes)].contiguous()
    elif what == "value" and tensor.numel():
        high = tensor.dtype in (torch.int32, torch.int64)
        tensor.view(-1)[where % tensor.numel()] = where - 2**31 if high else float("nan")
    else:
        tensors[sorted(tensors)[where // 7 % len(tensors)] + "x" * (where % 2)] = tensors.pop(name)


def damaged_file(kind: str, path: Path, other: Path) -> None:
    if kind == "swap":
        path.write_bytes(other.read_bytes())
        return
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()


def read_in_every_way(folder: Path, scratch: Path) -> list[str]:
    """What each reader said: "fine" or the error's words. Any other exception passes through."""

    def codes() -> None:
        checkpoint = open_checkpoint(folder)
        for name in checkpoint.layers:
            checkpoint.codes(name).dequantize()

    def inspect() -> None:
        result = CliRunner().invoke(app, ["inspect", str(folder), "-v"])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception

    def load() -> None:
        for _, layer in quantized_layers(fewbit.load(folder)):
            layer(torch.ones(1, layer.spec.in_features, dtype=layer.compute_dtype))

    readers = [codes, inspect, lambda: verify(folder), lambda: convert(folder, scratch, "gptq_v2"), load]
    said = []
    for reader in readers:
        try:
            reader()
            said.append("fine")
        except FewbitError as error:
            said.append(str(error))
    assert all(said)
    return said


def check(whole: dict[str, Path], folder: Path, style: str, steps: list[tuple[Any, ...]]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole[style], folder / "in")
    for step in steps:
        damage(folder / "in", step)
    read_in_every_way(folder / "in", folder / "out")


COMMON: dict[str, Any] = {
    "database": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    "deadline": 20_000,  # ms; the machine may be busy
    "print_blob": True,
}


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=25, derandomize=True, **COMMON)
@given(steps=STEPS)
def test_damaged_checkpoints(whole, tmp_path, little_memory, style, steps):
    check(whole, tmp_path / "case", style, steps)


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=700, **COMMON)
@given(steps=STEPS)
def test_many_damaged_checkpoints(whole, tmp_path, little_memory, style, steps):
    check(whole, tmp_path / "case", style, steps)


def test_undamaged_checkpoints_are_fine_in_every_way(whole, tmp_path):
    for style in STYLES:
        assert read_in_every_way(whole[style], tmp_path / style) == ["fine"] * 5
