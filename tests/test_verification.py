from __future__ import annotations

import json
import random
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
    write_base,
    write_fewbit,
)
from fewbit.checkpoint.layout import pack, unpack
from fewbit.config import QuantConfig
from fewbit.errors import CheckpointError
from fewbit.verification import verify

Q = "model.layers.0.self_attn.q_proj"
D = "model.layers.1.mlp.down_proj"


def texts(folder: Path) -> list[str]:
    return [f"{problem.where}: {problem.what}" for problem in verify(folder).problems]


@pytest.mark.parametrize("fmt", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("shard_size", ["5GB", "2KB"])
def test_what_fewbit_writes_is_whole(tmp_path: Path, fmt: str, bits: int, sym: bool, shard_size: str) -> None:
    config = QuantConfig(bits=bits, group_size=32, sym=sym, format=fmt)
    write_fewbit(tmp_path / "out", config, shard_size)
    result = verify(tmp_path / "out")
    assert result.problems == []
    assert result.ok
    assert result.layers == 2


def test_good_checkpoints_of_other_tools_are_whole(tmp_path: Path) -> None:
    written = {name: random_codes(*shape, low=1) for name, shape in LAYERS.items()}
    write_autogptq(tmp_path / "autogptq", autogptq_tensors(written))
    assert texts(tmp_path / "autogptq") == []
    written = {name: random_codes(*shape, low=0) for name, shape in LAYERS.items()}
    meta = {"meta": {"quantizer": ["gptqmodel:7.7.0"]}}
    write_autogptq(tmp_path / "gptqmodel", autogptq_tensors(written, "gptqmodel"), meta)
    assert texts(tmp_path / "gptqmodel") == []


@pytest.mark.parametrize(("shard_size", "flips"), [("5GB", 300), ("2KB", 80)])
def test_every_flipped_byte_is_found(tmp_path: Path, shard_size: str, flips: int) -> None:
    """Every file but the model card; a spread of bytes of each."""
    folder = tmp_path / "out"
    write_fewbit(folder, max_shard_size=shard_size)
    rng = random.Random(0)
    files = len(list(folder.iterdir()))
    flipped = 0
    for path in sorted(folder.iterdir()):
        if path.suffix == ".md":
            continue
        good = path.read_bytes()
        for position in rng.sample(range(len(good)), min(len(good), flips // files)):
            bad = bytearray(good)
            bad[position] ^= 1 << rng.randrange(8)
            path.write_bytes(bad)
            assert not verify(folder).ok, f"{path.name}, byte {position}"
            flipped += 1
        path.write_bytes(good)
    assert flipped > flips / 2
    assert verify(folder).ok


def test_truncated_and_missing_files_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write_fewbit(folder, max_shard_size="2KB")
    for path in sorted(folder.iterdir()):
        if path.suffix == ".md":
            continue
        good = path.read_bytes()
        for size in {0, 1, len(good) // 2, len(good) - 1}:
            path.write_bytes(good[:size])
            assert not verify(folder).ok, f"{path.name} cut to {size}"
        path.unlink()
        # The manifest is fewbit's own: a checkpoint without one is simply another tool's.
        assert verify(folder).ok == (path.name == "fewbit_manifest.json")
        path.write_bytes(good)
    assert verify(folder).ok


def test_model_cards_may_be_edited(tmp_path: Path) -> None:
    write_fewbit(tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("a better card")
    assert verify(tmp_path / "out").ok


def test_a_changed_manifest_says_so(tmp_path: Path) -> None:
    write_fewbit(tmp_path / "out")
    path = tmp_path / "out" / "fewbit_manifest.json"
    values = json.loads(path.read_text())
    values["files"]["tokenizer.json"]["size"] += 1
    path.write_text(json.dumps(values, indent=2) + "\n")
    assert texts(tmp_path / "out") == [
        "fewbit_manifest.json: was changed since fewbit wrote it; nothing it lists can be trusted"
    ]


def set_value(name: str, value: float):
    def change(tensors):
        tensors[name].view(-1)[3] = value

    return lambda folder: rewrite(folder, change)


def change_tensors(change):
    return lambda folder: rewrite(folder, change)


def config(**values):
    def change(folder: Path) -> None:
        edit_json(folder / "config.json", lambda c: c["quantization_config"].update(values))

    return change


def shuffle_groups(tensors) -> None:
    g_idx = tensors[f"{Q}.g_idx"]
    tensors[f"{Q}.g_idx"] = g_idx.flip(0).contiguous()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (set_value(f"{Q}.scales", float("nan")), f"{Q}.scales: 1 of 64 scales are not finite"),
        (set_value(f"{D}.scales", 0.0), f"{D}.scales: 1 of 192 scales are zero"),
        (set_value(f"{Q}.g_idx", 2), f"{Q}.g_idx: holds group 2, but there are only 2"),
        (set_value(f"{Q}.g_idx", -1), f"{Q}.g_idx: holds negative group -1"),
        (set_value(f"{Q}.g_idx", 1), f"{Q}.g_idx: gives one group 33 inputs; 32 fit"),
        (change_tensors(shuffle_groups), f"{Q}.g_idx: is not sequential, although the configuration"),
        (
            set_value("model.embed_tokens.weight", float("inf")),
            "model.embed_tokens.weight: 1 of its values are not",
        ),
        (set_value(f"{Q}.bias", float("inf")), f"{Q}.bias: 1 of its values are not finite"),
        (change_tensors(lambda t: t.pop(f"{Q}.qzeros")), f"{Q}: layer {Q} has no qzeros"),
        (change_tensors(lambda t: t.pop(f"{Q}.qweight")), f"{Q}.scales: is left over: {Q} has no qweight"),
        (
            change_tensors(lambda t: t.update({f"{Q}.weight": torch.zeros(32, 64)})),
            f"{Q}.weight: is left over: {Q} is quantized",
        ),
        (
            change_tensors(lambda t: t.update({f"{Q}.qzeros": t[f"{Q}.qzeros"].long()})),
            "qzeros is int64, not int32",
        ),
        (change_tensors(lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"][:1]})), "scales has shape"),
        (config(sym=True), "zero points are not 8, although the configuration says sym"),
        (config(sym=True), "quantize_config.json: sym is False, but config.json says True"),
        (config(group_size=64), "quantize_config.json: group_size is 32, but config.json says 64"),
        (config(format="gptq_v2"), "config.json: checkpoint_format is 'gptq' but format is 'gptq_v2'"),
        (config(dynamic={f"-:{Q}$": {}}), f"{Q}: is quantized, but the configuration says that it is not"),
        (
            lambda f: (config(desc_act=True)(f), change_tensors(lambda t: t.pop(f"{Q}.g_idx"))(f)),
            f"{Q}.g_idx: is missing, although the configuration says desc_act",
        ),
        (config(quant_method="awq"), "says quant_method 'awq'"),
        (
            lambda f: (f / "quantize_config.json").write_text("{"),
            "quantize_config.json is no valid JSON",
        ),
        (
            lambda f: save_file({"x": torch.zeros(1)}, f / "extra.safetensors"),
            "extra.safetensors: is left over: nothing refers to it",
        ),
        (
            lambda f: save_file(load_file(f / "model.safetensors"), f / "model.safetensors"),
            'model.safetensors: has no metadata {"format": "pt"}',
        ),
    ],
)
def test_each_kind_of_damage_is_named(tmp_path: Path, damage, message: str) -> None:
    write_fewbit(tmp_path / "out")
    damage(tmp_path / "out")
    assert any(message in text for text in texts(tmp_path / "out")), texts(tmp_path / "out")


def test_all_problems_are_collected(tmp_path: Path) -> None:
    write_fewbit(tmp_path / "out")

    def change(tensors):
        tensors[f"{Q}.scales"].view(-1)[0] = float("inf")
        tensors[f"{D}.g_idx"][0] = 99
        del tensors[f"{Q}.qzeros"]

    rewrite(tmp_path / "out", change)
    config(sym=True)(tmp_path / "out")
    found = texts(tmp_path / "out")
    for part in ("has no qzeros", "holds group 99", "zero points are not 8", "sym is False, but"):
        assert any(part in text for text in found), part


@pytest.mark.parametrize("change", ["ghost", "unlisted", "moved", "total", "lost shard"])
def test_indexes_that_lie_are_found(tmp_path: Path, change: str) -> None:
    folder = tmp_path / "out"
    write_fewbit(folder, max_shard_size="2KB")
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    name = f"{Q}.scales"
    file = values["weight_map"][name]
    other = next(entry for entry in values["weight_map"].values() if entry != file)
    expected = {
        "ghost": f"says that ghost is in {file}, but it is not",
        "unlisted": f"does not list {name}, which is in {file}",
        "moved": f"says that {name} is in {other}, but it is not",
        "total": "says total_size 7, but the tensors have",
        "lost shard": f"cannot read {folder / file}: No such file",
    }
    if change == "ghost":
        values["weight_map"]["ghost"] = file
    elif change == "unlisted":
        del values["weight_map"][name]
    elif change == "moved":
        values["weight_map"][name] = other
    elif change == "total":
        values["metadata"]["total_size"] = 7
    else:
        (folder / file).unlink()
    index.write_text(json.dumps(values))
    (folder / "fewbit_manifest.json").unlink()
    assert any(expected[change] in text for text in texts(folder)), texts(folder)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zeros_overwritten_by_autogptq_are_found(tmp_path: Path, bits: int) -> None:
    codes = random_codes(64, 64, bits)
    codes.zeros.fill_(2 ** (bits - 1))
    codes.zeros[1, 0] = 0  # sets every zero point above it in the same word
    tensors = autogptq_tensors({"a": codes})
    write_autogptq(tmp_path / "old", tensors, {"bits": bits})
    assert any("a.qzeros: 1 words look overwritten" in text for text in texts(tmp_path / "old"))
    read = unpack({n[2:]: t for n, t in tensors.items()}, bits, 32, "gptq", 64, 64)
    assert not torch.equal(read.zeros, codes.zeros)  # the information is gone


def test_three_bit_words_overwritten_by_autogptq_are_found(tmp_path: Path) -> None:
    codes = random_codes(64, 64, 3)
    tensors = {f"a.{part}": tensor for part, tensor in pack(codes, "gptq").items()}
    for word, shift in ((0, 6), (1, 13), (2, 20)):
        damaged = dict(tensors)
        damaged["a.qzeros"] = tensors["a.qzeros"].clone()
        damaged["a.qzeros"][1, word] |= -1 << shift
        folder = tmp_path / str(word)
        write_autogptq(folder, damaged, {"bits": 3})
        assert any("1 words look overwritten" in text for text in texts(folder))


def test_error_of_every_layer_against_the_original(tmp_path: Path) -> None:
    written = write_fewbit(tmp_path / "out")
    write_base(tmp_path / "base", written)
    result = verify(tmp_path / "out", tmp_path / "base")
    assert result.ok
    assert result.errors == {Q: 0.0, D: 0.0}

    weights = load_file(tmp_path / "base" / "model.safetensors")
    noise = torch.randn_like(weights[f"{Q}.weight"])
    original = weights[f"{Q}.weight"] + 0.1 * noise
    save_file(
        {f"{Q}.weight": original, f"{D}.weight": weights[f"{D}.weight"].t().contiguous()},
        tmp_path / "base" / "model.safetensors",
    )
    result = verify(tmp_path / "out", tmp_path / "base")
    assert result.errors[Q] == pytest.approx(float((0.1 * noise).norm() / original.norm()), rel=1e-4)
    assert result.errors[D] == 0.0  # transformers' Conv1D stores the transpose


def test_originals_that_are_not(tmp_path: Path) -> None:
    written = write_fewbit(tmp_path / "out")
    (tmp_path / "base").mkdir()
    save_file({f"{Q}.weight": -written[Q].dequantize()}, tmp_path / "base" / "model.safetensors")
    found = [problem.what for problem in verify(tmp_path / "out", tmp_path / "base").problems]
    assert "is as far from the original as zero is (relative error 2.00)" in found
    assert any(f"has no counterpart {D}.weight" in text for text in found)
    save_file(
        {f"{Q}.weight": torch.zeros(3, 3), f"{D}.weight": torch.ones(64, 96)},
        tmp_path / "base" / "model.safetensors",
    )
    found = [problem.what for problem in verify(tmp_path / "out", tmp_path / "base").problems]
    assert "has shape (32, 64), the original (3, 3)" in found
    with pytest.raises(CheckpointError, match="has no weights"):
        verify(tmp_path / "out", tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        verify(tmp_path / "nowhere")
