"""GPTQ in torch: order the columns, factor the Hessian, round the columns one after the other.

Each column absorbs the rounding errors of the columns before it. With the columns in processing order, λ the damping,
and ŵ_i the i-th column after rounding:

    H_λ = H + λ I = R Rᵀ            R upper triangular: one Cholesky factorization of the reversed matrix
    F = R diag(R)⁻¹,  d = diag(R)²  so H_λ = F diag(d) Fᵀ, F unit upper triangular
    t_i = w_i + Σ_{j<i} (w_j − ŵ_j) F_ji
    ŵ_i = Q(t_i)                    (LDLQ, arXiv:2307.13304, equation 2)

The codes equal the ones of the inverse-Cholesky form in the GPTQ paper (arXiv:2210.17323), with one factorization
instead of three. With E = W − Ŵ the residuals t_i − ŵ_i are the columns of E F, hence

    tr(E H_λ Eᵀ) = Σ_i d_i ‖t_i − ŵ_i‖²

and the loss costs nothing. Contract: pure functions on tensors, on any device. The leading dimension B counts candidate
grids: one weight is rounded on all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..quantized_matrix import group_count, sequential_groups
from .grid import Grid

BLOCK = 128

# What is copied at a time where a whole matrix need not be: rows, elements.
_ROWS, _REVERSED = 128, 1 << 16


@dataclass(frozen=True)
class Factor:
    """H_λ = F diag(d) Fᵀ in processing order.

    Attributes:
        perm: int64 (n,), perm[k] is the column that is processed k-th.
        F: float32 (n, n), unit upper triangular.
        d: float32 (n,), positive.
        added: λ, the number added to diag(H).
    """

    perm: Tensor
    F: Tensor
    d: Tensor
    added: float


def order(diag: Tensor, group_size: int, act_order: str) -> tuple[Tensor, Tensor]:
    """Order the columns, and assign them to groups.

    Args:
        diag: diag(H), (n,).
        group_size: columns in a group, or −1 for one group.
        act_order: "none"; "group" (by diag(H) inside each group, groups by their largest entry, so that groups
            stay consecutive columns); "full" (by diag(H), groups are consecutive columns in this order).

    Returns:
        perm int64 (n,), perm[k] is the column processed k-th; g_idx int32 (n,), the group of each column.
    """
    n = diag.shape[0]
    groups, count = sequential_groups(n, group_size, device=diag.device), group_count(n, group_size)
    if act_order == "none":
        return torch.arange(n, device=diag.device), groups
    descending = torch.argsort(diag, descending=True, stable=True)
    if act_order == "full":
        g_idx = torch.empty_like(groups)
        g_idx[descending] = groups
        return descending, g_idx
    largest = diag.new_zeros(count).scatter_reduce_(0, groups.long(), diag, "amax")
    rank = torch.empty(count, dtype=torch.long, device=diag.device)
    rank[torch.argsort(largest, descending=True, stable=True)] = torch.arange(count, device=diag.device)
    by_group = torch.argsort(rank[groups.long()[descending]], stable=True)
    return descending[by_group], groups


def factor(H: Tensor, perm: Tensor, damp: float, dtype: torch.dtype = torch.float32) -> Factor | None:
    """Factor H_λ = H + λ I with λ = damp · mean(diag H); None where H_λ is not positive definite.

    Args:
        H: float (n, n), symmetric, in the original column order.
        perm: int64 (n,), the processing order.
        damp: a fraction of mean(diag H).
        dtype: the dtype of the factorization.
    """
    added = damp * float(H.diagonal().double().mean())
    # The Cholesky factor of the reversed matrix, reversed again, is upper triangular.
    backwards = perm.flip(0)
    A = torch.empty_like(H, dtype=dtype)
    for a in range(0, len(H), _ROWS):
        A[a : a + _ROWS] = H.index_select(0, backwards[a : a + _ROWS]).index_select(1, backwards)
    A.diagonal().add_(added)
    if not cholesky_(A):
        return None
    _reverse_(A.view(-1))
    R = A.mT  # H_λ = R Rᵀ
    diagonal = R.diagonal().clone()
    R.div_(diagonal)  # F = R diag(R)⁻¹
    return Factor(perm, R.float(), diagonal.square().float(), added)


def cholesky_(A: Tensor) -> bool:
    """Replace a symmetric A (n, n) by Lᵀ with A = L Lᵀ, without a copy; whether that was possible."""
    info = torch.empty((), dtype=torch.int32, device=A.device)
    torch.linalg.cholesky_ex(A.mT, out=(A.mT, info))  # LAPACK stores columns
    return int(info) == 0 and bool(torch.isfinite(A.diagonal()).all())


def _reverse_(flat: Tensor) -> None:
    """Reverse a vector in place."""
    size, half = len(flat), len(flat) // 2
    for a in range(0, half, _REVERSED):
        b = min(a + _REVERSED, half)
        head, tail = flat[a:b].flip(0), flat[size - b : size - a].flip(0)
        flat[a:b], flat[size - b : size - a] = tail, head


def round_block(
    W: Tensor, T: Tensor, F: Tensor, d: Tensor, grid: Grid, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Round one block of k columns on B grids.

    The weight is transposed: row i of every matrix is column i of the weight, contiguous in memory.

    Args:
        W: float32 (k, m), the weights.
        T: float32 (B, k, m), W plus the errors of all earlier blocks; overwritten.
        F: float32 (k, k), this block of F.
        d: float32 (k,), this block of d.
        grid: float32 scales and zeros (B, G, m), int32 g_idx (k,).
        bits: 2, 3, 4 or 8.

    Returns:
        codes uint8 (B, k, m); E = W − Ŵ, float32 (B, k, m); Σ_i d_i (t_i − ŵ_i)² of every row of W, (B, m).
    """
    codes, E = torch.empty_like(T, dtype=torch.uint8), torch.empty_like(T)
    losses = torch.zeros(len(T), W.shape[1], dtype=torch.float64, device=W.device)
    for i, group in enumerate(grid.g_idx.tolist()):
        t, s, z = T[:, i], grid.scales[:, group], grid.zeros[:, group]
        # q = clamp(round(t / s) + z, 0, 2^bits − 1),  ŵ = s (q − z)
        q = torch.round(t / s).add_(z).clamp_(0, 2**bits - 1)
        w_hat = (q - z) * s
        losses += (t - w_hat).square() * d[i]
        codes[:, i] = q.to(torch.uint8)
        E[:, i] = W[i] - w_hat
        # t_l += (w_i − ŵ_i) F_il for every later column l of the block
        T[:, i + 1 :].addcmul_(F[i, i + 1 :, None], E[:, i, None])
    return codes, E, losses


RoundBlock = Callable[[Tensor, Tensor, Tensor, Tensor, Grid, int], tuple[Tensor, Tensor, Tensor]]


def round_columns(
    W: Tensor, factor: Factor, grids: Grid, bits: int, round_block: RoundBlock = round_block
) -> tuple[Tensor, Tensor]:
    """Round W on B grids.

    Args:
        W: float32 (m, n), finite, in the original column order.
        factor: the factorization of the layer's H.
        grids: scales and zeros (B, m, G), and the groups that `order` returned.
        bits: 2, 3, 4 or 8.
        round_block: the loop over the columns of a block; a backend's form of the function above.

    Returns:
        codes uint8 (B, m, n) in the original column order; losses float64 (B, m), (w − ŵ) H (w − ŵ)ᵀ of every row
        w of W, without the part of the damping.
    """
    B, (m, n) = len(grids.scales), W.shape
    scales, zeros = grids.scales.float().mT.contiguous(), grids.zeros.float().mT.contiguous()
    groups = grids.g_idx[factor.perm]
    codes = torch.empty(B, n, m, dtype=torch.uint8, device=W.device)
    E = torch.empty(B, n, m, dtype=torch.float32, device=W.device)  # W − Ŵ in processing order
    losses = torch.zeros(B, m, dtype=torch.float64, device=W.device)
    for a in range(0, n, BLOCK):
        b = min(a + BLOCK, n)
        columns = factor.perm[a:b]
        W_block = W.index_select(1, columns).T.contiguous()
        # t_i = w_i + Σ_{j<a} (w_j − ŵ_j) F_ji; the rest of the sum follows inside the block.
        T = torch.baddbmm(W_block, factor.F[:a, a:b].T.expand(B, -1, -1), E[:, :a])
        F, d = factor.F[a:b, a:b].contiguous(), factor.d[a:b]
        q, E[:, a:b], loss = round_block(W_block, T, F, d, Grid(scales, zeros, groups[a:b]), bits)
        codes[:, columns] = q
        losses += loss
    # tr(E H Eᵀ) = tr(E H_λ Eᵀ) − λ ‖E‖²
    losses -= factor.added * torch.linalg.vector_norm(E, dim=1).double().square()
    return codes.mT, losses.clamp_(min=0)
