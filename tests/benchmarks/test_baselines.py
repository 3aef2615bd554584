"""Products of other packages as candidates: the same weight in their layouts, and reasons for refusal."""

import baselines
import layer_speed as layers
import pytest
import torch

from fewbit.errors import DependencyError, KernelError


@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
def test_ggml_blocks_hold_the_same_weight(kind):
    codes = layers.random_weight(layers.Shape(8, 64, 4 if kind == "q4_0" else 8, 32))
    blocks = torch.from_numpy(baselines._blocks(None, kind, codes))
    scales = blocks[..., :2].contiguous().view(torch.float16).float()
    data = blocks[..., 2:]
    values = torch.cat([data & 15, data >> 4], -1).int() - 8 if kind == "q4_0" else data.view(torch.int8)
    assert torch.equal((scales * values).view(8, 64), codes.dequantize())


def test_refusals(tmp_path):
    asymmetric = layers.random_weight(layers.Shape(8, 64, 4, 32, sym=False))
    with pytest.raises(KernelError, match="act-order or asymmetric"):
        baselines._blocks(None, "q4_0", asymmetric)
    with pytest.raises(DependencyError, match="give --ggml-folder"):
        baselines.ggml("q4_0", tmp_path)(asymmetric, torch.bfloat16)


def test_all_are_measured_or_refused(tmp_path):
    candidates = {"Linear": layers.dense(torch.bfloat16), **baselines.all_baselines(tmp_path)}
    found, refused = layers.measure_shape(
        layers.Shape(64, 64, 4, 32), [1], candidates, method=layers.Method(rounds=1, rotate=1)
    )
    assert {*found[1], *refused} == {
        "Linear", "onnxruntime", "ggml q4_0", "ggml q4_k", "ggml q8_0", "torch_cpu_avx512", "torch_aten"
    }  # fmt: skip
    for name, why in refused.items():
        assert "pip install" in why or "cannot run this layer" in why or "ggml-folder" in why, (name, why)
