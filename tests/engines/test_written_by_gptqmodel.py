"""fewbit reads what GPTQModel writes: the same logits as the same weights decoded here, in float64."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cells import tokens, write_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fewbit

HERE = Path(__file__).parent
WRITTEN = [
    {"bits": bits, "sym": sym, "desc_act": desc_act, "format": fmt, "group_size": 64}
    for bits, sym, desc_act, fmt in itertools.product(
        (2, 3, 4, 8), (True, False), (False, True), ("gptq", "gptq_v2")
    )
] + [{"bits": 4, "sym": True, "desc_act": False, "format": "gptq", "group_size": -1}]


@pytest.fixture(scope="module")
def written(python_of: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model and the checkpoints that GPTQModel made of it, numbered."""
    folder = tmp_path_factory.mktemp("written")
    write_model(folder / "model")
    command = [python_of("gptqmodel"), str(HERE / "write_gptqmodel.py"), str(folder / "model"), str(folder)]
    subprocess.run([*command, json.dumps(WRITTEN)], check=True)
    return folder


def words(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """(n, m) int32 → (n·32/bits, m): a little-endian stream of bits along the first axis, bit by bit."""
    stream = (packed.long()[:, None, :] >> torch.arange(32)[None, :, None]) & 1
    values = stream.reshape(-1, bits, packed.shape[1])
    return (values << torch.arange(bits)[None, :, None]).sum(1)


def zero_points(packed: torch.Tensor, bits: int, fmt: str) -> torch.Tensor:
    """(groups, out). A v1 file has one less, taken off the whole word where fields do not cross words."""
    stored = packed.long() & 0xFFFFFFFF
    if fmt == "gptq" and bits != 3:
        stored = (stored + sum(1 << shift for shift in range(0, 32, bits))) & 0xFFFFFFFF
    fields = words(stored.t(), bits).t()
    return (fields + 1) % 8 if fmt == "gptq" and bits == 3 else fields


def decode(tensors: dict[str, torch.Tensor], layer: str, bits: int, fmt: str) -> torch.Tensor:
    """The weight (out, in) in float64."""
    part = {name: tensors[f"{layer}.{name}"] for name in ("qweight", "qzeros", "scales", "g_idx")}
    groups = part["g_idx"].long()
    zeros = zero_points(part["qzeros"], bits, fmt)[groups]
    return ((words(part["qweight"], bits) - zeros) * part["scales"].double()[groups]).t()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(WRITTEN)), ids=[str(tuple(cell.values())) for cell in WRITTEN])
def test_logits_are_those_of_a_float64_decode(written: Path, number: int) -> None:
    folder, settings = written / str(number), WRITTEN[number]
    stated = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert stated["checkpoint_format"] == settings["format"]
    assert all(stated[key] == settings[key] for key in ("bits", "sym", "desc_act", "group_size"))
    tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    truth = AutoModelForCausalLM.from_pretrained(written / "model", dtype=torch.float64)
    layers = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    assert len(layers) == 14
    with torch.no_grad():
        for layer in layers:
            truth.get_submodule(layer).weight.copy_(
                decode(tensors, layer, settings["bits"], settings["format"])
            )
        ids = torch.tensor([tokens()])
        expected = truth(input_ids=ids).logits
        found = fewbit.load(folder, device="cpu", dtype="float32", kernel="reference")(input_ids=ids).logits
    assert (found - expected).abs().max() < 1e-4 * expected.std()
