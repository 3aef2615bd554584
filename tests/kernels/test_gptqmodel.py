"""fewbit on GPTQModel's layer classes for CPUs. Slow, and only where GPTQModel is installed:

    pip install gptqmodel && python -m pytest -m slow tests/kernels/test_gptqmodel.py

The CUDA classes need a GPU and are not tested.
"""

import pytest
import torch

import fewbit
from fewbit.checkpoint import layout
from fewbit.kernels.linear import QuantLinear
from tiny_gptq import llama, random_codes, write_checkpoint

pytestmark = pytest.mark.slow
SHAPE = (128, 256)


@pytest.fixture(autouse=True)
def _gptqmodel():
    pytest.importorskip("gptqmodel")


def layer_on(name, codes, sym=False):
    layer = QuantLinear.from_codes(codes, torch.randn(codes.shape[0]), sym=sym, compute_dtype=torch.bfloat16)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    layer.prepare(name)
    assert layer.kernel.name == name
    return layer, before


def check(layer, codes, before):
    x = torch.randn(3, 5, codes.shape[1], dtype=torch.bfloat16)
    truth = x.float() @ codes.dequantize().t() + layer.bias.detach()
    assert (layer(x).float() - truth).norm() / truth.norm() < 0.01
    assert all(torch.equal(tensor, before[key]) for key, tensor in layer.state_dict().items())


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("name", ["torch_aten", "torch_cpu_avx512"])
def test_cpu_classes_run(name, order):
    if name == "torch_cpu_avx512" and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this processor has no AVX512-BF16")
    codes = random_codes(*SHAPE, 4, 64, order=order)
    layer, before = layer_on(name, codes)
    check(layer, codes, before)


def test_a_whole_model_runs_writes_and_trains(tmp_path):
    write_checkpoint(tmp_path / "in", llama(hidden_size=128))
    truth = fewbit.load(tmp_path / "in", dtype=torch.bfloat16, kernel="reference")
    model = fewbit.load(tmp_path / "in", dtype=torch.bfloat16, kernel="torch_aten")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        found, wanted = model(ids).logits.float(), truth(ids).logits.float()
    assert (found - wanted).norm() / wanted.norm() < 0.05
    assert model.generate(ids, min_new_tokens=3, max_new_tokens=3).shape == (1, 23)
    model.train()(ids, labels=ids).loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path / "out")
    saved, original = (fewbit.load(tmp_path / name).state_dict() for name in ("out", "in"))
    packed = [name for name in original if name.rpartition(".")[2] in layout.PARTS]
    assert len(packed) == 14 * 4
    assert all(torch.equal(saved[name], original[name]) for name in packed)
