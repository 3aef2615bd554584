"""Matrices of one shape, computed with as one: a batch (B, …), so that a GPU is started and waited for once.

Contract: what happens to a matrix in a batch does not depend on the others. A batch of one has the bytes of the matrix
alone: a batched product on a CPU need not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Item = TypeVar("Item")

_BATCH_ELEMENTS = 1 << 28  # of the square matrices in a batch: with what belongs to them a few GB


def in_batches(items: Sequence[Item], n: int) -> Iterator[Sequence[Item]]:
    """As many at a time as matrices (n, n) may be held together."""
    step = max(1, _BATCH_ELEMENTS // (n * n))
    return (items[a : a + step] for a in range(0, len(items), step))


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as a batch; of one it is a view."""
    return parts[0][None] if len(parts) == 1 else torch.stack(list(parts))


def padded(parts: Sequence[Tensor]) -> Tensor:
    """Matrices (rows_i, n) as a batch (B, most rows, n), with rows of zeros below the shorter ones; of one a view."""
    return parts[0][None] if len(parts) == 1 else pad_sequence(list(parts), batch_first=True)


def product(A: Tensor, B: Tensor) -> Tensor:
    """A B for each of a batch: (B, m, k) and (B, k, n)."""
    return (A[0] @ B[0])[None] if len(A) == 1 else torch.bmm(A, B)


def worked(L: Tensor, info: Tensor) -> Tensor:
    """Whether `torch.linalg.cholesky_ex` succeeded, bool, for each of a batch."""
    return (info == 0) & torch.isfinite(L.diagonal(dim1=-2, dim2=-1)).all(-1)


def on_host(tensors: Sequence[Tensor]) -> list[list[float]]:
    """The values of several small tensors on one device: a GPU is waited for once."""
    if not tensors:
        return []
    values = iter(torch.cat([tensor.reshape(-1) for tensor in tensors]).tolist())
    return [[next(values) for _ in range(tensor.numel())] for tensor in tensors]
