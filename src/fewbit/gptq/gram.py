"""The products that make a Hessian: Xᵀ X of one batch, rounded and added to integers.

Contract: on any device; deterministic for one device and batch. `hessian` defines the units.

Each batch is multiplied with itself once, and the product is rounded once. The factors are x_i 2¹⁵ / s_i, which differ
from x_i in the exponent only. In float32 (CPU) and on the tensor cores of an NVIDIA GPU, products of 16-bit inputs are
exact: two significands of 8 bits (bfloat16) or 11 bits (float16) give at most 22 bits, and sums are float32. Values
that leave bfloat16's exponent range are below 2⁻¹¹¹ of a unit. float16 has too few exponents for the division, so
there the float32 sums are divided instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import native

ONE = 2.0**30  # units in s_i s_j
ROOT = 2.0**15  # units in s_i

# Copies of a batch are made in pieces of this many bytes; on tensor cores, which need none in float32, in larger ones.
_PIECE_BYTES = 1 << 26
_LARGE_PIECE_BYTES = 1 << 29

# Rows of H that one product computes. On the CPU they must still be in the cache when they are rounded. A GPU needs few
# large products: six panels of whole tiles skip 41% of a symmetric product.
_PANEL_ROWS = 192
_PANELS = 6
_TILE = 128


def on_tensor_cores(X: Tensor) -> bool:
    """Whether products of X are exact on the tensor cores, and torch has the operator: on NVIDIA's."""
    is_short = X.dtype in (torch.bfloat16, torch.float16)
    return is_short and X.device.type == "cuda" and torch.version.hip is None


def pieces(X: Tensor) -> Iterator[Tensor]:
    """X (tokens, n), some rows at a time, as float32 where the tensor cores cannot take it as it is."""
    if not on_tensor_cores(X):
        return _float_pieces(X)
    step = max(1, _LARGE_PIECE_BYTES // (X.element_size() * X.shape[1]))
    return (X[a : a + step] for a in range(0, X.shape[0], step))


def _float_pieces(X: Tensor) -> Iterator[Tensor]:
    """X (tokens, n) as float32, some rows at a time."""
    step = max(1, _PIECE_BYTES // (4 * X.shape[1]))
    return (X[a : a + step].float() for a in range(0, X.shape[0], step))


def sum_of_squares(X: Tensor) -> Tensor:
    """Σ x_i² over the rows of X (tokens, n), float32 (n,)."""
    if on_tensor_cores(X):  # in one reading of it
        norms: Tensor = torch.linalg.vector_norm(X, dim=0, dtype=torch.float32)
        return norms.square()
    if (
        type(X) is Tensor
        and X.is_cpu
        and X.dtype in native.DTYPES
        and X.is_contiguous()
        and native.available()
    ):
        return native.sum_of_squares(X)
    # As a product with ones: on a CPU a sum over rows is several times slower.
    sums = (X.new_ones(1, len(X)) @ X.square() for X in _float_pieces(X))
    return sum(sums, X.new_zeros(1, X.shape[1]).float())[0]


@dataclass(frozen=True)
class Scaled:
    """A factor of a product.

    Attributes:
        values: (tokens, n), float32, or 16 bits where the tensor cores take them.
        after: powers of two (n,) that the product is still to be multiplied by; None: there are none.
    """

    values: Tensor
    after: Tensor | None


def scaled(X: Tensor, powers: Tensor) -> Scaled:
    """Multiply the columns of X by powers of two, which changes only the exponents."""
    if X.dtype == torch.float16:
        return Scaled(X, powers)
    return Scaled(X * powers.to(X.dtype), None)


def add_rounded(C: Tensor, A: Scaled, B: Scaled, *, upper: bool) -> None:
    """C += Aᵀ B rounded, or no more than is needed of its upper triangle.

    Args:
        C: int32 (n, n).
    """
    n = C.shape[0]
    step = panel_rows(n, C.device)
    products = torch.empty(min(step, n) * n, dtype=torch.float32, device=C.device)
    rounded = torch.empty_like(products, dtype=torch.int32)
    for a in range(0, n, step):
        first = a if upper else 0
        part = C[a : a + step, first:]
        product, integers = (flat[: part.numel()].view(part.shape) for flat in (products, rounded))
        _multiply(A.values[:, a : a + step].T, B.values[:, first:], product)
        if A.after is not None:
            product.mul_(A.after[a : a + step, None])
        if B.after is not None:
            product.mul_(B.after[first:])
        part.add_(integers.copy_(product.round_()))


def panel_rows(n: int, device: torch.device) -> int:
    """Rows of an n × n product that are computed together."""
    if device.type == "cpu":
        return _PANEL_ROWS
    return max(_PANEL_ROWS, -(-n // (_PANELS * _TILE)) * _TILE)


def _multiply(A: Tensor, B: Tensor, product: Tensor) -> None:
    """product = A B, summed in float32: full float32, or 16-bit factors on the tensor cores."""
    if A.dtype == torch.float32:
        torch.mm(A, B, out=product)
    else:
        torch.ops.aten.mm.dtype_out(A, B, torch.float32, out=product)
