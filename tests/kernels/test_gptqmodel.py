"""fewbit on GPTQModel's own layer classes. Slow, and only where GPTQModel is installed:

    pip install gptqmodel && python -m pytest -m slow tests/kernels/test_gptqmodel.py

The CPU classes run as they are. Of the CUDA classes the Python code runs, with stand-ins for the compiled operators
that remember what they were given: whether the operators themselves do what they should, only a GPU can tell.
"""

import dataclasses
import sys

import pytest
import torch

import fewbit
from fewbit.checkpoint import layout
from fewbit.kernels import registry
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


@pytest.fixture
def cuda_classes_on_the_cpu(monkeypatch):
    """GPTQModel's CUDA classes believe that they have a GPU; their operators are `operator`'s stand-ins."""
    from gptqmodel import extension
    from gptqmodel.models._const import DEVICE
    from gptqmodel.nn_modules.qlinear import exllamav2, machete, marlin

    monkeypatch.setattr(extension, "op", operator)
    monkeypatch.setattr(extension, "is_available", lambda name: True)
    for module, name in (
        (marlin, "MarlinLinear"),
        (machete, "MacheteLinear"),
        (exllamav2, "ExllamaV2Linear"),
    ):
        layer_class = getattr(module, name)
        monkeypatch.setattr(layer_class, "SUPPORTS_DEVICES", [DEVICE.CPU])
        monkeypatch.setattr(layer_class, "validate_device", classmethod(lambda cls, device: None))
    monkeypatch.setattr(marlin, "marlin_import_exception", None)
    monkeypatch.setattr(marlin, "marlin_validate_runtime_device", lambda *args, **kwargs: (9, 0))
    monkeypatch.setattr(marlin, "marlin_runtime_available", lambda dtype: True)
    monkeypatch.setattr(
        marlin, "marlin_make_workspace_new", lambda device: torch.zeros(128, dtype=torch.int32)
    )
    entries = tuple(
        dataclasses.replace(entry, device="cpu")
        if entry.name in ("marlin", "machete", "exllamav2")
        else entry
        for entry in registry._ENTRIES
    )
    monkeypatch.setattr(registry, "_ENTRIES", entries)


def operator(extension, name):
    """What GPTQModel calls for its compiled operator `name`."""
    return getattr(sys.modules[__name__], f"fake_{name}")


def codes_in(words, bits, inputs):
    return layout.unpack_rows(words.t().contiguous(), bits, inputs).float()


def fake_gptq_marlin_repack(words, perm, size_k, size_n, bits):
    assert words.shape == (size_k * bits // 32, size_n)
    codes = codes_in(words, bits, size_k)
    return codes[:, perm.long()] if perm.numel() else codes


def fake_gptq_marlin_gemm_bf16(*args):
    x, c, codes, bias, scales, _, zeros, g_idx, perm, workspace, kind, m, _, k, k_full, *_, zero_is_float = (
        args
    )
    assert (c, bias, zeros.numel(), zero_is_float, workspace.dtype) == (None, None, 0, False, torch.int32)
    assert (x.shape, x.dtype, k_full) == ((m, k), torch.bfloat16, True)
    from gptqmodel.utils.marlin import get_scale_perms
    from gptqmodel.utils.marlin_scalar_type import scalar_types

    bits = {scalar_types.uint4b8.id: 4, scalar_types.uint8b128.id: 8}[kind]
    many, single = get_scale_perms()
    order = torch.tensor(many if scales.shape[0] > 1 else single)
    plain = torch.empty_like(scales.float()).view(-1, len(order))
    plain[:, order] = scales.float().view(-1, len(order))
    plain = plain.view(scales.shape)
    groups = g_idx.long() if g_idx.numel() else torch.arange(k) // (k // scales.shape[0])
    if perm.numel():
        x = x[:, perm.long()]
    weight = (codes - (1 << (bits - 1))) * plain.t()[:, groups]
    return (x.float() @ weight.t()).to(x.dtype)


def fake_machete_prepack_B(words, a_type, kind, scales_type):  # noqa: N802
    assert words.t().is_contiguous()
    assert (a_type, scales_type) == (torch.float16, torch.float16)
    return words


def fake_machete_mm(
    x, words, kind, out_type, scales, zeros, group_size, channel_scales, token_scales, schedule
):
    from gptqmodel.utils.marlin_scalar_type import scalar_types

    bits, offset = {
        scalar_types.uint4b8.id: (4, 8), scalar_types.uint8b128.id: (8, 128),
        scalar_types.uint4.id: (4, 0), scalar_types.uint8.id: (8, 0),
    }[kind]  # fmt: skip
    groups = torch.arange(x.shape[1]) // group_size
    weight = (codes_in(words, bits, x.shape[1]) - offset) * scales.float().t()[:, groups]
    if zeros is not None:  # −scale · zero, added
        weight += zeros.float().t()[:, groups]
    return (x.float() @ weight.t()).to(x.dtype)


MATRICES = []


def fake_make_q_matrix(words, perm, inverse, scale, scale_max, groups, zeros, scales, g_idx, scratch):
    assert (scale, scale_max, groups) == (None, None, None)
    bits, outputs = 4, words.shape[1]
    inputs = words.shape[0] * 8
    assert scratch.numel() * 2 >= inputs * outputs * 2
    assert g_idx is None or g_idx.device.type == "cpu"
    if g_idx is None:
        g_idx = torch.zeros(inputs, dtype=torch.int32)
    zero = layout.unpack_zeros(zeros, bits, "gptq_v2", outputs).t().float()
    weight = (codes_in(words, bits, inputs) - zero[:, g_idx.long()]) * scales.float().t()[:, g_idx.long()]
    MATRICES.append(weight)
    words.zero_()  # the real one rearranges them in place
    return len(MATRICES) - 1


def fake_gemm_half_q_half(x, handle, y, force_cuda):
    assert (x.dtype, y.dtype) == (torch.float16, torch.float16)
    y.copy_((x.float() @ MATRICES[handle].t()).half())


@pytest.mark.parametrize(
    ("name", "bits", "group_size", "order", "sym"),
    [
        ("marlin", 4, 64, False, True),
        ("marlin", 8, 128, False, True),
        ("marlin", 4, -1, False, True),
        ("marlin", 4, 64, True, True),
        ("machete", 4, 64, False, True),
        ("machete", 8, 128, False, False),
        ("machete", 4, 64, True, False),
        ("exllamav2", 4, 64, False, False),
        ("exllamav2", 4, 64, True, True),
        ("exllamav2", 4, -1, False, False),
    ],
)
def test_cuda_classes_get_what_they_need(name, bits, group_size, order, sym, cuda_classes_on_the_cpu):
    codes = random_codes(*SHAPE, bits, group_size, order=order, sym=sym)
    layer, before = layer_on(name, codes, sym)
    check(layer, codes, before)


def test_zero_points_are_read_where_the_checkpoint_wrongly_says_symmetric(cuda_classes_on_the_cpu):
    codes = random_codes(*SHAPE, 4, 64, sym=False)
    layer, before = layer_on("machete", codes, sym=True)
    check(layer, codes, before)
