"""Sources in 8 and 4 bits: read like the model that their formats describe."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

import fewbit
from fewbit.errors import ModelError
from fewbit.estimate import estimate
from fewbit.modeling.source import open_source
from models import random_sequences, save_tiny
from moe_models import tiny_moe

CPU = torch.device("cpu")
CONFIG = fewbit.QuantConfig(group_size=16, num_samples=4, seq_len=24)
BLOCK = 32  # does not divide the widths of 48 and 80


def lines(model):
    """Names of the linear weights inside blocks."""
    return [name for name in load_file(model / "model.safetensors") if "_proj" in name and ".layers." in name]


def rewrite(folder, change, quantization):
    """Replace the linear weights by what `change` returns for each; returns the dequantized weights."""
    path = folder / "model.safetensors"
    tensors, truth = load_file(path), {}
    for name in lines(folder):
        written, truth[name] = change(name, tensors.pop(name))
        tensors |= {key: value.contiguous() for key, value in written.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"dtype": "bfloat16", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return truth


def fp8(block, scale_dtype=torch.float32):
    def change(name, W):
        rows, columns = (-(-size // block) for size in W.shape)
        scales, q, truth = torch.empty(rows, columns), torch.empty(W.shape), torch.empty(W.shape)
        for r in range(rows):
            for c in range(columns):
                part = slice(r * block, (r + 1) * block), slice(c * block, (c + 1) * block)
                scale = W[part].abs().max() / 448
                scale = 2.0 ** torch.ceil(torch.log2(scale)) if scale_dtype is torch.float8_e8m0fnu else scale
                scales[r, c] = scale
                q[part] = (W[part] / scale).to(torch.float8_e4m3fn).float()
                truth[part] = q[part] * scale
        written = {name: q.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales.to(scale_dtype)}
        return written, truth

    return change, {
        "quant_method": "fp8",
        "weight_block_size": [block, block],
        "activation_scheme": "dynamic",
    }


def compressed(bits, group, *, sym=True):
    def change(name, W):
        out, n = W.shape
        groups = W.view(out, n // group, group)
        low, high = groups.amin(-1), groups.amax(-1)
        scale = ((high - low) / (2**bits - 1)).bfloat16().float()
        zero = (
            torch.full_like(scale, 2 ** (bits - 1)) if sym else (-low / scale).round().clamp(0, 2**bits - 1)
        )
        q = (groups / scale[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1)
        truth = ((q - zero[..., None]) * scale[..., None]).view(out, n)
        stem = name.removesuffix(".weight")
        written = {
            f"{stem}.weight_packed": words(q.view(out, n).int(), bits),
            f"{stem}.weight_scale": scale.bfloat16(),
            f"{stem}.weight_shape": torch.tensor([out, n]),
        }
        if not sym:
            written[f"{stem}.weight_zero_point"] = words(zero.int().t(), bits).t()
        return written, truth

    groups = {"group_0": {"weights": {"num_bits": bits, "symmetric": sym}}}
    return change, {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


def words(codes, bits):
    """Each row as a stream of bits in words of 32, the lowest first: bit by bit."""
    rows, n = codes.shape
    result = torch.zeros(rows, -(-n * bits // 32), dtype=torch.int64)
    for i in range(n):
        for b in range(bits):
            position = i * bits + b
            result[:, position // 32] |= (codes[:, i].long() >> b & 1) << position % 32
    return torch.where(result >= 2**31, result - 2**32, result).int()


def channelwise(name, W):
    scale = W.abs().amax(1, keepdim=True) / 448
    q = (W / scale).to(torch.float8_e4m3fn)
    return {name: q, f"{name}_scale": scale}, q.float() * scale


CASES = {
    "fp8": fp8(BLOCK),
    "fp8 with exponents": fp8(16, torch.float8_e8m0fnu),
    "int4": compressed(4, 16),
    "int3": compressed(3, 16),
    "int4 asymmetric": compressed(4, 8, sym=False),
    "float8 per channel": (channelwise, {"quant_method": "compressed-tensors", "format": "float-quantized"}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_bytes_as_from_the_dequantized_model(tmp_path, case):
    """Quantizing it equals quantizing the model that its format describes, in bfloat16."""
    change, quantization = CASES[case]
    folder, plain = save_tiny(tmp_path / "model", "llama"), save_tiny(tmp_path / "plain", "llama")
    truth = rewrite(folder, change, quantization)
    tensors = load_file(plain / "model.safetensors")
    tensors |= {name: value.bfloat16() for name, value in truth.items()}
    save_file(
        {k: v.bfloat16() for k, v in tensors.items()}, plain / "model.safetensors", metadata={"format": "pt"}
    )
    config = json.loads((plain / "config.json").read_text()) | {"dtype": "bfloat16"}
    (plain / "config.json").write_text(json.dumps(config))
    loaded = open_source(folder).load_model("auto", CPU).state_dict()
    for name, value in truth.items():
        assert torch.equal(loaded[name], value.bfloat16()), name
    assert not estimate(folder, CONFIG, dataset=random_sequences(4)).problems
    report = fewbit.quantize(folder, CONFIG, dataset=random_sequences(4), output=tmp_path / "a")
    fewbit.quantize(plain, CONFIG, dataset=random_sequences(4), output=tmp_path / "b")
    assert any("low precision" in note for note in report.notes)
    a, b = (load_file(tmp_path / out / "model.safetensors") for out in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    written = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "gptq"
    fewbit.load(tmp_path / "a")


def test_fp8_like_transformers(tmp_path):
    folder = save_tiny(tmp_path / "model", "llama")
    truth = rewrite(folder, *fp8(16))
    expected = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=FineGrainedFP8Config(weight_block_size=(16, 16), dequantize=True)
    ).state_dict()
    loaded = open_source(folder).load_model("auto", CPU).state_dict()
    # transformers derives the block from the number of scales, which is wrong where blocks do not fill the weight.
    whole = [name for name in truth if all(size % 16 == 0 for size in expected[name].shape)]
    assert len(whole) == 10
    for name in whole:
        assert torch.equal(loaded[name], expected[name].bfloat16()), name


def test_mxfp4_like_transformers(tmp_path):
    """gpt-oss: the experts of a layer in one tensor of blocks, dequantized, taken apart and quantized."""
    model = tiny_moe("gpt_oss")
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    g = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        E, n, out = tensors.pop(name).shape
        shape = (E, out, -(-n // 32), 16)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(120, 124, shape[:-1], generator=g, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(config))
    expected = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    ).state_dict()
    loaded = open_source(folder).load_model("auto", CPU).state_dict()
    for name in expected:
        assert torch.equal(loaded[name], expected[name].to(loaded[name].dtype)), name
    report = fewbit.quantize(folder, CONFIG, dataset=random_sequences(4), output=tmp_path / "out")
    assert sum("experts" in layer["name"] for layer in report.layers) == 3 * 2 * E
    fewbit.load(tmp_path / "out")


def test_files_that_do_not_fit(tmp_path):
    folder = save_tiny(tmp_path / "model", "llama")
    change, quantization = fp8(BLOCK)
    rewrite(folder, change, quantization | {"weight_block_size": [64, 64]})
    with pytest.raises(
        ModelError, match=r"cannot be dequantized with scales of shape .* in blocks of \[64, 64\]"
    ):
        open_source(folder).build_model("auto")
    words_missing = save_tiny(tmp_path / "words", "llama")
    change, packed = compressed(4, 16)
    packed = {**packed, "config_groups": {"group_0": {"weights": {"num_bits": 8}}}}
    rewrite(words_missing, change, packed)
    with pytest.raises(ModelError, match=r"of shape \[\d+, \d+\] does not fit words"):
        open_source(words_missing).build_model("auto")
    plain = save_tiny(tmp_path / "plain", "llama")
    rewrite(plain, lambda name, W: ({name: W}, W), quantization)
    with pytest.raises(ModelError, match=r"quantized \(fp8\), but its files have no such tensors"):
        open_source(plain).build_model("auto")
