"""Codes ↔ the packed tensors of a GPTQ layer. Knows nothing of files, names or configurations.

A packed axis is one little-endian bit stream: value ``i`` occupies bits ``bits·i … bits·i + bits − 1``
and every 32 bits are one int32. So 8 values always fill `bits` whole bytes, which is how both directions
work here, for every width, in eight passes over the data and without wide intermediates. At 2, 4 and
8 bits a value never straddles two words; at 3 bits values 10 and 21 of every 32 do.

A layer of shape (out, in) with G groups is stored as

- ``qweight`` int32 (words(in), out), codes packed along the inputs;
- ``qzeros`` int32 (G, words(out)), zero points packed along the outputs, less one in format "gptq";
- ``scales`` (G, out), float16 or bfloat16;
- ``g_idx`` int32 (in,), the group of each input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from ..config import FORMATS
from ..errors import CheckpointError
from ..quantized_matrix import QuantizedMatrix, group_count, sequential_groups

QWEIGHT, QZEROS, SCALES, G_IDX = PARTS = ("qweight", "qzeros", "scales", "g_idx")

# One in every field of a word: what format "gptq" takes off, seen as an operation on whole words.
_ONE_IN_EACH_FIELD = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def word_count(values: int, bits: int) -> int:
    """Words that `values` packed values take; the last are padded: at 3 bits, words come in threes."""
    return -(-values // 32) * 3 if bits == 3 else -(-values * bits // 32)


def pack(codes: QuantizedMatrix, fmt: str) -> dict[str, Tensor]:
    """The four tensors of a layer by their short names, as stored in format `fmt`.

    Widths that do not fill their last word are padded with zero bits. The result is on the codes' device.

    Raises:
        CheckpointError: a code or a zero point has no representation in this format. In "gptq" (v1)
            that includes zero point 0: what is stored is zero − 1, and tools disagree about −1.
    """
    _check_format(fmt)
    _check_range("code", codes.codes, 0, codes.bits, fmt)
    return {
        QWEIGHT: pack_rows(codes.codes, codes.bits).t().contiguous(),
        QZEROS: pack_zeros(codes.zeros, codes.bits, fmt),
        SCALES: codes.scales.t().contiguous(),
        G_IDX: codes.g_idx.to(torch.int32).contiguous(),
    }


def unpack(
    tensors: Mapping[str, Tensor], bits: int, group_size: int, fmt: str, in_features: int, out_features: int
) -> QuantizedMatrix:
    """Inverse of `pack`; also takes layers without ``g_idx`` and with other writers' padding.

    Zero points come out as 0 … 2^bits − 1. See `unpack_zeros` for what is read where zero − 1 was −1.

    Raises:
        CheckpointError: a tensor is missing, has a wrong dtype or shape, or g_idx leaves its range.
    """
    _check_format(fmt)
    groups = group_count(in_features, group_size)
    problems = shape_problems(tensors, bits, groups, in_features, out_features)
    if problems:
        raise CheckpointError("; ".join(problems))
    g_idx = tensors.get(G_IDX)
    if g_idx is None:
        g_idx = sequential_groups(in_features, group_size).to(tensors[QWEIGHT].device)
    else:
        check_groups(g_idx, groups)
    return QuantizedMatrix(
        codes=unpack_rows(tensors[QWEIGHT].t().contiguous(), bits, in_features),
        scales=tensors[SCALES].t().contiguous(),
        zeros=unpack_zeros(tensors[QZEROS], bits, fmt, out_features).t().contiguous(),
        g_idx=g_idx.to(torch.int32),
        bits=bits,
        group_size=group_size,
    )


def empty_layer(bits: int, group_size: int, in_features: int, out_features: int) -> dict[str, Tensor]:
    """Return the four tensors that `pack` makes, on the meta device: their dtypes and shapes."""
    groups = group_count(in_features, group_size)
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        QWEIGHT: (torch.int32, (word_count(in_features, bits), out_features)),
        QZEROS: (torch.int32, (groups, word_count(out_features, bits))),
        SCALES: (torch.float16, (groups, out_features)),
        G_IDX: (torch.int32, (in_features,)),
    }
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in shapes.items()}


def check_groups(g_idx: Tensor, groups: int) -> None:
    """Raises CheckpointError if any input belongs to a group that there is not."""
    if g_idx.numel() and (int(g_idx.min()) < 0 or int(g_idx.max()) >= groups):
        found = f"{int(g_idx.min())} … {int(g_idx.max())}"
        raise CheckpointError(f"g_idx holds {found}; with {groups} groups 0 … {groups - 1} are valid")


def without_zero_point_0(codes: QuantizedMatrix) -> QuantizedMatrix:
    """The same weight without zero points of 0, which format "gptq" cannot say.

    Where zero = 0 the grid is turned round: ``s·q = −s·((M − q) − M)`` with M = 2^bits − 1. Exact.
    """
    turned = codes.zeros == 0
    if not turned.any():
        return codes
    largest = 2**codes.bits - 1
    turned_codes = turned.index_select(1, codes.g_idx.long())
    return dataclasses.replace(
        codes,
        codes=torch.where(turned_codes, largest - codes.codes, codes.codes),
        zeros=torch.where(turned, largest, codes.zeros).to(torch.int16),
        scales=torch.where(turned, -codes.scales, codes.scales),
    )


class Shaped(Protocol):
    """A tensor, or a description of one in a file."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


def shape_problems(
    tensors: Mapping[str, Shaped], bits: int, groups: int, in_features: int, out_features: int
) -> list[str]:
    """What keeps `tensors` from being a layer of this shape, in words; empty if nothing does.

    A packed axis has as many words as its values need, or as a multiple of 32 values would: with more
    leeway, tensors of another bit width would pass for padded ones. The other axes must fit exactly.
    """
    problems = [f"{name} is missing" for name in (QWEIGHT, QZEROS, SCALES) if name not in tensors]
    integers, floats = (torch.int32,), (torch.float16, torch.bfloat16, torch.float32)
    rows, columns = _least_words(in_features, bits), _least_words(out_features, bits)
    padded_rows, padded_columns = _padded_words(in_features, bits), _padded_words(out_features, bits)
    expected: dict[str, tuple[tuple[torch.dtype, ...], list[tuple[int, ...]]]] = {
        QWEIGHT: (integers, [(rows, out_features), (padded_rows, out_features)]),
        QZEROS: (integers, [(groups, columns), (groups, padded_columns)]),
        SCALES: (floats, [(groups, out_features)]),
        G_IDX: ((torch.int32, torch.int64), [(in_features,)]),
    }
    for name, (dtypes, shapes) in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if tensor.dtype not in dtypes:
            problems.append(
                f"{name} is {_dtype_name(tensor.dtype)}, not {' or '.join(map(_dtype_name, dtypes))}"
            )
        if tuple(tensor.shape) not in shapes:
            wanted = " or padded ".join(map(str, dict.fromkeys(shapes)))
            problems.append(f"{name} has shape {tuple(tensor.shape)}, expected {wanted}")
    return problems


def pack_zeros(zeros: Tensor, bits: int, fmt: str) -> Tensor:
    """``qzeros`` int32 (G, words) from zero points (out, G).

    Raises:
        CheckpointError: a zero point has no representation in this format, see `pack`.
    """
    lowest = 1 if fmt == "gptq" else 0
    _check_range("zero point", zeros, lowest, bits, fmt)
    return pack_rows((zeros - lowest).to(torch.uint8).t().contiguous(), bits)


def unpack_zeros(qzeros: Tensor, bits: int, fmt: str, out_features: int) -> Tensor:
    """Zero points int16 (G, out) in 0 … 2^bits − 1 from ``qzeros`` int32 (G, words).

    Format "gptq" stores zero − 1. Some writers subtract at 2, 4 and 8 bits from whole words, so that
    zero point 0 borrows from the fields above it; adding back to whole words undoes that exactly and is
    the same as field by field wherever nothing was borrowed. At 3 bits those writers wrap in the field.
    """
    if fmt == "gptq" and bits != 3:
        qzeros = qzeros + _ONE_IN_EACH_FIELD[bits]
    zeros = unpack_rows(qzeros, bits, out_features).to(torch.int16)
    return (zeros + 1) & 7 if fmt == "gptq" and bits == 3 else zeros


def pack_rows(values: Tensor, bits: int) -> Tensor:
    """Pack each row: uint8 (rows, n) with values below 2^bits → int32 (rows, word_count(n, bits))."""
    rows, n = values.shape
    words = word_count(n, bits)
    width = words * 32 // bits
    if words == 0:
        return torch.zeros((rows, 0), dtype=torch.int32, device=values.device)
    values = torch.nn.functional.pad(values, (0, width - n))
    if bits == 8:
        return _as_words(values, rows)
    eights = values.reshape(rows, width // 8, 8)
    packed = torch.zeros((rows, width // 8, bits), dtype=torch.uint8, device=values.device)
    for i in range(8):
        byte, shift = divmod(bits * i, 8)
        packed[..., byte] |= eights[..., i] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= eights[..., i] >> (8 - shift)
    return _as_words(packed, rows)


def unpack_rows(words: Tensor, bits: int, n: int) -> Tensor:
    """Inverse of `pack_rows`: int32 (rows, ≥ words) → uint8 (rows, n)."""
    rows = words.shape[0]
    if words.shape[1] == 0:
        return torch.zeros((rows, 0), dtype=torch.uint8, device=words.device)
    stream = words.reshape(-1).view(torch.uint8).reshape(rows, -1)
    if bits == 8:
        return stream[:, :n].contiguous()
    packed = torch.nn.functional.pad(stream, (0, -stream.shape[1] % bits)).reshape(rows, -1, bits)
    eights = torch.empty((rows, packed.shape[1], 8), dtype=torch.uint8, device=words.device)
    for i in range(8):
        byte, shift = divmod(bits * i, 8)
        value = packed[..., byte] >> shift
        if shift + bits > 8:
            value |= packed[..., byte + 1] << (8 - shift)
        eights[..., i] = value & (2**bits - 1)
    return eights.reshape(rows, -1)[:, :n].contiguous()


def _as_words(stream: Tensor, rows: int) -> Tensor:
    """Bytes as int32 words. Through one dimension: a single column has strides that a 2-D view refuses."""
    return stream.reshape(-1).view(torch.int32).reshape(rows, -1)


def _least_words(values: int, bits: int) -> int:
    """Like `word_count`, but without the threes that some 3-bit writers leave out."""
    return -(-values * bits // 32)


def _padded_words(values: int, bits: int) -> int:
    """Words of writers that pad the values to a multiple of 32."""
    return -(-values // 32) * bits


def _check_format(fmt: str) -> None:
    if fmt not in FORMATS:
        raise CheckpointError(f"checkpoint format {fmt!r} is not known; use one of {', '.join(FORMATS)}")


def _check_range(what: str, values: Tensor, lowest: int, bits: int, fmt: str) -> None:
    if not values.numel():
        return
    low, high = int(values.min()), int(values.max())
    if low >= lowest and high < 2**bits:
        return
    message = f"{what}s {low} … {high} do not fit {bits} bits in format {fmt!r} ({lowest} … {2**bits - 1})"
    if what == "zero point" and low == 0 and fmt == "gptq":
        message += "; this format stores zero - 1 and readers disagree about -1: use format 'gptq_v2'"
    raise CheckpointError(message)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
