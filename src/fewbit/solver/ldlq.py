"""LDLQ, which is GPTQ: round the columns of W one after the other and let the later ones absorb the error.

Contract: pure functions, tensors in, tensors out, on any device.

With the columns in processing order and H_λ = H + λ I = R Rᵀ, R upper triangular, and F = R diag(R)⁻¹:

    ŵ_i = Q(w_i + Σ_{j<i} (w_j − ŵ_j) F_ji)                       (LDLQ, arXiv:2307.13304, equation 2)

which gives the codes of the inverse-Cholesky form of GPTQ (arXiv:2210.17323) with one factorization
instead of three. The error telescopes: with r_i = (the argument of Q) − ŵ_i,
tr((W − Ŵ) H_λ (W − Ŵ)ᵀ) = Σ_i R_ii² ‖r_i‖², so the loss costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..codes import sequential_groups
from . import native
from .grid import Grid
from .native import Backend

_BLOCK = 128


@dataclass(frozen=True)
class Factor:
    """H_λ = F diag(d) Fᵀ in processing order.

    Attributes:
        perm: int64 (n,), perm[k] is the column that is processed k-th.
        F: float32 (n, n), unit upper triangular. d: float32 (n,), positive.
        added: λ, what was added to diag(H).
    """

    perm: Tensor
    F: Tensor
    d: Tensor
    added: float


@dataclass(frozen=True)
class Sweep:
    """The result for one grid.

    Attributes:
        codes: uint8 (m, n) in the original column order.
        losses: float64 (m,), (w − ŵ) H (w − ŵ)ᵀ of every row w of W.
    """

    codes: Tensor
    losses: Tensor

    @property
    def loss(self) -> float:
        """tr((W − Ŵ) H (W − Ŵ)ᵀ)."""
        return float(self.losses.sum())


def order(diag: Tensor, group_size: int, act_order: str) -> tuple[Tensor, Tensor]:
    """The processing order of the columns, and their groups.

    Args:
        diag: diag(H), (n,).
        group_size: columns in a group, or −1.
        act_order: "none"; "group" (by diag(H) inside each group, groups by their largest, so that groups
            stay consecutive columns); "full" (by diag(H), groups are consecutive columns in this order).

    Returns:
        perm int64 (n,), perm[k] is the column processed k-th; g_idx int32 (n,), the group of each column.
    """
    n = diag.shape[0]
    groups = sequential_groups(n, group_size).to(diag.device)
    if act_order == "none":
        return torch.arange(n, device=diag.device), groups
    descending = torch.argsort(diag, descending=True, stable=True)
    if act_order == "full":
        g_idx = torch.empty_like(groups)
        g_idx[descending] = groups
        return descending, g_idx
    count = int(groups[-1]) + 1
    largest = diag.new_zeros(count).scatter_reduce_(0, groups.long(), diag, "amax")
    rank = torch.empty(count, dtype=torch.long, device=diag.device)
    rank[torch.argsort(largest, descending=True, stable=True)] = torch.arange(count, device=diag.device)
    by_group = torch.argsort(rank[groups.long()[descending]], stable=True)
    return descending[by_group], groups


def factor(H: Tensor, perm: Tensor, damp: float, dtype: torch.dtype = torch.float32) -> Factor | None:
    """Factor H_λ = H + λ I with λ = damp · mean(diag H); None where H_λ is not positive definite.

    Args:
        H: float (n, n), symmetric, in the original column order.
        perm: int64 (n,). damp: as a fraction. dtype: of the factorization.
    """
    added = damp * float(H.diagonal().double().mean())
    backwards = perm.flip(0)
    A = H.index_select(0, backwards).index_select(1, backwards).to(dtype)
    A.diagonal().add_(added)
    # The Cholesky factor of the index-reversed matrix, reversed again, is upper triangular.
    L, info = torch.linalg.cholesky_ex(A)
    del A
    if int(info) != 0 or not bool(torch.isfinite(L.diagonal()).all()):
        return None
    R = L.flip(0, 1)
    diagonal = R.diagonal().clone()
    R.div_(diagonal)
    return Factor(perm, R.float(), diagonal.square().float(), added)


def solve(W: Tensor, factor: Factor, grid: Grid, bits: int, *, backend: Backend = "auto") -> Sweep:
    """Quantize W on the grid.

    Args:
        W: float32 (m, n), finite, original column order.
        factor: of this layer's H. grid: fitted with the groups that `order` returned.

    Returns:
        The codes and the losses. They are measured with H as accumulated: the part of the damping,
        λ ‖w − ŵ‖², is taken off.
    """
    # Transposed throughout: a column of the weight is then contiguous, and so are its scales.
    n, m = W.shape[1], W.shape[0]
    block = _block_for(backend, W)
    scales, zeros = grid.scales.float().T.contiguous(), grid.zeros.float().T.contiguous()
    groups = grid.g_idx[factor.perm].contiguous()
    codes = torch.empty(n, m, dtype=torch.uint8, device=W.device)
    E = torch.empty(n, m, dtype=torch.float32, device=W.device)  # W − Ŵ in processing order
    losses = torch.zeros(m, dtype=torch.float64, device=W.device)
    for a in range(0, n, _BLOCK):
        b = min(a + _BLOCK, n)
        columns = factor.perm[a:b]
        W_block = W.index_select(1, columns).T.contiguous()
        # w_i + Σ_{j<a} (w_j − ŵ_j) F_ji; the rest of the sum follows inside the block.
        T = torch.addmm(W_block, factor.F[:a, a:b].T, E[:a]) if a else W_block.clone()
        F, d = factor.F[a:b, a:b].contiguous(), factor.d[a:b]
        q = torch.empty_like(W_block, dtype=torch.uint8)
        losses += block(W_block, T, F, d, scales, zeros, groups[a:b], bits, q, E[a:b])
        codes[columns] = q
    damping = factor.added * torch.linalg.vector_norm(E, dim=0).double().square()
    return Sweep(codes.T.contiguous(), (losses - damping).clamp_(min=0))


def solve_each(
    W: Tensor, factor: Factor, grids: Sequence[Grid], bits: int, *, backend: Backend = "auto"
) -> list[Sweep]:
    """Quantize W on each of several grids, which have the same groups."""
    if native.use(backend, W):
        return [solve(W, factor, grid, bits, backend=backend) for grid in grids]
    # In torch a column costs the same however many rows there are, on a GPU at least: one sweep for all grids.
    together = Grid(
        torch.cat([grid.scales for grid in grids]), torch.cat([grid.zeros for grid in grids]), grids[0].g_idx
    )
    count = len(grids)
    sweep = solve(W.repeat(count, 1), factor, together, bits, backend=backend)
    parts = zip(sweep.codes.chunk(count), sweep.losses.chunk(count), strict=True)
    return [Sweep(codes, losses) for codes, losses in parts]


def _block_for(backend: Backend, W: Tensor) -> Callable[..., Tensor]:
    """What finishes one block of columns of W. Triton only where it is asked for: nobody has run it on a GPU yet."""
    if native.use(backend, W):
        return native.ldlq_block
    if backend == "triton":
        from . import triton

        return triton.ldlq_block
    return _block


def _block(
    W: Tensor,
    T: Tensor,
    F: Tensor,
    d: Tensor,
    scales: Tensor,
    zeros: Tensor,
    groups: Tensor,
    bits: int,
    codes: Tensor,
    E: Tensor,
) -> Tensor:
    """The torch form of `native.ldlq_block`; T is overwritten."""
    losses = torch.zeros(W.shape[1], dtype=torch.float64, device=W.device)
    levels = 2**bits - 1
    for i, group in enumerate(groups.tolist()):
        s, z = scales[group], zeros[group]
        q = torch.round(T[i] / s).add_(z).clamp_(0, levels)
        w_hat = (q - z) * s
        losses += (T[i] - w_hat).square() * d[i]
        torch.sub(W[i], w_hat, out=E[i])
        codes[i] = q.to(torch.uint8)
        T[i + 1 :].addr_(F[i, i + 1 :], E[i])
    return losses
