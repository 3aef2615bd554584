"""The layout that the Triton kernels read: codes in the order in which tensor cores take them.

Inputs are held in *positions*: group by group, each group padded to a multiple of 16, so that 16 neighboring positions
share a scale. A *block* is eight rows of words for 32 outputs. The halves of each word hold codes of neighboring
positions: bits ``b·j`` … of the lower half belong to position ``16·j + 2·row``, the same bits of the upper half to the
next position. One shift and one mask therefore give a pair of 16-bit numbers, which is one register of a matrix
instruction. At 3 bits a unit is three words: each holds five pairs, and their top bits hold the sixteenth.

The 256 words of a block (of each of the three at 3 bits) lie in the order in which the threads of a warp hold them: a
thread loads four at once, a warp 512 bytes. `pack` and `unpack` are exact inverses, in plain torch, on any device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

TILE = 32  # outputs of a block
_ROWS = 8


class Fragments(NamedTuple):
    """A weight as the kernels read it, in fragments of matrix instructions.

    Attributes:
        words: int32 (output tiles, blocks, words of a unit, 256).
        zeros: uint8 (groups, out).
        order: int32 (positions,), the input at each position, `in_features` for padding; empty where position i is
            input i and all later positions are padding.
        group: positions per group, a multiple of 16; 0 if there is only one group.
    """

    words: Tensor
    zeros: Tensor
    order: Tensor
    group: int


def pairs_in_unit(bits: int) -> int:
    """Pairs of codes in a word, in three words at 3 bits."""
    return 16 if bits == 3 else 16 // bits


def words_in_unit(bits: int) -> int:
    """1, or 3 at 3 bits."""
    return 3 if bits == 3 else 1


def positions(g_idx: Tensor, group_size: int, groups: int) -> Tensor:
    """Where the inputs go: `order` of `Fragments`.

    Args:
        g_idx: (in,) the group of each input. Groups of different sizes are all padded to the largest.
        group_size: −1 is one group.
    """
    g_idx = g_idx.long().cpu()
    in_features = g_idx.numel()
    counts = torch.bincount(g_idx, minlength=groups)
    inputs = torch.argsort(g_idx, stable=True)
    group = _sixteens(int(counts.max()))
    of = g_idx[inputs]
    position = of * group + torch.arange(in_features) - (counts.cumsum(0) - counts)[of]
    same, regular = torch.arange(in_features), groups == 1 or group == _sixteens(group_size)
    if regular and torch.equal(inputs, same) and torch.equal(position, same):
        return torch.empty(0, dtype=torch.int32)
    order = torch.full((groups * group,), in_features, dtype=torch.int32)
    order[position] = inputs.int()
    return order


def group_of(order: Tensor, groups: int, group_size: int) -> int:
    """`group` of `Fragments`."""
    if order.numel():
        return order.numel() // groups
    return 0 if groups == 1 else _sixteens(group_size)


def _sixteens(inputs: int) -> int:
    return -(-inputs // 16) * 16


def pack(codes: Tensor, bits: int, order: Tensor) -> Tensor:
    """`words` of `Fragments` from codes uint8 (out, in) and `order`, on the codes' device."""
    if order.numel():
        codes = functional.pad(codes, (0, 1)).index_select(1, order.to(codes.device))
    out_features, length = codes.shape
    pairs = pairs_in_unit(bits)
    codes = functional.pad(codes, (0, -length % (16 * pairs), 0, -out_features % TILE))
    # (tile, n / 8, n % 8, block, pair, row / 4, row % 4, half) → the indices of a word, then the indices inside it.
    split = codes.view(-1, 4, _ROWS, codes.shape[1] // (16 * pairs), pairs, 2, 4, 2)
    placed = split.permute(0, 3, 5, 2, 6, 1, 4, 7)
    words = torch.zeros((words_in_unit(bits), *placed.shape[:6]), dtype=torch.int32, device=codes.device)
    for pair in range(pairs):
        both = placed[..., pair, 0].int() | (placed[..., pair, 1].int() << 16)
        for word, shift, before in _pieces(bits, pair):
            words[word] |= ((both >> before) & _both(_width(bits, pair))) << shift
    return (
        words.permute(1, 2, 0, 3, 4, 5, 6).reshape(*placed.shape[:2], words_in_unit(bits), 256).contiguous()
    )


def unpack(words: Tensor, bits: int, order: Tensor, out_features: int, in_features: int) -> Tensor:
    """Inverse of `pack`: codes uint8 (out, in)."""
    tiles, blocks, planes, _ = words.shape
    pairs = pairs_in_unit(bits)
    placed = words.view(tiles, blocks, planes, 2, _ROWS, 4, 4)
    codes = torch.zeros((tiles, 4, _ROWS, blocks, pairs, 2, 4, 2), dtype=torch.uint8, device=words.device)
    for pair in range(pairs):
        both = torch.zeros_like(placed[:, :, 0])
        for word, shift, before in _pieces(bits, pair):
            both |= ((placed[:, :, word] >> shift) & _both(_width(bits, pair))) << before
        for half in (0, 1):
            code = (both >> (16 * half)).to(torch.uint8) & ((1 << bits) - 1)
            codes[:, :, :, :, pair, :, :, half] = code.permute(0, 5, 3, 1, 2, 4)
    found = codes.view(tiles * TILE, -1)[:out_features]
    if not order.numel():
        return found[:, :in_features].contiguous()
    result = found.new_empty((out_features, in_features + 1))
    result.index_copy_(1, order.long().to(found.device), found[:, : order.numel()])
    return result[:, :in_features].contiguous()


def _width(bits: int, pair: int) -> int:
    """Bits of a code that are stored next to each other."""
    return 1 if bits == 3 and pair == 15 else bits


def _both(width: int) -> int:
    """Mask of `width` bits in both halves."""
    return ((1 << width) - 1) * 0x10001


def _pieces(bits: int, pair: int) -> list[tuple[int, int, int]]:
    """(word, bit in the half, bits of the code that come before it) of each piece of a pair."""
    if bits != 3:
        return [(0, bits * pair, 0)]
    if pair < 15:
        return [(pair // 5, 3 * (pair % 5), 0)]
    return [(word, 15, word) for word in range(3)]
