"""The parts of a distillation against slow oracles: the product and its gradients, the loss, the optimizer."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from fewbit.distillation import loss as loss_module
from fewbit.distillation import training as training_module
from fewbit.distillation.loss import divergence
from fewbit.distillation.student import Student, TrainedTensor
from fewbit.kernels.linear import QuantLinear
from fewbit.quantized_matrix import QuantizedMatrix, group_count


def random_codes(bits, group_size, shape, act_order):
    g = torch.Generator().manual_seed(bits * 100 + shape[1])
    out, n = shape
    groups = group_count(n, group_size)
    size = n if group_size == -1 else group_size
    g_idx = (torch.arange(n) // size).int()
    return QuantizedMatrix(
        codes=torch.randint(0, 2**bits, shape, generator=g).to(torch.uint8),
        scales=(torch.rand(out, groups, generator=g) * 0.1 + 0.01).half(),
        zeros=torch.randint(1, 2**bits, (out, groups), generator=g).short(),
        g_idx=g_idx[torch.randperm(n, generator=g)] if act_order else g_idx,
        bits=bits,
        group_size=group_size,
    )


class OneLayer(nn.Module):
    def __init__(self, codes, bias):
        super().__init__()
        self.layer = QuantLinear.from_codes(codes, bias)
        self.layer.prepare("reference")

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("group_size", "shape", "act_order"),
    [(16, (24, 64), False), (16, (24, 64), True), (32, (17, 72), False), (-1, (9, 40), False)],
)
def test_product_and_gradients_equal_float64(bits, keep, group_size, shape, act_order):
    given, bias = random_codes(bits, group_size, shape, act_order), torch.randn(shape[0])
    model = OneLayer(given, bias)
    student = Student(model, {"layer.bias": bias}, keep=keep)
    scales, biases = student.matrices["layer"].scales, student.vectors["layer.bias"]
    g = torch.Generator().manual_seed(0)
    scales.d.data = 0.05 * torch.randn(scales.d.shape, generator=g)
    x = torch.randn(2, 7, shape[1], generator=g, requires_grad=True)
    up = torch.randn(2, 7, shape[0], generator=g)
    with student.training():
        y = model(x)
        (y * up).sum().backward()

    s = scales.value().detach().double().t().requires_grad_()  # what is stored after rounding
    x64 = x.detach().double().requires_grad_()
    b64 = bias.double().requires_grad_()
    groups = given.g_idx.long()
    W = (given.codes.double() - given.zeros.double()[:, groups]) * s[:, groups]
    expected = functional.linear(x64, W, b64)
    (expected * up.double()).sum().backward()
    assert torch.allclose(y.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-4)
    relative = s.grad.t() * given.scales.double().t().abs()  # ∂L/∂d = |s₀| ∂L/∂s
    assert torch.allclose(scales.d.grad.double(), relative, rtol=1e-3, atol=1e-3)
    assert torch.allclose(biases.d.grad.double(), b64.grad * biases.unit.double(), rtol=1e-4, atol=1e-4)


def test_what_is_kept_is_dropped_after_a_step():
    model = OneLayer(random_codes(4, 16, (24, 64), False), None)
    student = Student(model, {}, keep=True)
    x = torch.randn(5, 64)
    with student.training(), torch.no_grad():
        before = model(x)
        student.matrices["layer"].scales.d.data.fill_(0.5)
        assert torch.equal(model(x), before)
        student.changed()
        assert (model(x) - 1.5 * before).norm() < 0.01 * before.norm()


def test_the_model_computes_with_rounded_values_and_is_restored():
    codes = random_codes(3, 16, (24, 64), False)
    model = OneLayer(codes, torch.randn(24))
    student = Student(model, {"layer.bias": model.layer.bias})
    scales = student.matrices["layer"].scales
    scales.d.data.fill_(0.123456)
    value = scales.value()
    assert value.dtype is torch.float32  # with a gradient
    assert torch.equal(value, student.values()["layer.scales"].float())
    assert student.values()["layer.scales"].dtype is torch.float16
    student.vectors["layer.bias"].d.data.fill_(1.0)
    with student.training():
        pass
    assert model.layer.bias is model.layer._parameters["bias"]
    assert torch.equal(model.layer.bias, student.values()["layer.bias"])
    assert "forward" not in model.layer.__dict__


def test_a_vector_of_zeros_can_be_trained():
    tensor = TrainedTensor.of("bias", torch.zeros(5), relative=False)
    tensor.d.data.fill_(1.0)
    assert torch.allclose(tensor.value(), torch.full((5,), 0.01))


@pytest.mark.parametrize("mask", [None, torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])])
@pytest.mark.parametrize("chunk", [1, 11, 1 << 24])
def test_divergence_equals_torch(mask, chunk, monkeypatch):
    monkeypatch.setattr(loss_module, "rows_at_once", lambda length, device: max(1, chunk // length))
    g = torch.Generator().manual_seed(0)
    a, b = (3 * torch.randn(2, 5, 11, generator=g) for _ in range(2))
    a.requires_grad_()
    total, tokens = divergence(a, b, mask)
    (total / 7).backward()
    kept = torch.ones(2, 5) if mask is None else mask.float()
    a64 = a.detach().double().requires_grad_()
    kl = functional.kl_div(a64.log_softmax(-1), b.double().log_softmax(-1), log_target=True, reduction="none")
    expected = (kl.sum(-1) * kept.double()).sum()
    (expected / 7).backward()
    assert tokens == int(kept.sum())
    assert torch.allclose(total.double(), expected, rtol=1e-5)
    assert torch.allclose(a.grad.double(), a64.grad, rtol=1e-4, atol=1e-6)


def test_adam_equals_torch():
    g = torch.Generator().manual_seed(0)
    start = torch.randn(4, 3, generator=g)
    gradients = [torch.randn(4, 3, generator=g) for _ in range(6)]
    expected = nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([expected], lr=0.1, betas=training_module.BETAS, eps=training_module.EPSILON)
    training = training_module.Training.__new__(training_module.Training)
    d = nn.Parameter(start.clone())
    training.student = SimpleNamespace(changed=lambda: None)
    training._m, training._v = [torch.zeros(4, 3)], [torch.zeros(4, 3)]
    for step, gradient in enumerate(gradients):
        training.step = step
        d.grad, expected.grad = gradient.clone(), gradient.clone()
        training._descend([d], 0.1)
        optimizer.step()
    assert torch.allclose(d, expected, atol=1e-6)


def test_the_rate_rises_and_falls():
    rates = [training_module.schedule(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) > 0.98
    assert rates[-1] < 0.06
    assert rates[5:] == sorted(rates[5:], reverse=True)
