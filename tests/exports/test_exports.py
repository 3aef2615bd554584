"""A checkpoint in the formats of other engines: the same weights, decoded by the engines' own packages."""

import json
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from typer.testing import CliRunner

import fewbit
from fewbit.cli.main import app
from fewbit.config import ExportTarget
from fewbit.errors import CheckpointError, ConfigError, OutputError
from fewbit.exports import GGUF, TARGETS, export
from fewbit.exports.awq import Awq
from fewbit.exports.compressed_tensors import CompressedTensors
from fewbit.exports.mlx import Mlx
from fewbit.quantized_matrix import QuantizedMatrix, group_count, sequential_groups
from tiny_gptq import llama, logits, write_checkpoint

GRIDS = [
    (bits, group_size, sym)
    for bits in (2, 3, 4, 8)
    for group_size in (32, 64, 128, -1)
    for sym in (True, False)
]


def eights(group_size):
    """Arguments of `write_checkpoint` for a down_proj with other settings."""
    rule = {"bits": 8, "group_size": group_size}
    return {
        "override": {"down_proj": (8, group_size)},
        "quantization": {"dynamic": {"+:.*down_proj": rule}},
    }


def matrix(bits, group_size, sym, shape=(40, 256)):
    g = torch.Generator().manual_seed(bits * 1000 + shape[1])
    out, n = shape
    groups = group_count(n, group_size)
    middle = torch.full((out, groups), 2 ** (bits - 1), dtype=torch.int16)
    return QuantizedMatrix(
        codes=torch.randint(0, 2**bits, shape, generator=g).to(torch.uint8),
        scales=(torch.rand(out, groups, generator=g) * 0.1 + 1e-3).half(),
        zeros=middle if sym else torch.randint(0, 2**bits, (out, groups), generator=g).short(),
        g_idx=sequential_groups(n, group_size),
        bits=bits,
        group_size=group_size,
    )


@pytest.mark.parametrize("shape", [(40, 256), (17, 128 * 3)])
@pytest.mark.parametrize(("bits", "group_size", "sym"), GRIDS)
def test_compressed_tensors_decodes_the_same_weight(bits, group_size, sym, shape):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    codes = matrix(bits, group_size, sym, shape)
    tensors = CompressedTensors().tensors(codes)
    q = helpers.unpack_from_int32(tensors["weight_packed"], bits, torch.Size(shape))
    zeros = None
    if not sym:
        zero_shape = torch.Size((shape[0], codes.scales.shape[1]))
        zeros = helpers.unpack_from_int32(tensors["weight_zero_point"], bits, zero_shape, packed_dim=0)
    arguments = QuantizationArgs(
        num_bits=bits,
        symmetric=sym,
        strategy="channel" if group_size == -1 else "group",
        group_size=None if group_size == -1 else group_size,
    )
    found = dequantize(q, tensors["weight_scale"].float(), zeros, arguments, dtype=torch.float32)
    assert torch.equal(found, codes.dequantize())
    assert ("weight_zero_point" in tensors) == (not sym)


@pytest.mark.parametrize(("bits", "group_size", "sym"), GRIDS)
def test_mlx_decodes_the_same_weight(bits, group_size, sym):
    mx = pytest.importorskip("mlx.core")
    codes = matrix(bits, group_size, sym)
    verdict, tensors = Mlx().judge(grid_of(codes)), Mlx().tensors(codes)
    w, scales, biases = (mx.array(tensors[name].numpy()) for name in ("weight", "scales", "biases"))
    size = codes.shape[1] // tensors["scales"].shape[1]
    exact = mx.dequantize(w, scales.astype(mx.float32), biases.astype(mx.float32), group_size=size, bits=bits)
    found, expected = torch.from_numpy(np.array(exact)), codes.dequantize()
    step = codes.scales.float()[:, codes.g_idx.long()]
    worst = float(((found - expected).abs() / step).max())
    assert worst <= verdict.error + 1e-4  # float32 rounding of scale · q + bias
    assert (verdict.error == 0) == (sym or bool((biases_are_exact(codes)).all()))


def biases_are_exact(codes):
    product = -codes.scales.double() * codes.zeros.double()
    return product.half().double() == product


def grid_of(codes):
    from fewbit.exports.target import LayerGrid

    return LayerGrid(
        "layer", codes.shape, codes.bits, codes.group_size, codes.scales, codes.zeros, codes.has_act_order
    )


@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("sym", [True, False])
def test_awq_words_hold_the_same_weight(group_size, sym):
    codes = matrix(4, group_size, sym)
    tensors = Awq().tensors(codes)

    def value(words, row, output):
        place = (0, 4, 1, 5, 2, 6, 3, 7)[output % 8]  # where AWQ's kernel looks for an output
        return (int(words[row, output // 8]) & 0xFFFFFFFF) >> (4 * place) & 15

    for output, n in ((0, 0), (5, 77), (39, 255), (14, 128), (23, 31)):
        group = int(codes.g_idx[n])
        assert value(tensors["qweight"], n, output) == codes.codes[output, n]
        assert value(tensors["qzeros"], group, output) == codes.zeros[output, group]
        assert tensors["scales"][group, output] == codes.scales[output, group]


@pytest.mark.parametrize(
    ("to", "settings"),
    [
        ("compressed-tensors", {"bits": 4}),
        ("compressed-tensors", {"bits": 3, "fmt": "gptq_v2"}),
        ("compressed-tensors", {"bits": 2, "lm_head": True}),
        ("dense", {"bits": 3}),
        ("dense", {"bits": 4, "order": True}),
    ],
)
def test_transformers_computes_the_same_from_the_result(to, settings, tmp_path):
    if to == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    truth = llama()
    write_checkpoint(tmp_path / "in", truth, **settings)
    result = export(tmp_path / "in", tmp_path / "out", to)
    assert result.layers == 14 + bool(settings.get("lm_head"))
    warned = any("vLLM refuses a quantized lm_head" in note for note in result.notes)
    assert warned == (to == "compressed-tensors" and bool(settings.get("lm_head")))
    assert not result.inexact
    options = {}
    if to == "compressed-tensors":  # transformers 5.24 cannot keep asymmetric layers packed
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, **options)
    # compressed-tensors rounds the weights to the scales' float16; the tests above look at them before.
    share = 1e-5 if to == "dense" else 1e-2
    assert (logits(model) - logits(truth)).norm() < share * logits(truth).norm()
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    assert not (tmp_path / "out" / ".fewbit-incomplete").exists()


def test_transformers_runs_layers_with_different_settings(tmp_path):
    pytest.importorskip("compressed_tensors")
    config = fewbit.QuantConfig(bits=3, group_size=32, override={"down_proj": {"bits": 8}}, dtype="float32")
    llama().save_pretrained(tmp_path / "model")
    fewbit.quantize(tmp_path / "model", config, dataset=ids(), output=tmp_path / "in")
    export(tmp_path / "in", tmp_path / "out", "compressed-tensors")
    truth = fewbit.load(tmp_path / "in", dtype="float32", kernel="reference")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (logits(model) - logits(truth)).norm() < 2e-3 * logits(truth).norm()


def test_a_folder_for_mlx(tmp_path):
    write_checkpoint(tmp_path / "in", llama(), **eights(64))
    with pytest.raises(CheckpointError, match=r"14 of 14 layers only nearly.*--allow-inexact"):
        export(tmp_path / "in", tmp_path / "out", "mlx")
    result = export(tmp_path / "in", tmp_path / "out", "mlx", allow_inexact=True)
    assert 0 < result.error < 0.2
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"]["bits"] == 4
    assert config["quantization"]["model.layers.0.mlp.down_proj"] == {"group_size": 64, "bits": 8}
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.0.mlp.down_proj.weight"].dtype is torch.uint32
    assert (tmp_path / "out" / "model.safetensors").read_bytes()[8:60].count(b'"format":"mlx"')


def test_auto_rounds_configuration_over_the_same_tensors(tmp_path):
    save = fewbit.QuantConfig(bits=4, group_size=32, override={"down_proj": {"bits": 8}}, dtype="float32")
    llama().save_pretrained(tmp_path / "model")
    fewbit.quantize(tmp_path / "model", save, dataset=ids(), output=tmp_path / "in")
    export(tmp_path / "in", tmp_path / "out", "auto-round")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    found = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert found["packing_format"] == "auto_round:auto_gptq"
    assert found["extra_config"]["model.layers.1.mlp.down_proj"]["bits"] == 8
    assert found["extra_config"]["lm_head"]["bits"] == 16


def ids():
    g = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 200, (1, 24), generator=g)} for _ in range(4)]


@pytest.mark.parametrize(
    ("to", "settings", "words"),
    [
        ("awq", {"bits": 3}, "14 of 14 layers: 3 bits: the format has 4"),
        ("awq", eights(32), "2 of 14 layers: 8 bits"),
        ("compressed-tensors", {"order": True}, "14 of 14 layers: act-order"),
        ("mlx", {"order": True}, "act-order"),
        ("auto-round", {}, "14 of 14 layers: an asymmetric grid"),
        ("compressed-tensors", {"group_size": 40}, "no multiple of the group size 40"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_before_anything_is_written(to, settings, words, tmp_path):
    write_checkpoint(tmp_path / "in", llama(), **settings)
    with pytest.raises(CheckpointError, match=words):
        export(tmp_path / "in", tmp_path / "out", to, allow_inexact=True)
    assert not (tmp_path / "out").exists()


def test_wrong_arguments(tmp_path):
    write_checkpoint(tmp_path / "in", llama())
    with pytest.raises(ConfigError, match="targets are compressed-tensors, awq"):
        export(tmp_path / "in", tmp_path / "out", "exl2")
    with pytest.raises(ConfigError, match="dtype is for the targets dense and gguf"):
        export(tmp_path / "in", tmp_path / "out", "mlx", dtype="float16")
    with pytest.raises(ConfigError, match="dtype must be one of"):
        export(tmp_path / "in", tmp_path / "out", "dense", dtype="int8")
    with pytest.raises(OutputError, match="is not empty"):
        export(tmp_path / "in", tmp_path / "in", "dense")
    with pytest.raises(CheckpointError, match="is not a folder"):
        export(tmp_path / "nothing", tmp_path / "out", "dense")


def test_the_command(tmp_path):
    write_checkpoint(tmp_path / "in", llama(), shards=2)
    runner = CliRunner()
    arguments = ["export", str(tmp_path / "in"), "--to", "dense", "--dtype", "float16"]
    result = runner.invoke(app, [*arguments, "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "14 layers written as dense" in result.output
    assert "each weight is rounded to float16: by at most 0.05% of it" in result.output
    result = runner.invoke(
        app, [*arguments, "-o", str(tmp_path / "again"), "--json", "--max-shard-size", "20KB"]
    )
    assert json.loads(result.stdout)["layers"] == 14
    assert (tmp_path / "again" / "model.safetensors.index.json").exists()
    assert set(get_args(ExportTarget)) == {*TARGETS, GGUF}


def test_quantize_exports_in_one_go(tmp_path):
    from models import save_tiny

    save_tiny(tmp_path / "model", hidden_size=64, intermediate_size=128)
    (tmp_path / "text.txt").write_text("some words that repeat themselves " * 200)
    arguments = ["quantize", str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--group-size", "32"]
    arguments += ["--dataset", str(tmp_path / "text.txt"), "--seq-len", "32", "--num-samples", "4"]
    runner = CliRunner()
    refused = runner.invoke(app, [*arguments, "--export", "awq", "--bits", "3"])
    assert isinstance(refused.exception, ConfigError)
    assert not (tmp_path / "out").exists()
    result = runner.invoke(app, [*arguments, "--export", "mlx", "--export", "dense"])
    assert result.exit_code == 0, result.output
    assert "14 layers written as mlx" in result.output.replace("\n", " ")
    assert {"out", "out-mlx", "out-dense"} <= {path.name for path in tmp_path.iterdir()}
