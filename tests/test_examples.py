"""examples/minimal.py does what it teaches: its codes are GPTQ's, and its calibration pass is true-sequential.

The notebook runs from its first cell to its last.
"""

import json
import runpy
from pathlib import Path

import pytest
import torch

import oracle
from models import random_sequences, tiny_model

EXAMPLE = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "minimal.py"))
SHAPE = {"hidden_size": 64, "intermediate_size": 128}  # multiples of the example's group size
BITS = 3


def tiny():
    """A tiny Llama, its linear layers and calibration batches."""
    model = tiny_model("llama", **SHAPE)
    layers = {n: m for n, m in model.model.layers.named_modules() if isinstance(m, torch.nn.Linear)}
    return model, layers, [sequence["input_ids"][None] for sequence in random_sequences(4, 40)]


@torch.no_grad()
def replay(model, layers, batches):
    """The slow form: run the whole model again for every layer. Yields each layer's name, weight and Hessian."""
    for name, module in layers.items():
        seen = []
        hook = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        for ids in batches:
            model(ids, use_cache=False)
        hook.remove()
        X = torch.cat([x.flatten(0, -2) for x in seen]).T
        yield name, module.weight.data, X @ X.T


def test_example_matches_replay_and_oracle():
    model, _, batches = tiny()
    _, codes = EXAMPLE["quantize"](model, batches, BITS)
    slow, layers, batches = tiny()
    names = []
    for name, W, H in replay(slow, layers, batches):
        s = EXAMPLE["grid"](W, BITS)
        assert torch.equal(codes[name], EXAMPLE["gptq"](W, H, s, BITS)), name
        z = torch.full_like(s, 2 ** (BITS - 1))
        assert oracle.excess(W, oracle.damped(H, EXAMPLE["DAMP"]), s, z, codes[name], BITS) < 1e-3, name
        layers[name].weight.data = EXAMPLE["dequantize"](codes[name], s, BITS)
        names.append(name)
    assert names == list(codes)
    for a, b in zip(model.parameters(), slow.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_loses_less_than_rounding_to_nearest(bits):
    original, tokenizer = EXAMPLE["load"]()
    calibration = EXAMPLE["batches_of"]("calibration.txt", tokenizer, 8)
    evaluation = EXAMPLE["batches_of"]("evaluation.txt", tokenizer, 4)
    kl = {}
    for method in ("rtn", "gptq"):
        model, _ = EXAMPLE["load"]()
        errors, _ = EXAMPLE["quantize"](model, calibration, bits, method)
        kl[method] = sum(errors.values()), EXAMPLE["kl_divergence"](model, original, evaluation)
    assert kl["gptq"][0] < 0.8 * kl["rtn"][0]
    assert kl["gptq"][1] < 0.8 * kl["rtn"][1]


def notebook_cells():
    text = (Path(__file__).parents[1] / "examples" / "quantize_and_compare.ipynb").read_text(encoding="utf-8")
    return [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_holds_no_outputs():
    assert not any(cell["outputs"] or cell["execution_count"] for cell in notebook_cells())


@pytest.mark.slow
def test_the_notebook_runs(capsys):
    pytest.importorskip("matplotlib").use("Agg")
    names = {}
    for cell in notebook_cells():
        exec("".join(cell["source"]), names)
    kl = [report.evaluation["quantized"]["kl"] for report in names["reports"].values()]
    assert kl == sorted(kl)  # 8, 4, 3, 2 bits
    assert names["mixed"].evaluation["quantized"]["kl"] < kl[-1]
    assert names["distilled"].after < names["distilled"].before
    assert "verify: no problems" in capsys.readouterr().out
