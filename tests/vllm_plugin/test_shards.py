"""Parts of quantized layers for engines: every cut and every join gives the rows and columns of the whole weight."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint_samples
from fewbit.checkpoint import layout
from fewbit.errors import CheckpointError
from fewbit.kernels.cpu import packed
from fewbit.vllm_plugin import shards

BITS = (2, 3, 4, 8)


def random_codes(bits, group_size, shape, act_order=False, seed=0, low=0):
    codes = checkpoint_samples.random_codes(*shape, bits, group_size, low, seed)
    if not act_order:
        return codes
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(seed))
    return replace(codes, g_idx=codes.g_idx[order])


def read(codes, fmt="gptq_v2", without=(), formats=None):
    tensors = {name: t for name, t in layout.pack(codes, fmt).items() if name not in without}
    formats = formats or [(codes.bits, codes.group_size)]
    return shards.read(tensors, formats, fmt, codes.shape[1], "layer.q_proj")


def weight(shard):
    """The weight (out, in) in float32, decoded from the packed tiles."""
    tensors = shard.pack()
    return torch.ops.fewbit.dequantize_packed(*tensors, torch.float32)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from((16, 32, -1)),
    act_order=st.booleans(),
    inputs=st.tuples(st.integers(0, 95), st.integers(1, 96)),
    rows=st.lists(st.integers(0, 39), min_size=1, max_size=40),
)
def test_any_outputs_and_inputs_are_those_of_the_whole_weight(bits, group_size, act_order, inputs, rows):
    codes = random_codes(bits, group_size, (40, 96), act_order=act_order, seed=bits)
    first, last = inputs[0], min(96, inputs[0] + inputs[1])
    part = read(codes).outputs(torch.tensor(rows)).inputs(first, last)
    assert torch.equal(weight(part), codes.dequantize()[rows][:, first:last])


@pytest.mark.parametrize("fmt", ["gptq", "gptq_v2"])
def test_both_formats_are_read(fmt):
    codes = random_codes(4, 32, (48, 64), low=1)
    assert torch.equal(weight(read(codes, fmt)), codes.dequantize())


def test_a_missing_g_idx_means_consecutive_groups():
    codes = random_codes(3, 32, (48, 64))
    assert torch.equal(weight(read(codes, without=("g_idx",))), codes.dequantize())


def test_equal_settings_become_one_product_and_others_do_not():
    q, k, v = (random_codes(bits, 32, (32, 64), seed=n) for n, bits in enumerate((4, 4, 8)))
    joined = shards.merge([read(q), read(k), read(v)])
    assert [shard.bits for shard in joined] == [4, 8]
    found = torch.cat([weight(shard) for shard in joined])
    assert torch.equal(found, torch.cat([part.dequantize() for part in (q, k, v)]))


def test_layers_with_other_orders_of_inputs_are_not_merged():
    parts = [random_codes(4, 32, (32, 64), act_order=True, seed=seed) for seed in (1, 2)]
    assert len(shards.merge([read(part) for part in parts])) == 2


def test_the_shapes_decide_among_the_settings_of_a_merged_layer():
    codes = random_codes(3, 32, (32, 64))
    found = read(codes, formats=[(2, 32), (3, 64), (3, 32), (8, 32)])
    assert found.bits == 3
    assert torch.equal(weight(found), codes.dequantize())


def test_an_unquantized_part_is_cut_in_the_same_way():
    dense = torch.randn(8, 16)
    part = shards.read({"weight": dense}, [], "gptq", 16, "layer.k_proj").outputs(torch.tensor([3, 1]))
    assert torch.equal(part.inputs(4, 8).weight, dense[[3, 1], 4:8])


def test_tensors_that_fit_no_settings_are_refused_with_the_layers_name():
    with pytest.raises(
        CheckpointError, match=r"layer\.q_proj: the tensors .*8 bits in groups of 32: qweight has"
    ):
        read(random_codes(4, 32, (32, 64)), formats=[(8, 32)])


def test_a_group_that_does_not_exist_is_refused():
    codes = random_codes(4, 32, (32, 64))
    tensors = layout.pack(codes, "gptq_v2") | {"g_idx": torch.full((64,), 2, dtype=torch.int32)}
    with pytest.raises(CheckpointError, match="g_idx holds 2 … 2"):
        shards.read(tensors, [(4, 32)], "gptq_v2", 64, "layer")


def test_a_kept_tensor_is_a_copy_and_only_dense_weights_change_their_dtype():
    scales, dense = torch.ones(2, dtype=torch.float16), torch.ones(2, dtype=torch.bfloat16)
    kept = shards.kept("scales", scales, torch.float32)
    scales.zero_()
    assert kept.dtype == torch.float16
    assert kept.tolist() == [1, 1]
    assert shards.kept("weight", dense, torch.float32).dtype == torch.float32


def test_a_packed_shard_multiplies_like_the_layer():
    codes = random_codes(2, 32, (32, 64))
    x = torch.randn(3, 64)
    y = packed.multiply(x, read(codes).pack(), None, packed.Rounding.NONE)
    torch.testing.assert_close(y, x @ codes.dequantize().t(), rtol=1e-3, atol=1e-3)
