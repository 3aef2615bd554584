"""The scheduler against a slow, separate, obvious oracle that replays the whole model for every layer."""

from functools import partial

import pytest
import torch
from torch import nn

from fewbit.config import QuantConfig
from fewbit.gptq import InputGroup, quantize_weight
from fewbit.modeling.layers import input_rows, set_weight_matrix, weight_matrix
from fewbit.pipeline.scheduler import Hooks, Scheduler
from fewbit.planning import make_plan
from models import FAMILIES, random_sequences, tiny_model
from summing import hessian_of

CONFIG = QuantConfig(bits=3, group_size=16, seq_len=24)


def batches_for(model, count=4):
    sequences = [s["input_ids"][None] for s in random_sequences(count)]
    if model.config.is_encoder_decoder:
        return [{"input_ids": ids, "decoder_input_ids": ids[:, :20]} for ids in sequences]
    return [{"input_ids": ids} for ids in sequences]


def execution_order(model, layers, batch):
    order = []
    hooks = [m.register_forward_pre_hook(lambda m, a, name=n: order.append(name)) for n, m in layers.items()]
    with torch.no_grad():
        model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return list(dict.fromkeys(order))


def replay(model, batches):
    """True-sequential GPTQ: for each layer, run the whole model, collect the layer's inputs, and quantize it."""
    layers = {layer.name: model.get_submodule(layer.name) for layer in make_plan(model, CONFIG).layers}
    codes = {}
    for name in execution_order(model, layers, batches[0]):
        module, seen = layers[name], []
        hook = module.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            for batch in batches:
                model(**batch, use_cache=False)
        hook.remove()
        hessian = hessian_of([input_rows(module, x) for x in seen])
        W = weight_matrix(module)
        codes[name] = quantize_weight(W, InputGroup(hessian), CONFIG.defaults).codes
        set_weight_matrix(module, codes[name].dequantize(W.dtype))
    return codes


def lockstep(model, batches):
    """Quantize the same layers with the scheduler."""
    layers = {layer.name: model.get_submodule(layer.name) for layer in make_plan(model, CONFIG).layers}
    codes = {}

    def on_layer(name, inputs):
        module = layers[name]
        hessian = hessian_of([input_rows(module, given.x) for given in inputs])
        W = weight_matrix(module)
        codes[name] = quantize_weight(W, InputGroup(hessian), CONFIG.defaults).codes
        set_weight_matrix(module, codes[name].dequantize(W.dtype))

    with torch.no_grad():
        jobs = [lambda b=b: model(**b, use_cache=False) for b in batches]
        stats = Scheduler(layers, jobs, Hooks(on_layer)).run()
    return codes, stats


@pytest.mark.parametrize("family", FAMILIES)
def test_matches_full_replay(family):
    slow_model, fast_model = tiny_model(family), tiny_model(family)
    batches = batches_for(slow_model)
    expected = replay(slow_model, batches)
    codes, stats = lockstep(fast_model, batches)
    assert list(codes) == list(expected)
    assert stats.unreached == []
    assert not stats.late_inputs
    for name, want in expected.items():
        assert torch.equal(codes[name].codes, want.codes), name
        assert torch.equal(codes[name].scales, want.scales), name
    for (name, a), (_, b) in zip(slow_model.named_parameters(), fast_model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("family", ["llama", "bloom", "t5"])
def test_each_batch_runs_each_layer_once(family):
    model = tiny_model(family)
    batches = batches_for(model)
    layers = {layer.name: model.get_submodule(layer.name) for layer in make_plan(model, CONFIG).layers}
    calls = dict.fromkeys(layers, 0)
    for name, module in layers.items():

        def counted(*args, _name=name, _forward=module.forward):
            calls[_name] += 1
            return _forward(*args)

        module.forward = counted
    lockstep(model, batches)
    last = list(layers)[-1]
    assert calls.pop(last) in (0, len(batches))  # nothing after the last layer needs its output
    assert set(calls.values()) == {len(batches)}


def test_forwards_are_restored_and_the_head_is_not_run():
    model = tiny_model("llama")
    ran = []
    model.lm_head.register_forward_pre_hook(lambda *_: ran.append(1))
    batches = batches_for(model)
    lockstep(model, batches)
    assert ran == []
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert model(**batches[0]).logits.shape == (1, 24, model.config.vocab_size)


class Choosy(nn.Module):
    """Inputs with a negative first value skip `a`; `last` is used twice."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x):
        a, b, last, never = self.blocks
        if x[0, 0] > 0:
            x = a(x)
        x = last(b(x))
        return last(x) if x.shape[0] < 100 else never(x)


def choosy_pass(inputs):
    model = Choosy()
    met = {}
    layers = {f"blocks.{i}": m for i, m in enumerate(model.blocks)}
    with torch.no_grad():
        hooks = Hooks(lambda name, given: met.setdefault(name, [one.job for one in given]))
        stats = Scheduler(layers, [lambda x=x: model(x) for x in inputs], hooks).run()
    return met, stats


def test_batches_that_skip_a_layer_wait():
    inputs = [torch.full((3, 8), v) for v in (1.0, -1.0, 1.0)]
    met, stats = choosy_pass(inputs)
    assert met == {"blocks.0": [0, 2], "blocks.1": [0, 1, 2], "blocks.2": [0, 1, 2]}
    assert list(met) == ["blocks.0", "blocks.1", "blocks.2"]
    assert stats.late_inputs == {"blocks.2": 3}
    assert stats.unreached == ["blocks.3"]


def test_error_in_a_job_restores_the_model():
    model = Choosy()
    layers = {f"blocks.{i}": m for i, m in enumerate(model.blocks)}
    inputs = [torch.ones(3, 8), torch.ones(3, 9)]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), torch.no_grad():
        Scheduler(layers, [lambda x=x: model(x) for x in inputs], Hooks(lambda name, given: None)).run()
    assert all("forward" not in module.__dict__ for module in model.blocks)
    assert torch.is_grad_enabled()


def test_error_in_on_layer_restores_an_earlier_forward():
    model = Choosy()

    def own(x):
        return nn.functional.linear(x, model.blocks[0].weight)

    model.blocks[0].forward = own

    def on_layer(name, inputs):
        raise ValueError("stop here")

    layers = {f"blocks.{i}": m for i, m in enumerate(model.blocks)}
    with pytest.raises(ValueError, match="stop here"):
        Scheduler(layers, [lambda: model(torch.ones(3, 8))], Hooks(on_layer)).run()
    assert model.blocks[0].forward is own


def two_paths(model, batches, blocks=None, on_block_end=None):
    """Quantize with a full-precision path; returns the inputs of each layer on both paths."""
    layers = {layer.name: model.get_submodule(layer.name) for layer in make_plan(model, CONFIG).layers}
    seen = {}
    n = len(batches)

    def on_layer(name, inputs):
        seen[name] = {given.job: given.x.clone() for given in inputs}
        module = layers[name]
        hessian = hessian_of([input_rows(module, given.x) for given in inputs[:n]])
        W = weight_matrix(module)
        set_weight_matrix(
            module, quantize_weight(W, InputGroup(hessian), CONFIG.defaults).codes.dequantize(W.dtype)
        )

    jobs = [lambda b=b: model(**b, use_cache=False) for b in [*batches, *batches]]
    with torch.no_grad():
        hooks = Hooks(on_layer, on_block_end)
        stats = Scheduler(layers, jobs, hooks, references=range(n, 2 * n), blocks=blocks).run()
    return seen, stats, layers


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "t5"])
def test_references_see_the_unchanged_model(family):
    model = tiny_model(family)
    batches = batches_for(model, 2)
    seen, stats, layers = two_paths(model, batches)
    original = tiny_model(family)
    for start, whole in ((0, model), (len(batches), original)):
        for name in layers:
            inputs = []
            module = whole.get_submodule(name)
            hook = module.register_forward_pre_hook(lambda m, args, to=inputs: to.append(args[0]))
            with torch.no_grad():
                for batch in batches:
                    whole(**batch, use_cache=False)
            hook.remove()
            for job, x in enumerate(inputs):
                assert torch.equal(seen[name][start + job], x), (name, start)
    assert stats.unreached == []


def test_block_end_gets_calls_and_replaces_outputs():
    model = tiny_model("llama")
    batches = batches_for(model, 2)
    blocks = {f"model.layers.{i}": block for i, block in enumerate(model.model.layers)}
    ended = []

    def on_block_end(name, calls):
        assert [call.job for call in calls] == [0, 1, 2, 3]
        block = blocks[name]
        again = {
            call.job: block(*call.args, **call.kwargs) for call in calls[:2]
        }  # without a pause, changed weights
        for call in calls[:2]:
            assert torch.equal(again[call.job], call.output)
        ended.append(name)
        return {job: partial(torch.zeros_like, output) for job, output in again.items()}

    seen, _, _ = two_paths(model, batches, blocks=blocks, on_block_end=on_block_end)
    assert ended == list(blocks)
    second = seen["model.layers.1.self_attn.q_proj"]
    assert all(
        not second[job].any() for job in (0, 1)
    )  # zeros were put in place of the first block's outputs
    assert all(second[job].any() for job in (2, 3))
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_error_at_block_end_restores_the_model():
    model = tiny_model("llama")
    blocks = {"model.layers.0": model.model.layers[0]}

    def on_block_end(name, calls):
        raise ValueError("stop here")

    with pytest.raises(ValueError, match="stop here"):
        two_paths(model, batches_for(model, 2), blocks=blocks, on_block_end=on_block_end)
    assert all("forward" not in module.__dict__ for module in model.modules())
