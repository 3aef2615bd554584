"""Tuning: error falls, grids stay valid, nothing is worse than before, nothing is touched that should not be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from fewbit import demo
from fewbit.config import LayerSettings
from fewbit.distributed import Communicator
from fewbit.errors import CalibrationError, ModelError
from fewbit.evaluation import windows
from fewbit.gptq import InputGroup, quantize_weight
from fewbit.gptq.grid import LARGEST_SCALE, SMALLEST_SCALE
from fewbit.modeling.layers import is_layer, set_weight_matrix, weight_matrix
from fewbit.pipeline import tune_block as tune
from fewbit.pipeline.tune_block import TrainingCall, tune_block
from fewbit.quantized_matrix import QuantizedMatrix
from models import random_sequences, tiny_model
from summing import hessian_of

WIDTH = 24


class Feedforward(nn.Module):
    """A residual block with one layer of each kind that holds a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 40)
        self.down = Conv1D(WIDTH, 40)
        nn.init.normal_(self.up.weight, std=0.5)
        nn.init.normal_(self.down.weight, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def paired(codes, weights):
    return {name: (codes[name], weights[name]) for name in codes}


def settings(**changes: Any) -> LayerSettings:
    base = LayerSettings(bits=2, group_size=8, sym=False, act_order="group", damp=0.01, method="gptq")
    return replace(base, **changes)


def structured(calls: int, tokens: int = 32, width: int = WIDTH) -> list[Tensor]:
    """Inputs with directions of very different size, as activations have."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(width, width, generator=generator) * torch.logspace(-0.5, -2, width)
    return [torch.randn(1, tokens, width, generator=generator) @ mix for _ in range(calls)]


@torch.no_grad()
def record(block: nn.Module, inputs: list[Tensor], kwargs: dict[str, Any]) -> list[TrainingCall]:
    """Calls of the original block, whose outputs are the targets."""
    outputs = [block(x, **kwargs) for x in inputs]
    return [
        TrainingCall((x,), kwargs, y[0] if isinstance(y, tuple) else y)
        for x, y in zip(inputs, outputs, strict=True)
    ]


@torch.no_grad()
def solve_block(
    block: nn.Module, inputs: list[Tensor], how: LayerSettings, **kwargs: Any
) -> tuple[dict[str, QuantizedMatrix], dict[str, Tensor], list[TrainingCall]]:
    """Quantize each layer from the inputs it sees in the original block, and record the calls."""
    layers = {name: module for name, module in block.named_modules() if is_layer(module)}
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    hooks = [
        module.register_forward_hook(lambda _, args, __, name=name: seen[name].append(args[0]))
        for name, module in layers.items()
        if not isinstance(module, nn.Conv2d)
    ]
    calls = record(block, inputs, kwargs)
    for hook in hooks:
        hook.remove()
    weights = {name: weight_matrix(module).clone() for name, module in layers.items()}
    codes = {
        name: quantize_weight(W, InputGroup(hessian_of(seen[name])) if seen[name] else None, how).codes
        for name, W in weights.items()
    }
    return codes, weights, calls


@torch.no_grad()
def error(block: nn.Module, codes: dict[str, QuantizedMatrix], calls: list[TrainingCall]) -> float:
    """L in plain words: quantized weights in place, mean over tokens of the relative squared error."""
    original = {name: weight_matrix(block.get_submodule(name)).clone() for name in codes}
    for name in codes:
        set_weight_matrix(block.get_submodule(name), codes[name].dequantize())
    errors = []
    for call in calls:
        y = block(*call.args, **call.kwargs)
        y = y[0] if isinstance(y, tuple) else y
        rows = ((y - call.target) ** 2).sum(-1) / (call.target**2).sum(-1)
        errors.append(rows.flatten() if call.mask is None else rows[call.mask])
    for name, W in original.items():
        set_weight_matrix(block.get_submodule(name), W)
    return float(torch.cat(errors).mean())


def assert_valid(result: dict[str, QuantizedMatrix], given: dict[str, QuantizedMatrix]) -> None:
    for name, new in result.items():
        old = given[name]
        assert new.codes.dtype == torch.uint8
        assert new.codes.shape == old.codes.shape
        assert int(new.codes.max()) < 2**old.bits
        assert new.scales.dtype == torch.float16
        sizes = new.scales.float().abs()
        assert bool(((sizes >= SMALLEST_SCALE) & (sizes <= LARGEST_SCALE)).all())
        assert torch.equal(new.scales < 0, old.scales < 0)
        assert torch.equal(new.zeros, old.zeros)
        assert torch.equal(new.g_idx, old.g_idx)
        assert (new.bits, new.group_size) == (old.bits, old.group_size)


def feedforward(seed: int = 0) -> Feedforward:
    torch.manual_seed(seed)
    return Feedforward().eval()


@pytest.fixture(scope="module")
def trained() -> tuple[Any, list[Tensor], dict[str, Any]]:
    """A block of the model that ships with the package, 32 batches that reach it, and its other arguments."""
    model = AutoModelForCausalLM.from_pretrained(demo.model_path(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
    tokens = windows(str(demo.calibration_text()), tokenizer, 64, 32)
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states[1]
    embeddings = model.model.rotary_emb(states, torch.arange(64)[None])
    return (
        model.model.layers[1],
        list(states[:, None]),
        {"position_embeddings": embeddings, "attention_mask": None},
    )


@pytest.mark.parametrize(("bits", "at_most"), [(2, 0.92), (3, 1.0)])
def test_error_falls_on_tokens_that_were_not_used(
    trained: Any, bits: int, at_most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "TOKENS_PER_STEP", 512)
    block, inputs, kwargs = trained
    how = settings(bits=bits, group_size=64, sym=bits == 3)
    codes, weights, calls = solve_block(block, inputs[:26], how, **kwargs)
    fresh = record(block, inputs[26:], kwargs)
    result = tune_block(block, paired(codes, weights), calls, fresh[:3], steps=40)
    assert result.kept
    assert result.after < at_most * result.before
    assert result.train_after < at_most * result.train_before
    assert 0 < result.changed < 0.5
    assert_valid(result.codes, codes)
    # Measured apart from the module, and on calls that neither trained nor chose.
    assert error(block, result.codes, fresh[:3]) == pytest.approx(result.after, rel=1e-4)
    assert error(block, result.codes, fresh[3:]) < at_most * error(block, codes, fresh[3:])


def test_codes_and_scales_both_learn(trained: Any) -> None:
    block, inputs, kwargs = trained
    codes, weights, calls = solve_block(block, inputs[:26], settings(group_size=64), **kwargs)
    result = tune_block(block, paired(codes, weights), calls, record(block, inputs[26:], kwargs), steps=40)
    assert result.kept
    for name in codes:
        assert 0.01 < float((result.codes[name].codes != codes[name].codes).float().mean()) < 0.5
        moved = (result.codes[name].scales.float() / codes[name].scales.float() - 1).abs()
        assert 0.001 < float(moved.mean()) < 0.1


def test_same_seed_same_numbers(trained: Any) -> None:
    block, inputs, kwargs = trained
    codes, weights, calls = solve_block(block, inputs[:6], settings(group_size=64), **kwargs)

    def tuned(seed: int) -> list[Tensor]:
        trial = tune._Trial(
            block, {name: tune._Layer(codes[name], weights[name]) for name in codes}, Communicator()
        )
        assert list(tune._descend(trial, tune._Shared(calls, Communicator()), 2, seed)) == [1, 2]
        return [x.detach() for layer in trial.layers.values() for x in (layer.v, layer.r)]

    first, again, other = tuned(5), tuned(5), tuned(6)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_block_is_left_as_it_was(trained: Any) -> None:
    block, inputs, kwargs = trained
    before = {name: p.clone() for name, p in block.named_parameters()}
    codes, weights, calls = solve_block(block, inputs[:4], settings(group_size=64), **kwargs)
    tune_block(block, paired(codes, weights), calls[:3], calls[3:], steps=2)
    for name, p in block.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(
    ("group_size", "act_order"),
    [(8, "none"), (7, "group"), (8, "full"), (9, "full"), (-1, "group"), (64, "none")],
)
def test_grids_stay_valid(bits: int, sym: bool, group_size: int, act_order: str) -> None:
    block = feedforward()
    how = settings(bits=bits, sym=sym, group_size=group_size, act_order=act_order)
    codes, weights, calls = solve_block(block, structured(4), how)
    result = tune_block(block, paired(codes, weights), calls[:3], calls[3:], steps=4)
    assert_valid(result.codes, codes)
    assert result.after <= result.before
    assert error(block, result.codes, calls[3:]) == pytest.approx(result.after, rel=1e-3)


def test_gradients_are_those_of_the_docstring() -> None:
    torch.manual_seed(1)
    W = torch.randn(6, 20)
    given = quantize_weight(W, None, settings(group_size=8)).codes
    layer = tune._Layer(given, W)
    assert torch.equal(layer.matrix(), given.dequantize())
    assert torch.equal(layer.codes().codes, given.codes)
    dW = torch.randn_like(W)
    layer.set_gradient(dW)
    groups, s = given.g_idx.long(), given.scales.float()
    q_minus_z = given.codes.float() - given.zeros.float()[:, groups]
    by_group = torch.zeros_like(s).index_add_(1, groups, q_minus_z * dW) * s
    assert layer.v.grad is not None
    assert layer.r.grad is not None
    torch.testing.assert_close(layer.groups.join(layer.v.grad), dW * s[:, groups])
    torch.testing.assert_close(layer.r.grad[..., 0], by_group)


def test_given_codes_are_returned_without_a_gain() -> None:
    block = feedforward()
    codes, weights, calls = solve_block(block, structured(4), settings(bits=3))
    # Held-out tokens that ask for the opposite of what the training tokens ask for.
    opposite = [replace(call, target=_output(block, codes, call)) for call in calls[3:]]
    result = tune_block(block, paired(codes, weights), calls[:3], opposite, steps=8)
    assert not result.kept
    assert result.after == result.before
    assert result.train_after == result.train_before
    assert result.changed == 0
    assert all(result.codes[name] is codes[name] for name in codes)


def _output(block: nn.Module, codes: dict[str, QuantizedMatrix], call: TrainingCall) -> Tensor:
    trial = tune._Trial(
        block, {name: tune._Layer(c, c.dequantize()) for name, c in codes.items()}, Communicator()
    )
    weights = {f"{n}.weight": tune._as_weight(trial.modules[n], W) for n, W in trial.matrices().items()}
    with torch.no_grad():
        return torch.func.functional_call(block, weights, call.args)


def test_padding_does_not_count() -> None:
    block = feedforward()
    codes, weights, calls = solve_block(block, structured(6), settings())
    mask = torch.ones(1, 32, dtype=torch.bool)
    mask[:, 20:] = False
    results = []
    for noise in (0.0, 100.0):
        padded = []
        for call in calls:
            target = call.target.clone()
            target[:, 20:] += noise
            padded.append(replace(call, target=target, mask=mask))
        results.append(tune_block(block, paired(codes, weights), padded[:4], padded[4:], steps=8))
    short = [TrainingCall((c.args[0][:, :20],), {}, c.target[:, :20]) for c in calls]
    results.append(tune_block(block, paired(codes, weights), short[:4], short[4:], steps=8))
    for other in results[1:]:
        assert other.after == pytest.approx(results[0].after, rel=1e-5)
    assert torch.equal(results[0].codes["up"].codes, results[1].codes["up"].codes)


def test_groups_of_zeros_and_idle_inputs_stay() -> None:
    block = feedforward()
    with torch.no_grad():
        block.up.weight[3] = 0
    inputs = structured(6)
    codes, weights, calls = solve_block(block, inputs, settings())
    result = tune_block(block, paired(codes, weights), calls[:4], calls[4:], steps=20)
    assert bool((result.codes["up"].dequantize()[3] == 0).all())


@pytest.mark.parametrize("family", ["gpt2", "bloom", "gpt_neox"])
def test_other_architectures(family: str) -> None:
    """Blocks that return tuples, hold Conv1D layers or take masks: recorded from the model's own forward."""
    model = tiny_model(family)
    name = {"gpt2": "transformer.h.1", "bloom": "transformer.h.1", "gpt_neox": "gpt_neox.layers.1"}[family]
    block: Any = model.get_submodule(name)
    recorded: list[TrainingCall] = []

    def remember(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        recorded.append(TrainingCall(args, kwargs, output[0] if isinstance(output, tuple) else output))

    handle = block.register_forward_hook(remember, with_kwargs=True)
    with torch.no_grad():
        for sequence in random_sequences(8):
            model(input_ids=sequence["input_ids"][None], use_cache=False)
    handle.remove()
    layers = {name: module for name, module in block.named_modules() if is_layer(module)}
    weights = {name: weight_matrix(module).clone() for name, module in layers.items()}
    codes = {name: quantize_weight(W, None, settings(group_size=16)).codes for name, W in weights.items()}
    result = tune_block(block, paired(codes, weights), recorded[:6], recorded[6:], steps=24)
    assert result.kept
    assert result.after < 0.9 * result.before
    assert_valid(result.codes, codes)


def test_half_precision_convolution() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).bfloat16().eval()
    inputs = [x.reshape(1, 3, 16, 16).bfloat16() for x in structured(8, tokens=32)]
    codes, weights, calls = solve_block(block, inputs, settings(group_size=9))
    result = tune_block(block, paired(codes, weights), calls[:6], calls[6:], steps=16)
    assert result.after < result.before
    assert_valid(result.codes, codes)


def test_too_few_calls_is_an_error() -> None:
    block = feedforward()
    codes, weights, calls = solve_block(block, structured(1), settings())
    with pytest.raises(CalibrationError, match=r"there are 1 and 0: give more text or a smaller batch_size"):
        tune_block(block, paired(codes, weights), calls, [], steps=1)


def test_an_output_of_another_shape_is_an_error() -> None:
    block = feedforward()
    codes, weights, calls = solve_block(block, structured(2), settings())
    wrong = replace(calls[0], target=calls[0].target[:, :5])
    with pytest.raises(
        ModelError, match=r"Feedforward cannot be tuned.*\(1, 32, 24\).*\(1, 5, 24\).*without tune"
    ):
        tune_block(block, paired(codes, weights), [wrong], calls[1:], steps=1)
    assert "forward" not in block.__dict__
    assert all(p.grad is None for p in block.parameters())
