"""Tokens in an expert's Hessian, against sums in float64."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fewbit.modeling.experts import Route, unfuse, unfused_modules
from fewbit.pipeline.expert_calibration import TOKENS_PER_FEATURE, ExpertCalibration, _evenly_spaced, copied
from fewbit.pipeline.scheduler import Hooks, Scheduler
from fewbit.pipeline.statistics import BatchMasks, HessianPool, split_holdout
from models import random_sequences
from moe_models import EXPERTS, HIDDEN, UNDER_ROUTED, UNREACHED, tiny_moe

WANTED = TOKENS_PER_FEATURE * HIDDEN
LENGTH = 30


def batches(padded):
    ids = [torch.stack([s["input_ids"] for s in random_sequences(3, LENGTH, seed)]) for seed in range(4)]
    masks = [torch.ones_like(x) for x in ids]
    if padded:
        masks[1][0, :9] = 0
        masks[2][2, :20] = 0
    return [{"input_ids": x, "attention_mask": mask} for x, mask in zip(ids, masks, strict=True)]


def expert_layers(model):
    return {
        f"{name}.{layer}": child
        for name, module in unfused_modules(model).items()
        for layer, child in module.named_modules()
        if isinstance(child, nn.Linear)
    }


def what_experts_see(model, data):
    """Module of experts → for each batch (hidden states, the router's choice)."""
    seen = {name: [] for name in unfused_modules(model)}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[:2]))
        for name, module in unfused_modules(model).items()
    ]
    with torch.no_grad():
        logits = [model(**batch).logits for batch in data]
    for handle in handles:
        handle.remove()
    return seen, logits


def tokens_of(expert, choices, counted):
    """Routed and borrowed tokens of each batch: the definition, written out."""
    routed, others = [], []
    for b, (choice, counts) in enumerate(zip(choices, counted, strict=True)):
        mine = (choice == expert).any(1)
        routed += [(b, t) for t in range(len(choice)) if mine[t] and counts[t]]
        others += [(b, t) for t in range(len(choice)) if not mine[t] and counts[t]]
    missing = min(max(0, WANTED - len(routed)), len(others))
    return routed, [others[i * len(others) // missing] for i in range(missing)]


def collected(model, data, masks, references=0, before=None):
    """Layer → what the pool made of it."""
    routing = ExpertCalibration(model, masks)
    pool = HessianPool(masks, expert_rows=routing.rows)
    layers = expert_layers(model)
    made = {}
    logits = {}

    def on_layer(name, inputs):
        if name in routing.points:
            routing.on_routing(name, inputs)
            return
        if before is not None:
            before(name, inputs, routing)
        if name in layers:
            shared = pool.get(name, layers[name], inputs)
            input_error = shared.hessian.input_error()
            made[name] = SimpleNamespace(
                H=shared.hessian.matrix().clone(),
                C=None if input_error is None else input_error.clone(),
                tokens=shared.hessian.tokens,
                borrowed=shared.borrowed,
                masked=shared.masked,
                holdout=shared.holdout,
            )

    def job(number):
        def run():
            logits[number] = model(**data[number % len(data)], use_cache=False).logits

        return run

    first = {"model.layers.0.self_attn.o_proj": model.get_submodule("model.layers.0.self_attn.o_proj")}
    count = len(data) + references
    last = {"lm_head": model.lm_head}
    with torch.no_grad():
        points = routing.with_points({**first, **layers, **last})
        jobs = [job(i) for i in range(count)]
        Scheduler(points, jobs, Hooks(on_layer), references=range(len(data), count)).run()
    return made, logits


@pytest.mark.parametrize("padded", [False, True])
def test_under_routed_experts_borrow_tokens(padded):
    model, data = tiny_moe("qwen3_moe"), batches(padded)
    unfuse(model)
    seen, _ = what_experts_see(model, data)
    made, _ = collected(model, data, [BatchMasks.of(batch) for batch in data])
    counted = [batch["attention_mask"].bool().reshape(-1) for batch in data]
    counts = {}
    for name, inputs in seen.items():
        for e in range(EXPERTS):
            routed, borrowed = tokens_of(e, [choice for _, choice in inputs], counted)
            X = torch.stack([inputs[b][0][t] for b, t in routed + borrowed])
            expert = unfused_modules(model)[name].get_submodule(str(e))
            h = nn.functional.silu(X @ expert.gate_proj.weight.T) * (X @ expert.up_proj.weight.T)
            for layer, rows in (("gate_proj", X), ("up_proj", X), ("down_proj", h)):
                one = made[f"{name}.{e}.{layer}"]
                assert (one.tokens - one.borrowed, one.borrowed) == (len(routed), len(borrowed))
                H = rows.detach().double().T @ rows.detach().double()
                torch.testing.assert_close(one.H.double(), H, rtol=1e-4, atol=1e-4)
            counts[e] = len(borrowed)
            if padded and e == 0:
                assert made[f"{name}.{e}.gate_proj"].masked > 0
    assert counts[0] == 0
    assert 0 < counts[UNDER_ROUTED] < counts[UNREACHED] == WANTED


def test_experts_run_the_same_rows_on_both_paths():
    model, data = tiny_moe("qwen3_moe"), batches(padded=True)
    unfuse(model)
    original, expected = what_experts_see(model, data)
    N, pairs = len(data), 0

    def before(name, inputs, routing):
        nonlocal pairs
        if name.endswith("o_proj"):
            module = model.get_submodule(name)
            module.weight = nn.Parameter(module.weight * 3)
        if name.endswith(".gate_proj"):
            full = {given.job - N: given.x for given in inputs if given.job >= N}
            for given in (given for given in inputs if given.job < N):
                rows = routing.rows(name, given.job)
                hidden = original[name.rsplit(".", 2)[0]][given.job][0]
                assert rows.paired
                torch.testing.assert_close(full[given.job][: len(rows.tokens)], hidden[rows.tokens])
                assert not torch.allclose(given.x, hidden[rows.tokens])
                pairs += len(rows.tokens)

    masks = split_holdout([BatchMasks.of(batch) for batch in data])
    made, logits = collected(model, data, masks, references=N, before=before)
    assert pairs > 0
    for i in range(N - 1):  # the pass ends at the last layer: not every job runs to its end
        if N + i in logits:
            torch.testing.assert_close(logits[N + i], expected[i])
    seen, _ = what_experts_see(model, data)  # through the changed layer
    name, inputs = next(iter(seen.items()))
    counted = [batch["attention_mask"].bool().reshape(-1) for batch in data]
    for batch, mask in zip(masks, counted, strict=True):
        held = batch.held_out_rows(len(mask))
        mask &= ~held if held is not None else mask
    for e in range(EXPERTS):
        routed, borrowed = tokens_of(e, [choice for _, choice in inputs], counted)
        X = torch.stack([inputs[b][0][t] for b, t in routed + borrowed]).double()
        full = torch.stack([original[name][b][0][t] for b, t in routed + borrowed]).double()
        one = made[f"{name}.{e}.up_proj"]
        torch.testing.assert_close(one.C.double(), (full - X).T @ X, rtol=1e-3, atol=1e-3)
    assert made[f"{name}.0.up_proj"].holdout.tokens > 0


def test_evenly_spaced_tokens_do_not_depend_on_shares():
    for total, wanted in ((10, 3), (100, 99), (7, 7), (1000, 1)):
        whole = _evenly_spaced(wanted, total, 0, total)
        assert whole.tolist() == [i * total // wanted for i in range(wanted)]
        cuts = [0, total // 3, total // 3, total // 2, total]
        shares = [_evenly_spaced(wanted, total, a, b - a) + a for a, b in pairwise(cuts)]
        assert torch.cat(shares).tolist() == whole.tolist()
    assert len(_evenly_spaced(0, 10, 0, 10)) == 0


def test_no_routing_points_without_experts():
    layer = nn.Linear(2, 2)
    routing = ExpertCalibration(nn.Sequential(layer), [])
    assert routing.points == {}
    assert routing.with_points({"0": layer}) == {"0": layer}
    assert routing.rows("0", 0) is None


def test_copied_routes_are_equal():
    made = []

    def copy(tensor):
        made.append(tensor.clone())
        return made[-1]

    routes = [
        Route(torch.tensor([3, 5]), torch.tensor([0, 1])),
        Route(torch.tensor([], dtype=torch.int64), torch.tensor([], dtype=torch.int64)),
        Route(torch.tensor([1, 2, 7]), torch.tensor([1, 0]), torch.tensor([0, 2])),
    ]
    copies = copied(routes, copy)
    assert len(made) == 3
    for route, other in zip(routes, copies, strict=True):
        assert torch.equal(route.tokens, other.tokens)
        assert torch.equal(route.slots, other.slots)
        assert (route.routed is None) == (other.routed is None)
        assert torch.equal(route.chosen, other.chosen)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_decides_the_same_routes():
    def decided(device):
        model = tiny_moe("mixtral")
        unfuse(model)
        model.to(device)
        routing = ExpertCalibration(model, [BatchMasks.of(batch) for batch in batches(padded=True)])
        name, point = next(iter(routing.points.items()))
        choices = [torch.arange(3 * LENGTH * 2, device=device).reshape(-1, 2) % EXPERTS for _ in range(4)]
        routing.on_routing(name, [SimpleNamespace(job=job, x=choice) for job, choice in enumerate(choices)])
        return [route for choice in choices for route in point(choice)]

    for one, other in zip(decided("cpu"), decided("cuda"), strict=True):
        assert other.tokens.is_cuda
        assert torch.equal(one.tokens, other.tokens.cpu())
        assert torch.equal(one.chosen, other.chosen.cpu())
