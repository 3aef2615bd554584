"""LDLQ, which is GPTQ: round the columns of W one after the other and let the later ones absorb the error.

Contract: pure functions, tensors in, tensors out, on any device.

With the columns in processing order and H_λ = H + λ I = R Rᵀ, R upper triangular, and F = R diag(R)⁻¹:

    ŵ_i = Q(w_i + Σ_{j<i} (w_j − ŵ_j) F_ji)                       (LDLQ, arXiv:2307.13304, equation 2)

which gives the codes of the inverse-Cholesky form of GPTQ (arXiv:2210.17323) with one factorization
instead of three. The error telescopes: with r_i = (the argument of Q) − ŵ_i,
tr((W − Ŵ) H_λ (W − Ŵ)ᵀ) = Σ_i R_ii² ‖r_i‖², so the loss costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import native
from ..native import Backend
from ..quantized_matrix import group_count, sequential_groups
from .backends import path_for
from .batching import in_batches, worked
from .grid import Grid

BLOCK = 128


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
        perm: int64 (n,). damp: as a fraction. dtype: of the factorization.
    """
    added = damp * float(H.diagonal().double().mean())
    A = _backwards(H, perm).to(dtype)
    A.diagonal().add_(added)
    L, info = torch.linalg.cholesky_ex(A)
    del A
    if not bool(worked(L, info)):
        return None
    R, d = _unit_upper(L)
    return Factor(perm, R.float(), d.float(), added)


def factor_all(H: Sequence[Tensor], perm: Sequence[Tensor], damp: float) -> list[Factor | None]:
    """As `factor` in float32 for every H, all of one size, as one batch: a GPU is waited for once."""
    means = torch.stack([h.diagonal().double().mean() for h in H])
    A = torch.stack([_backwards(h, order) for h, order in zip(H, perm, strict=True)])
    A.diagonal(dim1=-2, dim2=-1).add_((damp * means).float()[:, None])
    L, info = torch.linalg.cholesky_ex(A)
    del A
    succeeded, added = torch.stack([worked(L, info).double(), damp * means]).tolist()
    R, d = _unit_upper(L)
    return [
        Factor(perm[i], R[i], d[i], added[i]) if succeeded[i] and math.isfinite(added[i]) else None
        for i in range(len(H))
    ]


def _backwards(H: Tensor, perm: Tensor) -> Tensor:
    """H in processing order, backwards: its Cholesky factor, turned again, is upper triangular."""
    backwards = perm.flip(0)
    return H.index_select(0, backwards).index_select(1, backwards)


def _unit_upper(L: Tensor) -> tuple[Tensor, Tensor]:
    """F and d, from the Cholesky factor of what `_backwards` returns."""
    R = L.flip(-2, -1)
    diagonal = R.diagonal(dim1=-2, dim2=-1).clone()
    R.div_(diagonal[..., None, :])
    return R, diagonal.square()


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
    block = block_for(backend, W)
    scales, zeros = grid.scales.float().T.contiguous(), grid.zeros.float().T.contiguous()
    groups = grid.g_idx[factor.perm].contiguous()
    codes = torch.empty(n, m, dtype=torch.uint8, device=W.device)
    E = torch.empty(n, m, dtype=torch.float32, device=W.device)  # W − Ŵ in processing order
    losses = torch.zeros(m, dtype=torch.float64, device=W.device)
    for a in range(0, n, BLOCK):
        b = min(a + BLOCK, n)
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
    if path_for(backend, W) == "native":
        return [solve(W, factor, grid, bits, backend=backend) for grid in grids]
    # Elsewhere a column costs the same however many rows there are, on a GPU at least: one sweep for all grids.
    sweep = solve(W.repeat(len(grids), 1), factor, _joined(grids), bits, backend=backend)
    return _parted(sweep.codes, sweep.losses, len(grids))


@dataclass(frozen=True)
class Problem:
    """What is swept: W, float32 (m, n), with the factor of its H and several grids with the same groups."""

    W: Tensor
    factor: Factor
    grids: Sequence[Grid]


def solve_all(problems: Sequence[Problem], bits: int, *, backend: Backend = "auto") -> list[list[Sweep]]:
    """As `solve_each` for every problem. With Triton those of one shape are swept as one batch."""
    shapes: dict[tuple[int, ...], list[int]] = {}
    for i, problem in enumerate(problems):
        alone = path_for(backend, problem.W) != "triton"
        shapes.setdefault(
            (i,) if alone else (-1, *problem.W.shape, *problem.grids[0].scales.shape), []
        ).append(i)
    results: list[list[Sweep]] = [[] for _ in problems]
    for members in shapes.values():
        n = problems[members[0]].W.shape[1]
        for some in in_batches(members, n):
            batch = [problems[i] for i in some]
            if len(batch) > 1:
                solved = _solve_batch(batch, bits)
            else:
                solved = [solve_each(p.W, p.factor, p.grids, bits, backend=backend) for p in batch]
            for i, sweeps in zip(some, solved, strict=True):
                results[i] = sweeps
    return results


def _solve_batch(problems: Sequence[Problem], bits: int) -> list[list[Sweep]]:
    """`solve` with one dimension more, for problems of one shape."""
    from . import triton_backend as triton

    count = len(problems[0].grids)
    W = torch.stack([problem.W for problem in problems])
    batch, rows, n = W.shape
    m = count * rows
    perm, F, d = (
        torch.stack([getattr(problem.factor, part) for problem in problems]) for part in ("perm", "F", "d")
    )
    joined = [_joined(problem.grids) for problem in problems]
    scales = torch.stack([grid.scales.float().T for grid in joined])
    zeros = torch.stack([grid.zeros.float().T for grid in joined])
    groups = torch.stack([grid.g_idx for grid in joined]).gather(1, perm)
    codes = torch.empty(batch, n, m, dtype=torch.uint8, device=W.device)
    E = torch.empty(batch, n, m, dtype=torch.float32, device=W.device)
    losses = torch.zeros(batch, m, dtype=torch.float64, device=W.device)
    for a in range(0, n, BLOCK):
        b = min(a + BLOCK, n)
        columns = perm[:, a:b]
        W_block = W.gather(2, columns[:, None].expand(-1, rows, -1)).mT.repeat(1, 1, count)
        T = torch.baddbmm(W_block, F[:, :a, a:b].mT, E[:, :a]) if a else W_block
        q = torch.empty_like(W_block, dtype=torch.uint8)
        F_block, d_block, of_block = (
            part.contiguous() for part in (F[:, a:b, a:b], d[:, a:b], groups[:, a:b])
        )
        losses += triton.round_block(
            W_block, T, F_block, d_block, scales, zeros, of_block, bits, q, E[:, a:b]
        )
        codes.scatter_(1, columns[:, :, None].expand_as(q), q)
    added = torch.tensor([problem.factor.added for problem in problems], dtype=torch.float64).to(W.device)
    damping = added[:, None] * torch.linalg.vector_norm(E, dim=1).double().square()
    losses = (losses - damping).clamp_(min=0)
    return [_parted(q.T.contiguous(), loss, count) for q, loss in zip(codes, losses, strict=True)]


def _joined(grids: Sequence[Grid]) -> Grid:
    """One grid for the rows of all: those of the first one, those of the second one …"""
    return Grid(
        torch.cat([grid.scales for grid in grids]), torch.cat([grid.zeros for grid in grids]), grids[0].g_idx
    )


def _parted(codes: Tensor, losses: Tensor, count: int) -> list[Sweep]:
    """The rows of `count` grids apart."""
    return [Sweep(*part) for part in zip(codes.chunk(count), losses.chunk(count), strict=True)]


def block_for(backend: Backend, W: Tensor) -> Callable[..., Tensor]:
    """What finishes one block of columns of W."""
    path = path_for(backend, W)
    if path == "triton":
        from . import triton_backend as triton

        return triton.round_block
    return native.round_block if path == "native" else torch_block


def torch_block(
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
    """The torch form of `native.round_block`; T is overwritten."""
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
