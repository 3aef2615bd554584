"""Feedback between outputs: rows absorb the errors of rows that were rounded before them.

The layer's loss tr(E H Eᵀ) with E = Ŵ − T counts all outputs alike. The model's loss does not: with g the gradient of
the log-likelihood with respect to the layer's output, a small error adds the mean of ½ (gᵀ E x)² to the KL divergence.
Taking g and x as independent (K-FAC, arXiv:1503.05671), that is proportional to tr(G E H Eᵀ) with G = Σ g gᵀ. With

    G + λI = L D Lᵀ     D block diagonal in chunks of outputs, L lower triangular with the identity in these blocks

it is Σ_k tr(D_k E'_k H E'_kᵀ) with E'_k = E_k + Σ_{l>k} L_lkᵀ E_l. So the chunks are rounded from the last to the
first, and chunk k is rounded to T_k − Σ_{l>k} L_lkᵀ E_l: feedback across outputs as in YAQA (arXiv:2505.22988), beside
the feedback across inputs that is GPTQ.

G is kept in equal blocks of at most `LARGEST_BLOCK` consecutive outputs. Blocks are independent: chunk k of all blocks
is rounded at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SolverError
from .grid import Grid
from .round_rows import ROW_MULTIPLE, Rounded, rows_of, to_row_multiple

LARGEST_BLOCK = 1024  # outputs in a block of G
CHUNK = 8  # outputs that are rounded at once, and ignore each other's errors

# λ as a fraction of the mean of a block's diagonal, without zeros. Chosen by measurement: docs/accuracy.md.
DAMP = 1.0


@dataclass(frozen=True)
class OutputFactor:
    """G + λI = L D Lᵀ of every block.

    Attributes:
        rows: int64 (blocks, size), the outputs of each block in ascending order of the diagonal of G; numbers beyond
            the layer's last output fill the last block.
        L: float32 (blocks, size, size), in this order.
    """

    rows: Tensor
    L: Tensor


RoundRows = Callable[[Tensor, Grid], Rounded]


def block_size(outputs: int) -> int:
    """Outputs in a block of G, a whole multiple of `ROW_MULTIPLE`: some blocks then give the bytes of the whole."""
    blocks = -(-outputs // LARGEST_BLOCK)
    return -(-outputs // (blocks * ROW_MULTIPLE)) * ROW_MULTIPLE


def hessian_bytes(outputs: int) -> int:
    """Bytes of G."""
    size = block_size(outputs)
    return 4 * size * size * -(-outputs // size)


def feedback_bytes(outputs: int, inputs: int, solver: int) -> int:
    """Bytes that the feedback adds to solving a layer, which takes `solver` bytes without it.

    G, L and E are kept; a block is factored, in float64, before rows are rounded.
    """
    size = block_size(outputs)
    blocks = -(-outputs // size)
    kept = 8 * blocks * size * size + 4 * blocks * size * inputs
    return kept + max(0, 32 * size * size - solver)


def output_blocks(g: Tensor) -> Tensor:
    """Σ g gᵀ of some tokens, in blocks: float32 (blocks, size, size) from g (tokens, outputs)."""
    size = block_size(g.shape[1])
    padded = torch.nn.functional.pad(g.float(), (0, -g.shape[1] % size))
    return torch.stack([block.T @ block for block in torch.split(padded, size, dim=1)])


def factor_outputs(G: Tensor) -> OutputFactor:
    """Factor G (blocks, size, size) in float64.

    Raises:
        SolverError: G is not positive semidefinite, or not finite.
    """
    orders, factors = zip(*map(_factor_block, G), strict=True)
    first = torch.arange(len(G), device=G.device)[:, None] * G.shape[1]
    return OutputFactor(torch.stack(orders) + first, torch.stack(factors))


def _factor_block(G: Tensor) -> tuple[Tensor, Tensor]:
    """The order of the outputs of a block, and its L."""
    diagonal = G.diagonal().double()
    order = torch.argsort(diagonal, stable=True)
    used = diagonal > 0
    added = DAMP * float(diagonal[used].mean()) if bool(used.any()) else 1.0
    A = G.double()[order][:, order]
    A.diagonal().add_(added)
    C, info = torch.linalg.cholesky_ex(A)
    if int(info):
        raise SolverError(
            "the Hessian of the outputs is damaged: remove OUT/.fewbit/output_hessians.safetensors"
        )
    chunk = torch.arange(len(G), device=G.device) // CHUNK
    roots = C * (chunk[:, None] == chunk)  # D = roots rootsᵀ
    return order, torch.linalg.solve_triangular(roots, C, upper=False, left=False).float()


def round_with_feedback(T: Tensor, grid: Grid, factor: OutputFactor, round_rows: RoundRows) -> Rounded:
    """Round all rows of T (m, n); the losses belong to the shifted targets."""
    (m, n), (blocks, size), g_idx = T.shape, factor.rows.shape, grid.g_idx.long()
    E = T.new_zeros(blocks, size, n)  # Ŵ − T, in the order of factor.rows
    parts: list[tuple[Tensor, ...]] = []
    for a in reversed(range(0, size, CHUNK)):
        b = a + CHUNK
        rows = factor.rows[:, a:b].flatten()
        inside = rows < m
        rows = rows[inside]
        if len(rows) == 0:
            continue
        # T_k − Σ_{l>k} L_lkᵀ E_l
        shifts = torch.cat([L[b:, a:b].T @ later[b:] for L, later in zip(factor.L, E, strict=True)])
        targets, some = T[rows] - shifts[inside], rows_of(grid, rows)
        padded = to_row_multiple(torch.arange(len(rows), device=T.device))
        codes, scales, losses = (
            part[: len(rows)] for part in round_rows(targets[padded], rows_of(some, padded))
        )
        W_hat = (codes.float() - some.zeros.float()[:, g_idx]) * scales.float()[:, g_idx]
        chunk = T.new_zeros(blocks * CHUNK, n)
        chunk[inside] = W_hat - T[rows]
        E[:, a:b] = chunk.view(blocks, CHUNK, n)
        parts.append((rows, codes, scales, losses))
    rows, codes, scales, losses = map(torch.cat, zip(*parts, strict=True))
    order = torch.argsort(rows)
    return Rounded(codes[order], scales[order], losses[order])
