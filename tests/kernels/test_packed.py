"""The compiled products against float64, on every instruction set that this machine has."""

import itertools

import pytest
import torch

from fewbit import native
from fewbit.checkpoint import layout
from fewbit.errors import KernelError
from fewbit.kernels.cpu import packed
from fewbit.kernels.cpu.kernel import packed_weight
from fewbit.kernels.cpu.packed import Rounding
from fewbit.kernels.linear import QuantLinear
from fewbit.quantized_matrix import QuantizedMatrix, group_count, sequential_groups
from tiny_gptq import random_codes

pytestmark = pytest.mark.skipif(
    not native.available(), reason=native.unsupported_reason() or "compiled module"
)

BITS = (2, 3, 4, 8)
SHAPES = ((1, 1), (16, 32), (1, 7), (37, 100), (64, 256), (100, 200))
GROUPS = (-1, 32, 24, 7)
# Relative to the sum of the magnitudes of all terms: what rounding x, and y at the end, can cost.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
INT8 = 1.6e-2  # half a step of 127, for x at most three times its mean size in a group


def isas():
    return [isa for isa in native.instruction_sets() if isa != "avx512_bf16"]


def on(isa, *arguments):
    """The product of packed tiles on one instruction set."""
    with native.instruction_set(isa):
        return packed.multiply_tiles(*arguments)


def weight_of(codes, g_idx=None):
    words = layout.pack_rows(codes.codes, codes.bits).t().contiguous()
    return words, packed.pack(words, codes.scales.t(), codes.zeros.t(), codes.g_idx, codes.bits)


def make(out_features, in_features, bits, group_size, *, sym, order):
    groups = group_count(in_features, group_size)
    g_idx = sequential_groups(in_features, group_size)
    zeros = torch.randint(0, 2**bits, (out_features, groups)).short()
    return QuantizedMatrix(
        codes=torch.randint(0, 2**bits, (out_features, in_features), dtype=torch.uint8),
        scales=(torch.rand(out_features, groups) * 0.1 + 0.01).half(),
        zeros=torch.full_like(zeros, 2 ** (bits - 1)) if sym else zeros,
        g_idx=g_idx[torch.randperm(in_features)] if order else g_idx,
        bits=bits,
        group_size=group_size,
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rounding", Rounding)
def test_products_against_float64(bits, group_size, dtype, rounding):
    torch.manual_seed(bits + group_size)
    for (rows, columns), sym, order in itertools.product(SHAPES, (False, True), (False, True)):
        codes = make(rows, columns, bits, group_size, sym=sym, order=order)
        words, weight = weight_of(codes)
        assert torch.equal(packed.unpack(weight, words.shape[0]), words)
        dense = codes.dequantize(torch.float64)
        bias = torch.randn(rows)
        for tokens in (1, 2, 3, 7, 16, 21, 70):
            x = torch.rand(tokens, columns).add(0.3).mul(torch.randn(tokens, columns).sign()).to(dtype)
            truth = x.double() @ dense.t() + bias.double()
            size = x.double().abs() @ dense.abs().t() + bias.double().abs()
            for isa in isas():
                found = on(isa, x, weight, bias, rounding).double()
                error = ((found - truth).abs() / size).max().item()
                assert error < TOLERANCE[dtype] + (INT8 if rounding else 0), (
                    rows,
                    columns,
                    sym,
                    order,
                    tokens,
                    isa,
                )


def rounded_to_int8(x, codes, step):
    """x as every instruction set must round it: per token and `step` inputs of a group, half to even, in float32."""
    x = x.float().clone()
    for group in range(codes.scales.shape[1]):
        for columns in (codes.g_idx == group).nonzero()[:, 0].split(step):
            most = x[:, columns].abs().amax(1, keepdim=True)
            inverse = torch.tensor(127.0) / most  # a plain 127 would multiply with the reciprocal
            x[:, columns] = (x[:, columns] * inverse).round() * (most / 127)
    return x


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [-1, 24])
def test_int8_activations_are_equal_on_all_processors(bits, group_size):
    torch.manual_seed(bits)
    for sym, columns in itertools.product((False, True), (100, 2000)):
        codes, weight, sizes = with_large_sums(bits, group_size, columns, sym)
        for tokens in (1, 6, 45):
            x = torch.randn(tokens, columns)
            x[0] = 1.0
            rounded = rounded_to_int8(x, codes, columns).double()
            truth = rounded @ codes.dequantize(torch.float64).t()
            for isa in isas():
                found = on(isa, x, weight, None, Rounding.INT8).double()
                error = ((found - truth).abs() / (rounded.abs() @ sizes)).max().item()
                # Only "generic" sums in float32.
                assert error < (5e-5 if isa == "generic" else 2e-6), (sym, columns, tokens, isa)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.uint8])  # bits of any number
def test_scales_in_blocks_come_back_bit_for_bit(dtype):
    limits = torch.iinfo(dtype)
    for groups, out_features in itertools.product((1, 3), (1, 16, 37, 48)):
        values = torch.randint(limits.min, limits.max, (groups, out_features)).to(dtype)
        blocks = packed.to_blocks(values)
        assert blocks.shape == (-(-out_features // 16), groups, 16)
        assert blocks.is_contiguous()
        for output in range(out_features):
            assert torch.equal(blocks[output // 16, :, output % 16], values[:, output])
        assert blocks.flatten().count_nonzero() == values.count_nonzero()  # the padding is 0
        assert torch.equal(packed.from_blocks(blocks, out_features), values)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("blocks", [2, 4, 5, 9])
def test_groups_of_blocks_and_a_remainder(bits, blocks):
    torch.manual_seed(bits + blocks)
    for group_size, sym, int8 in itertools.product((-1, 40), (False, True), (False, True)):
        codes = make(16 * blocks - 3, 120, bits, group_size, sym=sym, order=True)
        _, weight = weight_of(codes)
        how = Rounding.INT8 if int8 else Rounding.NONE
        for tokens in (1, 2, 4, 8, 50):
            x = torch.randn(tokens, 120)
            truth = x.double() @ codes.dequantize(torch.float64).t()
            for isa in isas():
                error = (on(isa, x, weight, None, how).double() - truth).norm() / truth.norm()
                assert error < (3e-2 if int8 else 1e-4), (group_size, sym, int8, tokens, isa)


@pytest.mark.skipif("avx512_vnni" not in native.instruction_sets(), reason="no dot products of bytes here")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [-1, 24, 32, 7])
def test_activations_in_fine_steps(bits, group_size):
    torch.manual_seed(bits)
    for sym, columns in itertools.product((False, True), (100, 6000)):
        codes, weight, sizes = with_large_sums(bits, group_size, columns, sym)
        for tokens in (40, 45, 67):
            x = ((torch.randn(tokens, columns) + 0.1) / 64).half()  # so that float16 holds the results
            x[0] = 1 / 64
            rounded = rounded_to_int8(x, codes, 16).double()
            truth = rounded @ codes.dequantize(torch.float64).t()
            found = on("avx512_vnni", x, weight, None, Rounding.FAST_PREFILL).double()
            error = (found - truth).abs() - truth.abs() * 2**-11
            assert (error / (rounded.abs() @ sizes)).max() < 2e-6, (sym, columns, tokens)


@pytest.mark.skipif("amx" not in native.instruction_sets(), reason="no tiles of bfloat16 here")
@pytest.mark.parametrize("bits", BITS)
def test_a_prompt_reads_no_number_of_the_next_token(bits):
    """Also where the inputs do not fill the last tile of the weight, and at the end of x."""
    for columns in (16, 48, 80, 100):
        codes = make(40, columns, bits, -1, sym=True, order=False)
        _, weight = weight_of(codes)
        x = torch.randn(17, columns).bfloat16()
        truth = x.double() @ codes.dequantize(torch.float64).t()
        found = on("amx", x, weight, None, Rounding.NONE)
        assert (found.double() - truth).norm() < 5e-3 * truth.norm(), columns
        x[1::2] = float("nan")
        assert torch.equal(on("amx", x, weight, None, Rounding.NONE)[::2], found[::2]), columns


@pytest.mark.skipif("amx" not in native.instruction_sets(), reason="no tiles of bfloat16 here")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [-1, 24, 64])
def test_weights_of_prompts_are_rounded_once_to_bfloat16(bits, group_size):
    torch.manual_seed(bits)
    for sym, order, (rows, columns) in itertools.product(
        (False, True), (False, True), ((300, 100), (37, 4200), (64, 2048))
    ):
        codes = make(rows, columns, bits, group_size, sym=sym, order=order)
        _, weight = weight_of(codes)
        x = (torch.randn(530, columns) / 64).bfloat16().half()  # so that float16 holds the results
        bias = torch.randn(rows)
        truth = x.double() @ codes.dequantize(torch.bfloat16).double().t() + bias.double()
        found = on("amx", x, weight, bias, Rounding.FAST_PREFILL)
        # float16 results, and weights near a tie
        assert (found.double() - truth).norm() / truth.norm() < 5e-4, (sym, order, rows, columns)
        for tokens in (16, 17, 48):
            assert torch.equal(on("amx", x[:tokens], weight, bias, Rounding.FAST_PREFILL), found[:tokens])


def with_large_sums(bits, group_size, columns, sym):
    """Codes, packed, and float64 (in, out): what the terms of a sum are at most, for x = 1."""
    codes = make(100, columns, bits, group_size, sym=sym, order=True)
    codes.codes[:3] = 2**bits - 1
    groups = codes.g_idx.long()
    sizes = codes.scales.double()[:, groups] * (codes.codes + codes.zeros[:, groups])
    return codes, weight_of(codes)[1], sizes.t()


@pytest.mark.parametrize("bits", BITS)
def test_prefill_rounding_needs_many_16_bit_tokens(bits):
    codes = make(50, 96, bits, 32, sym=True, order=False)
    _, weight = weight_of(codes)
    x = torch.randn(64, 96)

    def same(x, isa="best"):
        rounded, kept = (on(isa, x, weight, None, how) for how in (Rounding.FAST_PREFILL, Rounding.NONE))
        return torch.equal(rounded, kept)

    assert same(x)
    for dtype in (torch.bfloat16, torch.float16):
        assert same(x[:8].to(dtype))
        if "avx512_vnni" in native.instruction_sets():
            assert not same(x.to(dtype), "avx512_vnni")
        if "amx" in native.instruction_sets():  # bfloat16 is what it takes
            assert same(x.to(dtype), "amx") == (dtype is torch.bfloat16)
        assert same(x.to(dtype), "generic")


@pytest.mark.parametrize("bits", BITS)
def test_dequantizing_tiles_is_exact(bits):
    for order, group_size in itertools.product((False, True), GROUPS):
        codes = make(37, 100, bits, group_size, sym=False, order=order)
        _, weight = weight_of(codes)
        parts = (*weight[:5], bits, 100, 37)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            found = torch.ops.fewbit.dequantize_packed(*parts, dtype)
            assert torch.equal(found, codes.dequantize(dtype))


@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_of_every_dtype_and_subnormal_ones(scales):
    codes = make(20, 64, 4, 32, sym=False, order=False)
    _, weight = weight_of(codes)
    tiny = weight._replace(scales=(weight.scales * 1e-5).to(scales).contiguous())
    x = torch.randn(3, 64)
    dense = torch.ops.fewbit.dequantize_packed(*tiny, torch.float32).double()
    truth = x.double() @ dense.t()
    for isa in isas():
        assert (on(isa, x, tiny, None, Rounding.NONE).double() - truth).norm() < 1e-4 * truth.norm()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rounding", Rounding)
def test_a_token_does_not_depend_on_threads_or_other_tokens(bits, rounding, request):
    codes = make(200, 96, bits, 32, sym=False, order=True)
    _, weight = weight_of(codes)
    x = torch.randn(130, 96).bfloat16()
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(packed.multiply(x, weight, None, rounding))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    other = x.clone()
    other[1:] = 7.0
    assert torch.equal(packed.multiply(other, weight, None, rounding)[0], results[0][0])


@pytest.mark.parametrize("rounding", Rounding)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_inputs_stay_visible(rounding, value):
    _, weight = weight_of(make(20, 64, 4, 32, sym=True, order=False))
    x = torch.randn(2, 64)
    x[1, 5] = value
    y = packed.multiply(x, weight, None, rounding)
    assert y[0].isfinite().all()
    assert not y[1].isfinite().any()


def test_gradients_are_those_of_a_dense_layer():
    codes = random_codes(24, 70, 3, 32, order=True)
    layer = QuantLinear.from_codes(codes, torch.randn(24))
    layer.prepare("cpu", trainable=True)
    x = torch.randn(2, 5, 70, requires_grad=True)
    grad = torch.randn(2, 5, 24)
    layer(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ codes.dequantize(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, grad.sum((0, 1)))


def test_training_keeps_16_bit_activations():
    layer = QuantLinear.from_codes(random_codes(32, 64, 4, 32))
    layer.prepare("cpu")
    x = torch.randn(50, 64).bfloat16()
    exact = packed.multiply(x, packed_weight(layer), None, Rounding.NONE)
    y = layer(x.clone().requires_grad_())
    assert torch.equal(y, exact)
    with torch.no_grad():
        assert torch.equal(layer(x.clone().requires_grad_()), layer(x))


def test_wrong_inputs_are_refused():
    _, weight = weight_of(make(20, 64, 4, 32, sym=True, order=False))
    with pytest.raises(
        KernelError, match=r"x is torch.float32 \(2, 63\).*takes float32, float16 or bfloat16"
    ):
        packed.multiply(torch.randn(2, 63), weight, None, Rounding.NONE)
    with pytest.raises(KernelError, match=r"x is torch.float64"):
        packed.multiply(torch.randn(2, 64).double(), weight, None, Rounding.NONE)
    for damaged in (
        weight._replace(tiles=weight.tiles[1:]),
        weight._replace(scales=weight.scales[:, :1].contiguous()),
        weight._replace(out_features=33),
        weight._replace(zeros=weight.zeros.int()),
        weight._replace(starts=weight.starts + 1),
        weight._replace(order=weight.order.new_zeros(5)),
    ):
        with pytest.raises(KernelError, match="not a packed weight"):
            torch.ops.fewbit.linear_packed(torch.randn(2, 64), *damaged, None, Rounding.NONE)
    with pytest.raises(KernelError, match="bias"):
        packed.multiply(torch.randn(2, 64), weight, torch.zeros(19), Rounding.NONE)


def test_no_tokens_and_many_dimensions():
    _, weight = weight_of(make(20, 64, 4, 32, sym=True, order=False))
    assert packed.multiply(torch.randn(0, 64), weight, None, Rounding.NONE).shape == (0, 20)
    x = torch.randn(2, 3, 64)
    assert torch.equal(
        packed.multiply(x, weight, None, Rounding.NONE).view(6, 20),
        packed.multiply(x.view(6, 64), weight, None, Rounding.NONE),
    )
    column_major = torch.randn(64, 5).t()
    assert torch.equal(
        packed.multiply(column_major, weight, None, Rounding.NONE),
        packed.multiply(column_major.contiguous(), weight, None, Rounding.NONE),
    )
