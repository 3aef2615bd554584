from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_samples import (
    LAYERS,
    autogptq_tensors,
    edit_json,
    random_codes,
    rewrite,
    write_autogptq,
    write_fewbit,
)
from fewbit.checkpoint.layout import pack
from fewbit.checkpoint.reader import open_checkpoint, open_weights
from fewbit.checkpoint.safetensors_file import read_header
from fewbit.config import QuantConfig
from fewbit.errors import CheckpointError
from fewbit.quantized_matrix import QuantizedMatrix

Q = "model.layers.0.self_attn.q_proj"


def assert_same(a: QuantizedMatrix, b: QuantizedMatrix) -> None:
    for part in ("codes", "scales", "zeros", "g_idx"):
        assert torch.equal(getattr(a, part), getattr(b, part)), part


@pytest.mark.parametrize("fmt", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shard_size", ["5GB", "2KB"])
def test_what_fewbit_wrote_reads_back(tmp_path: Path, fmt: str, bits: int, shard_size: str) -> None:
    config = QuantConfig(bits=bits, group_size=32, sym=False, format=fmt)
    written = write_fewbit(tmp_path / "out", config, shard_size)
    opened = open_checkpoint(tmp_path / "out")
    assert opened.config["model_type"] == "sample"
    assert opened.settings.format == fmt
    assert set(opened.layers) == set(written)
    for name, codes in written.items():
        spec = opened.layers[name]
        assert (spec.out_features, spec.in_features) == codes.shape
        assert (spec.bits, spec.group_size, spec.groups) == (bits, 32, codes.scales.shape[1])
        assert spec.parts == ("qweight", "qzeros", "scales", "g_idx", "bias")
        assert spec.has_g_idx
        assert spec.configured
        assert not spec.padded
        assert_same(opened.codes(name), codes)
    assert opened.tensor("model.embed_tokens.weight").dtype == torch.bfloat16


def test_an_autogptq_folder_reads(tmp_path: Path) -> None:
    written = {name: random_codes(*shape, seed=i) for i, (name, shape) in enumerate(LAYERS.items())}
    write_autogptq(tmp_path / "old", autogptq_tensors(written))
    opened = open_checkpoint(tmp_path / "old")
    assert opened.settings.assumed == ("checkpoint_format",)
    for name, codes in written.items():
        assert_same(opened.codes(name), codes)
    # Also under any other single name, and sharded under its own.
    (tmp_path / "old" / "gptq_model-4bit-32g.safetensors").rename(tmp_path / "old" / "whatever.safetensors")
    assert_same(open_checkpoint(tmp_path / "old").codes(Q), written[Q])
    index = {"weight_map": dict.fromkeys(opened.tensors, "whatever.safetensors")}
    (tmp_path / "old" / "gptq_model-4bit-32g.safetensors.index.json").write_text(json.dumps(index))
    assert_same(open_checkpoint(tmp_path / "old").codes(Q), written[Q])


def test_zero_point_0_in_v1_files_of_gptqmodel(tmp_path: Path) -> None:
    written = {name: random_codes(*shape, low=0) for name, shape in LAYERS.items()}
    assert any((codes.zeros == 0).any() for codes in written.values())
    write_autogptq(tmp_path / "old", autogptq_tensors(written, "gptqmodel"))
    for name, codes in written.items():
        assert_same(open_checkpoint(tmp_path / "old").codes(name), codes)


def test_no_g_idx_bfloat16_scales_and_padding(tmp_path: Path) -> None:
    codes = random_codes(5, 70)
    tensors = {f"a.{part}": tensor for part, tensor in pack(codes, "gptq").items()}
    tensors["a.scales"] = tensors["a.scales"].bfloat16()
    write_autogptq(tmp_path / "padded", tensors)
    spec = open_checkpoint(tmp_path / "padded").layers["a"]
    assert spec.padded
    assert (spec.in_features, spec.out_features) == (70, 5)
    read = open_checkpoint(tmp_path / "padded").codes("a")
    assert torch.equal(read.codes, codes.codes)
    assert read.scales.dtype == torch.bfloat16

    rewrite(tmp_path / "padded", lambda t: t.pop("a.g_idx"))
    spec = open_checkpoint(tmp_path / "padded").layers["a"]
    assert not spec.has_g_idx
    assert spec.in_features == 72  # the packed rows are all that is left to count

    rewrite(
        tmp_path / "padded",
        lambda t: t.update({"a.scales": t["a.scales"][:2], "a.qzeros": t["a.qzeros"][:2]}),
    )
    with pytest.raises(CheckpointError, match=r"qweight has shape \(9, 5\), expected \(8, 5\)"):
        open_checkpoint(tmp_path / "padded")  # the groups reach as far as 64 inputs


@pytest.mark.parametrize(("bits", "stated"), [(8, 4), (4, 8), (4, 2), (4, 3), (3, 4)])
def test_wrong_bit_width_is_refused(tmp_path: Path, bits: int, stated: int) -> None:
    for group_size in (32, -1):
        folder = tmp_path / str(group_size)
        tensors = {f"a.{part}": t for part, t in pack(random_codes(64, 96, bits, group_size), "gptq").items()}
        write_autogptq(folder, tensors, {"bits": stated, "group_size": group_size})
        with pytest.raises(CheckpointError, match=f"layer a does not fit its configuration .bits {stated}"):
            open_checkpoint(folder)
        rewrite(folder, lambda t: t.pop("a.g_idx"))
        with pytest.raises(CheckpointError, match=f"layer a does not fit its configuration .bits {stated}"):
            open_checkpoint(folder)


def test_act_order_group_size_minus_one_and_rules(tmp_path: Path) -> None:
    shuffled = random_codes(32, 64)
    shuffled.g_idx.copy_(shuffled.g_idx[torch.randperm(64)])
    written = {
        "m.0.a": shuffled,
        "m.0.b": random_codes(32, 64, bits=8, group_size=-1),
        "lm_head": random_codes(64, 32),
    }
    quantize_config = {
        "desc_act": True,
        "lm_head": True,
        "dynamic": {r".*\.b$": {"bits": 8, "group_size": -1}},
    }
    write_autogptq(tmp_path / "mixed", autogptq_tensors(written), quantize_config)
    opened = open_checkpoint(tmp_path / "mixed")
    assert opened.layers["m.0.b"].bits == 8
    for name, codes in written.items():
        assert opened.layers[name].configured
        assert_same(opened.codes(name), codes)


def test_layers_outside_the_configuration_are_marked(tmp_path: Path) -> None:
    write_fewbit(tmp_path / "out")
    edit_json(
        tmp_path / "out" / "config.json", lambda c: c["quantization_config"].update(dynamic={f"-:{Q}": {}})
    )
    assert not open_checkpoint(tmp_path / "out").layers[Q].configured


def remove(name: str):
    return lambda folder: (folder / name).unlink()


def change_config(**values):
    return lambda folder: edit_json(folder / "config.json", lambda c: c["quantization_config"].update(values))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def no_quantization(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "quantize_config.json").unlink()


def second_file(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"x": torch.zeros(1)}, folder / "b.safetensors")


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "gptq_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_quantization, r"is not a quantized checkpoint: .* fewbit quantize"),
        (lambda f: (f / "config.json").write_text("{"), "is no valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object"),
        (change_config(quant_method="awq"), "says quant_method 'awq'"),
        (change_config(bits=8), f"layer {Q} does not fit its configuration .bits 8, group_size 32"),
        (change_config(group_size=16), r"scales has shape \(2, 32\), expected \(4, 32\)"),
        (remove("model.safetensors"), r"has no weights: no file named \*\.safetensors"),
        (truncate, "its header describes .* bytes, the file has"),
        (lambda f: (f / "model.safetensors").write_bytes(b"abc"), "is cut short or no safetensors file"),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 200),
            "is cut short or no safetensors file",
        ),
        (
            second_file,
            "several weight files and no model.safetensors.index.json: a.safetensors, b.safetensors",
        ),
        (pickled, "in a pickle .gptq_model.bin.*--allow-pickle"),
        (lambda f: rewrite(f, lambda t: t.pop(f"{Q}.scales")), f"layer {Q} has no scales"),
        (
            lambda f: rewrite(f, lambda t: t.update({f"{Q}.scales": torch.zeros(3)})),
            "does not consist of matrices",
        ),
        (
            lambda f: rewrite(f, lambda t: t.update({f"{Q}.qzeros": torch.zeros(0, 9)})),
            "does not consist of matrices",
        ),
        (lambda f: rewrite(f, lambda t: t.update({f"{Q}.bias": torch.zeros(3)})), r"bias has shape \(3,\)"),
        (
            lambda f: rewrite(f, lambda t: [t.pop(n) for n in list(t) if n.endswith("qweight")]),
            r"has no tensor named \*\.qweight",
        ),
    ],
)
def test_malformed_checkpoints_are_refused(tmp_path: Path, damage, message: str) -> None:
    write_fewbit(tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "out")


def test_malformed_indexes_are_refused(tmp_path: Path) -> None:
    write_fewbit(tmp_path / "out", max_shard_size="2KB")
    index = tmp_path / "out" / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    name = f"{Q}.scales"
    other = next(file for file in good["weight_map"].values() if file != good["weight_map"][name])
    for weight_map, message in (
        (good["weight_map"] | {"ghost": other}, "says that ghost is in .*, but it is not"),
        (good["weight_map"] | {name: other}, f"says that {name} is in {other}, but it is not"),
        (
            good["weight_map"] | {name: "missing.safetensors"},
            "cannot read .*missing.safetensors: No such file",
        ),
        (good["weight_map"] | {name: "../x.safetensors"}, "which is not a file in its folder"),
        ({name: 3}, "has no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / "out")


def header_file(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "the header of .* is no valid JSON"),
        (b"[]", "the header of .* holds no JSON object"),
        (b'{"__metadata__": 3}', "__metadata__ does not map texts to texts"),
        (b'{"x": 3}', "unknown dtype 3"),
        (b'{"x": {"dtype": "F7", "shape": [], "data_offsets": [0, 4]}}', "unknown dtype 'F7'"),
        (b'{"x": {"dtype": "I8", "shape": [-4], "data_offsets": [0, 4]}}', r"shape \[-4\]"),
        (b'{"x": {"dtype": "I8", "shape": [4], "data_offsets": [0]}}', r"data_offsets \[0\]"),
        (b'{"x": {"dtype": "I8", "shape": [3], "data_offsets": [0, 4]}}', "cannot lie in 4 bytes"),
        (
            b'{"x": {"dtype": "I8", "shape": [3], "data_offsets": [1, 4]}}',
            "overlaps another or leaves a hole",
        ),
        (
            b'{"x": {"dtype": "I8", "shape": [8], "data_offsets": [0, 8]}}',
            "describes 76 bytes, the file has 72",
        ),
        (
            b'{"x": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]},'
            b' "x": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}}',
            "a name appears twice",
        ),
    ],
)
def test_damaged_headers_are_refused(tmp_path: Path, header: bytes, message: str) -> None:
    header_file(tmp_path / "x.safetensors", header, b"\0" * 4)
    with pytest.raises(CheckpointError, match=message):
        read_header(tmp_path / "x.safetensors")


def test_missing_names_and_folders(tmp_path: Path) -> None:
    write_fewbit(tmp_path / "out")
    opened = open_checkpoint(tmp_path / "out")
    with pytest.raises(CheckpointError, match="has no quantized layer lm_head"):
        opened.codes("lm_head")
    with pytest.raises(CheckpointError, match="has no tensor x"):
        opened.tensor("x")
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_checkpoint(tmp_path / "nowhere")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"tensor x is both in a\.safetensors and in b\.safetensors"):
        open_weights(tmp_path)


def test_damaged_contents_name_the_layer(tmp_path: Path) -> None:
    write_fewbit(tmp_path / "out")
    rewrite(tmp_path / "out", lambda t: t[f"{Q}.g_idx"].fill_(9))
    with pytest.raises(CheckpointError, match=f"layer {Q} of .*: g_idx holds 9 … 9"):
        open_checkpoint(tmp_path / "out").codes(Q)
