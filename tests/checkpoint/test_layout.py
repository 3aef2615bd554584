"""The packed layout against an oracle that knows only the table in docs/formats.md, bit by bit."""

from __future__ import annotations

import pytest
import torch

from fewbit.checkpoint.layout import (
    pack,
    pack_rows,
    pack_zeros,
    unpack,
    unpack_rows,
    unpack_zeros,
    without_zero_point_0,
    word_count,
)
from fewbit.errors import CheckpointError
from fewbit.quantized_matrix import QuantizedMatrix, group_count, sequential_groups

BITS = (2, 3, 4, 8)
WIDTHS = (1, 2, 7, 31, 32, 33, 63, 96, 100)


def place_3bit(i: int) -> list[tuple[int, int, int]]:
    """(word, shift, bit of the value) of each bit of value i, from the format's table."""
    base, j = 3 * (i // 32), i % 32
    if j == 10:
        return [(base, 30, 0), (base, 31, 1), (base + 1, 0, 2)]
    if j == 21:
        return [(base + 1, 31, 0), (base + 2, 0, 1), (base + 2, 1, 2)]
    word, first, offset = (0, 0, 0) if j < 10 else (1, 11, 1) if j < 21 else (2, 22, 2)
    return [(base + word, offset + 3 * (j - first) + bit, bit) for bit in range(3)]


def place(i: int, bits: int) -> list[tuple[int, int, int]]:
    if bits == 3:
        return place_3bit(i)
    per_word = 32 // bits
    return [(i // per_word, bits * (i % per_word) + bit, bit) for bit in range(bits)]


def oracle_words(values: list[int], bits: int) -> list[int]:
    words = [0] * word_count(len(values), bits)
    for i, value in enumerate(values):
        for word, shift, bit in place(i, bits):
            words[word] |= (value >> bit & 1) << shift
    return [word - 2**32 if word >= 2**31 else word for word in words]


def random_codes(
    out: int, n: int, bits: int, group_size: int, low: int = 1, seed: int = 0
) -> QuantizedMatrix:
    generator = torch.Generator().manual_seed(seed)
    groups = group_count(n, group_size)
    return QuantizedMatrix(
        codes=torch.randint(0, 2**bits, (out, n), dtype=torch.uint8, generator=generator),
        scales=torch.rand(out, groups, generator=generator).add(0.01).half(),
        zeros=torch.randint(low, 2**bits, (out, groups), dtype=torch.int16, generator=generator),
        g_idx=sequential_groups(n, group_size),
        bits=bits,
        group_size=group_size,
    )


def assert_same(a: QuantizedMatrix, b: QuantizedMatrix) -> None:
    for part in ("codes", "scales", "zeros", "g_idx"):
        assert getattr(a, part).dtype == getattr(b, part).dtype, part
        assert torch.equal(getattr(a, part), getattr(b, part)), part


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", WIDTHS)
def test_packing_equals_the_oracle_bit_by_bit(bits: int, n: int) -> None:
    values = torch.randint(0, 2**bits, (3, n), dtype=torch.uint8)
    words = pack_rows(values, bits)
    assert words.dtype == torch.int32
    assert words.tolist() == [oracle_words(row, bits) for row in values.tolist()]
    assert torch.equal(unpack_rows(words, bits, n), values)


def test_three_bit_words_written_out_by_hand() -> None:
    # Values 0…31 are 1, 2, …, 7, 0, 1, … (i + 1 mod 8): written as octal digits, last value first,
    # they are the 96 bits themselves.
    stream = int("0" + "76543210" * 3 + "7654321", 8)
    values = torch.tensor([[(i + 1) % 8 for i in range(32)]], dtype=torch.uint8)
    expected = [stream >> 32 * word & 0xFFFFFFFF for word in range(3)]
    assert [word & 0xFFFFFFFF for word in pack_rows(values, 3)[0].tolist()] == expected
    # Value 10 alone: low two bits at the top of word 0, high bit at the bottom of word 1. Likewise 21.
    for index, words in ((10, [0xC0000000, 0x00000001, 0]), (21, [0, 0x80000000, 0x00000003])):
        single = torch.zeros((1, 32), dtype=torch.uint8)
        single[0, index] = 7
        assert [word & 0xFFFFFFFF for word in pack_rows(single, 3)[0].tolist()] == words


def test_four_bit_word_written_out_by_hand() -> None:
    values = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.uint8)
    assert pack_rows(values, 4)[0].item() & 0xFFFFFFFF == 0x87654321


@pytest.mark.parametrize("fmt", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("out", "n", "group_size"),
    [(1, 32, 32), (64, 96, 32), (5, 70, 32), (33, 1, -1), (3, 64, 128), (1, 8, -1), (1, 1, 32), (4, 4, 4)],
)
def test_layers_survive_the_round_trip(fmt: str, bits: int, out: int, n: int, group_size: int) -> None:
    codes = random_codes(out, n, bits, group_size, low=1 if fmt == "gptq" else 0)
    tensors = pack(codes, fmt)
    groups = group_count(n, group_size)
    assert tensors["qweight"].shape == (word_count(n, bits), out)
    assert tensors["qzeros"].shape == (groups, word_count(out, bits))
    assert tensors["scales"].shape == (groups, out)
    assert tensors["g_idx"].dtype == torch.int32
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert_same(unpack(tensors, bits, group_size, fmt, n, out), codes)


def test_shapes_without_padding() -> None:
    tensors = pack(random_codes(64, 128, 3, 32), "gptq")
    assert tensors["qweight"].shape == (128 * 3 // 32, 64)
    assert tensors["qzeros"].shape == (4, 64 * 3 // 32)


def test_v1_stores_zero_minus_one_and_v2_zero() -> None:
    codes = random_codes(8, 32, 4, 32)
    v1 = unpack_rows(pack(codes, "gptq")["qzeros"], 4, 8)
    v2 = unpack_rows(pack(codes, "gptq_v2")["qzeros"], 4, 8)
    assert torch.equal(v1.to(torch.int16) + 1, codes.zeros.t())
    assert torch.equal(v2.to(torch.int16), codes.zeros.t())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_v1_zeros_subtracted_from_whole_words(bits: int) -> None:
    zeros = torch.randint(0, 2**bits, (6, 64), dtype=torch.uint8)
    zeros[0] = 0
    ones = sum(1 << bits * i for i in range(32 // bits))
    words = pack_rows(zeros, bits) - ones
    assert torch.equal(unpack_zeros(words, bits, "gptq", 64), zeros.to(torch.int16))


def test_v1_three_bit_zeros_wrapped_in_their_field() -> None:
    zeros = torch.randint(0, 8, (6, 64), dtype=torch.uint8)
    words = pack_rows((zeros - 1) & 7, 3)
    assert torch.equal(unpack_zeros(words, 3, "gptq", 64), zeros.to(torch.int16))


def test_three_bit_words_not_in_threes() -> None:
    codes = random_codes(40, 40, 3, 40)
    tensors = pack(codes, "gptq")
    shortest = -(-40 * 3 // 32)
    tensors["qweight"] = tensors["qweight"][:shortest].contiguous()
    tensors["qzeros"] = tensors["qzeros"][:, :shortest].contiguous()
    assert_same(unpack(tensors, 3, 40, "gptq", 40, 40), codes)


def test_missing_or_int64_g_idx_and_bfloat16_scales() -> None:
    codes = random_codes(8, 64, 4, 32)
    tensors = pack(codes, "gptq")
    del tensors["g_idx"]
    assert_same(unpack(tensors, 4, 32, "gptq", 64, 8), codes)
    tensors["g_idx"] = codes.g_idx.long()
    tensors["scales"] = tensors["scales"].bfloat16()
    read = unpack(tensors, 4, 32, "gptq", 64, 8)
    assert read.g_idx.dtype == torch.int32
    assert read.scales.dtype == torch.bfloat16


@pytest.mark.parametrize("bits", BITS)
def test_reversing_groups_keeps_the_weights(bits: int) -> None:
    codes = random_codes(16, 64, bits, 16, low=0)
    codes.zeros[::2] = 0
    turned = without_zero_point_0(codes)
    assert int(turned.zeros.min()) >= 1
    assert torch.equal(turned.dequantize(), codes.dequantize())
    pack(turned, "gptq")


def test_zero_point_0_is_refused_in_v1_with_advice() -> None:
    codes = random_codes(8, 32, 4, 32)
    codes.zeros[0, 0] = 0
    with pytest.raises(CheckpointError, match="readers disagree about -1: use format 'gptq_v2'"):
        pack(codes, "gptq")
    pack(codes, "gptq_v2")


def test_values_out_of_range_are_refused() -> None:
    codes = random_codes(8, 32, 4, 32)
    codes.codes[0, 0] = 16
    with pytest.raises(CheckpointError, match=r"codes 0 … 16 do not fit 4 bits"):
        pack(codes, "gptq")
    with pytest.raises(CheckpointError, match=r"zero points 16 … 16 do not fit 4 bits"):
        pack_zeros(torch.tensor([[16]], dtype=torch.int16), 4, "gptq")
    with pytest.raises(CheckpointError, match="format 'marlin' is not known"):
        pack(codes, "marlin")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("qzeros"), "qzeros is missing"),
        (lambda t: t.update(qweight=t["qweight"][:-1]), r"qweight has shape \(7, 8\), expected \(8, 8\)"),
        (lambda t: t.update(qweight=t["qweight"].float()), "qweight is float32, not int32"),
        (lambda t: t.update(scales=t["scales"][:1]), r"scales has shape \(1, 8\), expected \(2, 8\)"),
        (lambda t: t.update(scales=t["scales"].int()), "scales is int32, not float16 or"),
        (lambda t: t.update(g_idx=t["g_idx"] + 1), r"g_idx holds 1 … 2; with 2 groups 0 … 1 are valid"),
        (lambda t: t.update(g_idx=t["g_idx"] - 1), r"g_idx holds -1 … 0"),
        (lambda t: t.update(g_idx=t["g_idx"][:-1]), r"g_idx has shape \(63,\)"),
    ],
)
def test_damaged_layers_are_refused_with_what_is_wrong(change, message: str) -> None:
    tensors = pack(random_codes(8, 64, 4, 32), "gptq")
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        unpack(tensors, 4, 32, "gptq", 64, 8)


@pytest.mark.parametrize("read_as", BITS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("out", "n"), [(8, 64), (64, 96), (33, 40)])
def test_another_bit_width_never_passes_as_padding(bits: int, read_as: int, out: int, n: int) -> None:
    tensors = pack(random_codes(out, n, bits, 32), "gptq_v2")
    if bits == read_as:
        unpack(tensors, bits, 32, "gptq_v2", n, out)
        return
    with pytest.raises(CheckpointError, match="qweight has shape"):
        unpack(tensors, read_as, 32, "gptq_v2", n, out)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", [1, 17, 40, 70])
def test_padding_up_to_32_values_is_accepted(bits: int, n: int) -> None:
    codes = random_codes(n, n, bits, 32)
    tensors = pack(codes, "gptq_v2")
    words = -(-n // 32) * bits
    more = words - word_count(n, bits)
    tensors["qweight"] = torch.nn.functional.pad(tensors["qweight"], (0, 0, 0, more))
    tensors["qzeros"] = torch.nn.functional.pad(tensors["qzeros"], (0, more))
    assert_same(unpack(tensors, bits, 32, "gptq_v2", n, n), codes)
    tensors["qweight"] = torch.nn.functional.pad(tensors["qweight"], (0, 0, 0, 1))
    with pytest.raises(CheckpointError, match=rf"qweight has shape \({words + 1}, {n}\), expected"):
        unpack(tensors, bits, 32, "gptq_v2", n, n)
