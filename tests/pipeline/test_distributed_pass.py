"""Whole walks over several processes: what one process gives, to the last bit, whoever has which batches."""

import pytest
import torch
from torch import nn

import fewbit
from fewbit.kernels.linear import QuantLinear
from fewbit.pipeline.scheduler import LayerInput
from fewbit.pipeline.statistics import BatchMasks, HessianPool, split_holdout
from models import random_sequences, tiny_model, tiny_tokenizer
from moe_models import tiny_moe
from rank_processes import run_ranks


class Block(nn.Module):
    """Two layers that share an input, one after them, and two experts, of which each sequence reaches one."""

    def __init__(self, width):
        super().__init__()
        self.left, self.right = nn.Linear(width, width), nn.Linear(width, width)
        self.down = nn.Linear(width, width)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, h, expert):
        h = whole(self.left(h) + self.right(h))
        h = whole(h + self.down(h))
        return whole(h + self.experts[expert](h))


class IntegerNet(nn.Module):
    """Only integers go from layer to layer: differences in rounding would be forgotten, wrong sums are not."""

    def __init__(self, width=48, blocks=2):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(120, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(blocks))
        self.embedding.weight.data = torch.randint(-4, 5, (120, width), generator=generator).float()
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.data = torch.randn(width, width, generator=generator) / width**0.5
                layer.bias.data.zero_()

    def forward(self, input_ids):
        h = self.embedding(input_ids)
        for block in self.layers:
            h = block(h, int(input_ids[0, 0]) % 2)
        return h


def whole(h):
    return h.round().clamp(-8, 8)


def sequences_by_expert(count, of_expert_0):
    """Equal lengths; those in `of_expert_0` go to expert 0 in every block."""
    sequences = random_sequences(count)
    for number, sequence in enumerate(sequences):
        sequence["input_ids"][0] = 10 if number in of_expert_0 else 11
    return sequences


def quantized(comm, sequences, options):
    """Codes, and what is known of every layer, of an `IntegerNet` quantized by all ranks."""
    config = fewbit.QuantConfig(group_size=16, seq_len=24, **options)
    model = fewbit.quantize(IntegerNet(), config, dataset=sequences)
    report = model.fewbit_report
    codes = {
        name: [tensor.tolist() for tensor in (q.codes, q.scales, q.zeros)]
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear)
        for q in [module.codes()]
    }
    keys = ("tokens", "held_out", "masked", "loss", "true_error", "correction")
    figures = [{key: -1 if layer[key] is None else layer[key] for key in keys} for layer in report.layers]
    return codes, figures, report.ranks, report.notes


UNEVEN, ONE_RANKS, UNUSED, FEW = (7, {0, 1, 2}, 2), (8, {6}, 3), (5, set(range(5)), 2), (2, {0}, 3)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        pytest.param(UNEVEN, {}, id="uneven shares"),
        pytest.param(UNEVEN, {"bits": 3, "sym": False}, id="3 bits, asymmetric"),
        pytest.param(UNEVEN, {"method": "rtn"}, id="round to nearest"),
        pytest.param(ONE_RANKS, {}, id="an expert of one rank"),
        pytest.param(ONE_RANKS, {"fast": True}, id="the same on one path"),
        pytest.param(UNUSED, {}, id="an expert without tokens"),
        pytest.param(FEW, {}, id="more ranks than batches"),
        pytest.param(FEW, {"fast": True}, id="the same on one path, more ranks"),
    ],
)
def test_exact_sums_match_one_process(case, options):
    count, of_expert_0, world = case
    sequences = sequences_by_expert(count, of_expert_0)
    codes, figures, alone, notes = quantized(None, sequences, options)
    assert alone == 1
    results = run_ranks(world, quantized, sequences, options)
    for divided, others, world_size, said in results:
        assert divided == codes
        assert world_size == world
        assert said == notes
        for one, other in zip(figures, others, strict=True):
            assert other == pytest.approx(one, rel=1e-5)


def test_each_row_counts_once():
    _, figures, _, _ = quantized(None, random_sequences(7), {})
    assert {layer["tokens"] for layer in figures[:3]} == {6 * 24}
    assert {layer["held_out"] for layer in figures[:3]} == {24}
    for _, divided, _, _ in run_ranks(3, quantized, random_sequences(7), {}):
        assert [layer["tokens"] for layer in divided] == [layer["tokens"] for layer in figures]


def shared_hessians(comm):
    """Two layers get the same tensors on rank 0; on rank 1 other tensors, or none."""
    layers = [nn.Linear(4, 4) for _ in range(4)]
    pool = HessianPool(comm.share(split_holdout([BatchMasks() for _ in range(2)])), comm=comm)
    x, y = (torch.full((1, 3, 4), float(value)) for value in (1, 2))
    inputs = [x, x, x if comm.is_leader else y, None if comm.is_leader else y]
    hessians = [
        pool.get(str(i), layer, [] if tensor is None else [LayerInput(0, tensor)])
        for i, (layer, tensor) in enumerate(zip(layers, inputs, strict=True))
    ]
    same = [shared is hessians[0] for shared in hessians]
    return same, [(shared.hessian.tokens, float(shared.hessian.matrix()[0, 1])) for shared in hessians]


def test_hessian_is_shared_if_inputs_agree_on_all_ranks():
    for same, sums in run_ranks(2, shared_hessians):
        assert same == [True, True, False, False]
        assert sums == [(6, 6.0), (6, 6.0), (6, 15.0), (3, 12.0)]


def packed(comm, make, sequences, options):
    """Every tensor of the quantized model, as bytes, and what was found out on the way."""
    dtype = options.pop("dtype", torch.float32)
    config = fewbit.QuantConfig(group_size=16, seq_len=24, **options)
    model = fewbit.quantize(make().to(dtype), config, dataset=sequences, tokenizer=tiny_tokenizer())
    tensors = {
        name: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in model.state_dict().items()
    }
    return tensors, [{**layer, "seconds": 0} for layer in model.fewbit_report.layers]


def wide_llama():
    """With rows enough for three processes."""
    return tiny_model("llama", hidden_size=96, intermediate_size=200)


def outliers(model):
    """The model with one channel a thousand times as large as the others."""
    model.get_input_embeddings().weight.data[:, 5] *= 1000
    return model


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("make", "options"),
    [
        pytest.param(wide_llama, {}, id="defaults"),
        pytest.param(wide_llama, {"fast": True, "dtype": torch.bfloat16}, id="one path, bfloat16"),
        pytest.param(wide_llama, {"act_order": "full", "dtype": torch.bfloat16}, id="full order"),
        pytest.param(lambda: outliers(wide_llama()), {"bits": 2, "sym": False}, id="3 bits, asymmetric"),
        pytest.param(wide_llama, {"tune": True, "tune_steps": 6, "bits": 2}, id="tuned"),
        pytest.param(lambda: tiny_moe("mixtral"), {}, id="experts"),
        pytest.param(lambda: tiny_moe("qwen3_moe"), {"dtype": torch.bfloat16}, id="experts, bfloat16"),
    ],
)
def test_bytes_match_one_process(make, options, world, monkeypatch):
    monkeypatch.setattr(
        "fewbit.pipeline.tune_block.TOKENS_PER_STEP", 30
    )  # gradients of up to two batches are summed exactly
    lengths = torch.randint(5, 30, (10,), generator=torch.Generator().manual_seed(0)).tolist()
    sequences = [
        {"input_ids": s["input_ids"][:n]} for s, n in zip(random_sequences(10, 30), lengths, strict=True)
    ]
    alone = packed(None, make, sequences, dict(options))
    assert run_ranks(world, packed, make, sequences, options) == [alone] * world


def test_each_expert_token_counts_once():
    sequences = random_sequences(6)

    def tokens(comm):
        config = fewbit.QuantConfig(group_size=16, seq_len=24)
        model = fewbit.quantize(tiny_moe("mixtral"), config, dataset=sequences, tokenizer=tiny_tokenizer())
        return [(layer["name"], layer["tokens"], layer["held_out"]) for layer in model.fewbit_report.layers]

    first = len(tokens(None)) // 2  # of the later blocks, routes depend on rounding
    for divided in run_ranks(3, tokens):
        assert divided[:first] == tokens(None)[:first]
