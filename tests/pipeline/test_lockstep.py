"""The walk against a slow, separate, obvious implementation that replays the whole model for every layer."""

from functools import partial

import pytest
import torch
from torch import nn

from fewbit.config import QuantConfig
from fewbit.gptq import quantize_weight
from fewbit.modeling.layers import input_rows, set_weight_matrix, weight_matrix
from fewbit.pipeline.scheduler import walk
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
    """True-sequential GPTQ: for each layer run everything again, collect its inputs, quantize it, go on."""
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
        codes[name] = quantize_weight(W, hessian, CONFIG.defaults).codes
        set_weight_matrix(module, codes[name].dequantize(W.dtype))
    return codes


def lockstep(model, batches):
    """The same with the walk; also counts how often each layer's own forward ran."""
    layers = {layer.name: model.get_submodule(layer.name) for layer in make_plan(model, CONFIG).layers}
    codes = {}

    def meet(name, arrivals):
        module = layers[name]
        hessian = hessian_of([input_rows(module, arrival.x) for arrival in arrivals])
        W = weight_matrix(module)
        codes[name] = quantize_weight(W, hessian, CONFIG.defaults).codes
        set_weight_matrix(module, codes[name].dequantize(W.dtype))

    with torch.no_grad():
        traffic = walk(layers, [lambda b=b: model(**b, use_cache=False) for b in batches], meet)
    return codes, traffic


@pytest.mark.parametrize("family", FAMILIES)
def test_matches_full_replay(family):
    slow_model, fast_model = tiny_model(family), tiny_model(family)
    batches = batches_for(slow_model)
    expected = replay(slow_model, batches)
    codes, traffic = lockstep(fast_model, batches)
    assert list(codes) == list(expected)
    assert traffic.unreached == []
    assert not traffic.late
    for name, want in expected.items():
        assert torch.equal(codes[name].codes, want.codes), name
        assert torch.equal(codes[name].scales, want.scales), name
    for (name, a), (_, b) in zip(slow_model.named_parameters(), fast_model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("family", ["llama", "bloom", "t5"])
def test_every_batch_goes_through_every_layer_once(family):
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


def test_walk_restores_forwards_and_ends_before_the_head():
    model = tiny_model("llama")
    ran = []
    model.lm_head.register_forward_pre_hook(lambda *_: ran.append(1))
    batches = batches_for(model)
    lockstep(model, batches)
    assert ran == []
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert model(**batches[0]).logits.shape == (1, 24, model.config.vocab_size)


class Choosy(nn.Module):
    """Each input takes its own way: odd first tokens skip `a`; `last` is used twice."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x):
        a, b, last, never = self.blocks
        if x[0, 0] > 0:
            x = a(x)
        x = last(b(x))
        return last(x) if x.shape[0] < 100 else never(x)


def choosy_walk(inputs):
    model = Choosy()
    met = {}
    layers = {f"blocks.{i}": m for i, m in enumerate(model.blocks)}
    with torch.no_grad():
        traffic = walk(
            layers,
            [lambda x=x: model(x) for x in inputs],
            lambda name, arrivals: met.setdefault(name, [a.job for a in arrivals]),
        )
    return met, traffic


def test_batches_that_skip_a_layer_wait_for_the_others():
    inputs = [torch.full((3, 8), v) for v in (1.0, -1.0, 1.0)]
    met, traffic = choosy_walk(inputs)
    assert met == {"blocks.0": [0, 2], "blocks.1": [0, 1, 2], "blocks.2": [0, 1, 2]}
    assert traffic.met == ["blocks.0", "blocks.1", "blocks.2"]
    assert traffic.late == {"blocks.2": 3}
    assert traffic.unreached == ["blocks.3"]


def test_an_error_in_a_job_ends_the_walk_and_restores_the_model():
    model = Choosy()
    layers = {f"blocks.{i}": m for i, m in enumerate(model.blocks)}
    inputs = [torch.ones(3, 8), torch.ones(3, 9)]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), torch.no_grad():
        walk(layers, [lambda x=x: model(x) for x in inputs], lambda name, arrivals: None)
    assert all("forward" not in module.__dict__ for module in model.blocks)
    assert torch.is_grad_enabled()


def test_an_error_in_meet_ends_the_walk_and_keeps_an_earlier_forward():
    model = Choosy()

    def own(x):
        return nn.functional.linear(x, model.blocks[0].weight)

    model.blocks[0].forward = own

    def meet(name, arrivals):
        raise ValueError("stop here")

    layers = {f"blocks.{i}": m for i, m in enumerate(model.blocks)}
    with pytest.raises(ValueError, match="stop here"):
        walk(layers, [lambda: model(torch.ones(3, 8))], meet)
    assert model.blocks[0].forward is own


def two_streams(model, batches, **options):
    """Quantize with a full-precision stream beside; returns what reached each layer in both streams."""
    layers = {layer.name: model.get_submodule(layer.name) for layer in make_plan(model, CONFIG).layers}
    seen = {}
    n = len(batches)

    def meet(name, arrivals):
        seen[name] = {arrival.job: arrival.x.clone() for arrival in arrivals}
        module = layers[name]
        hessian = hessian_of([input_rows(module, arrival.x) for arrival in arrivals[:n]])
        W = weight_matrix(module)
        set_weight_matrix(module, quantize_weight(W, hessian, CONFIG.defaults).codes.dequantize(W.dtype))

    jobs = [lambda b=b: model(**b, use_cache=False) for b in [*batches, *batches]]
    with torch.no_grad():
        traffic = walk(layers, jobs, meet, references=range(n, 2 * n), **options)
    return seen, traffic, layers


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "t5"])
def test_references_see_the_unchanged_model_and_the_others_the_changed_one(family):
    model = tiny_model(family)
    batches = batches_for(model, 2)
    seen, traffic, layers = two_streams(model, batches)
    original = tiny_model(family)
    for stream, whole in ((0, model), (len(batches), original)):
        for name in layers:
            inputs = []
            module = whole.get_submodule(name)
            hook = module.register_forward_pre_hook(lambda m, args, to=inputs: to.append(args[0]))
            with torch.no_grad():
                for batch in batches:
                    whole(**batch, use_cache=False)
            hook.remove()
            for job, x in enumerate(inputs):
                assert torch.equal(seen[name][stream + job], x), (name, stream)
    assert traffic.unreached == []


def test_the_end_of_a_block_hands_over_its_passages_and_takes_new_outputs():
    model = tiny_model("llama")
    batches = batches_for(model, 2)
    blocks = {f"model.layers.{i}": block for i, block in enumerate(model.model.layers)}
    left = []

    def leave(name, passages):
        assert [p.job for p in passages] == [0, 1, 2, 3]
        block = blocks[name]
        again = {p.job: block(*p.args, **p.kwargs) for p in passages[:2]}  # without a pause, changed weights
        for passage in passages[:2]:
            assert torch.equal(again[passage.job], passage.output)
        left.append(name)
        return {job: partial(torch.zeros_like, output) for job, output in again.items()}

    seen, _, _ = two_streams(model, batches, blocks=blocks, leave=leave)
    assert left == list(blocks)
    second = seen["model.layers.1.self_attn.q_proj"]
    assert all(
        not second[job].any() for job in (0, 1)
    )  # zeros were put in place of the first block's outputs
    assert all(second[job].any() for job in (2, 3))
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_an_error_at_the_end_of_a_block_ends_the_walk_and_restores_the_model():
    model = tiny_model("llama")
    blocks = {"model.layers.0": model.model.layers[0]}

    def leave(name, passages):
        raise ValueError("stop here")

    with pytest.raises(ValueError, match="stop here"):
        two_streams(model, batches_for(model, 2), blocks=blocks, leave=leave)
    assert all("forward" not in module.__dict__ for module in model.modules())
