"""The slow truth about the solver, in float64, column by column, straight from the formulas."""

from __future__ import annotations

import torch
from torch import Tensor


def hessian(X: Tensor) -> Tensor:
    """H = X Xᵀ, tokens being the rows of the argument."""
    return X.double().T @ X.double()


def damped(H: Tensor, damp: float) -> Tensor:
    """H_λ = H + λ I, λ = damp · mean(diag H)."""
    return H.double() + damp * H.double().diagonal().mean() * torch.eye(len(H), dtype=torch.float64)


def quantize(t: Tensor, s: Tensor, z: Tensor, bits: int) -> Tensor:
    """q = clamp(round(t / s) + z, 0, 2^bits − 1)."""
    return (torch.round(t / s) + z).clamp(0, 2**bits - 1)


def unit_upper(H: Tensor) -> tuple[Tensor, Tensor]:
    """F and d of H = F diag(d) Fᵀ, F unit upper triangular."""
    R = torch.linalg.cholesky(H.flip(0, 1)).flip(0, 1)
    return R / R.diagonal(), R.diagonal() ** 2


def ldlq(W: Tensor, H: Tensor, s: Tensor, z: Tensor, bits: int) -> Tensor:
    """ŵ_i = Q(w_i + Σ_{j<i} (w_j − ŵ_j) F_ji). s, z: (m, n), one per weight. Returns codes."""
    W, (F, _) = W.double(), unit_upper(H)
    W_hat, codes = W.clone(), torch.zeros_like(W)
    for i in range(W.shape[1]):
        t = W[:, i] + (W[:, :i] - W_hat[:, :i]) @ F[:i, i]
        codes[:, i] = quantize(t, s[:, i], z[:, i], bits)
        W_hat[:, i] = s[:, i] * (codes[:, i] - z[:, i])
    return codes


def gptq(W: Tensor, H: Tensor, s: Tensor, z: Tensor, bits: int) -> Tensor:
    """The form of the GPTQ paper: errors spread with the Cholesky factor of H⁻¹."""
    W, codes = W.double().clone(), torch.zeros_like(W, dtype=torch.float64)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    for i in range(W.shape[1]):
        codes[:, i] = quantize(W[:, i], s[:, i], z[:, i], bits)
        error = (W[:, i] - s[:, i] * (codes[:, i] - z[:, i])) / U[i, i]
        W[:, i:] -= error[:, None] * U[i, i:]
    return codes


def excess(W: Tensor, H: Tensor, s: Tensor, z: Tensor, codes: Tensor, bits: int) -> float:
    """By how much the worst code misses its target, in steps beyond the half step of rounding.

    Every target follows from the codes before it, so this finds any wrong code without demanding that a
    tie was broken like in float64.
    """
    W, codes, (F, _) = W.double(), codes.double(), unit_upper(H)
    E = W - s * (codes - z)
    T = W + E @ (F - torch.eye(len(H), dtype=torch.float64))
    best = (T / s + z).clamp(0, 2**bits - 1)
    return float((best - codes).abs().max()) - 0.5


def loss(W: Tensor, W_hat: Tensor, H: Tensor) -> float:
    """tr((W − Ŵ) H (W − Ŵ)ᵀ)."""
    E = W.double() - W_hat.double()
    return float(((E @ H.double()) * E).sum())


def grid_error(W: Tensor, D: Tensor, s: Tensor, z: Tensor, bits: int) -> Tensor:
    """Σ_i D_i (ŵ_i − w_i)² of each row for one group; W (m, g), s and z (m,)."""
    W, s, z = W.double(), s.double()[:, None], z.double()[:, None]
    return (D.double() * (s * (quantize(W, s, z, bits) - z) - W) ** 2).sum(1)


def best_grid_error(W: Tensor, D: Tensor, bits: int, sym: bool, steps: int = 3000) -> Tensor:
    """The smallest error of each row for one group, over a dense list of scales and every zero point."""
    W = W.double()
    levels, span = 2**bits - 1, W.amax(1).clamp(min=0) - W.amin(1).clamp(max=0)
    reach = torch.linspace(0.05, 2.2, steps, dtype=torch.float64) / levels
    best = torch.full((len(W),), torch.inf, dtype=torch.float64)
    for zero in [2 ** (bits - 1)] if sym else range(1, levels + 1):
        for factor in torch.cat([reach, -reach]) if sym else reach:
            s = (span * (2 if sym else 1) * factor).half().double()
            z = torch.full_like(s, float(zero))
            best = torch.minimum(best, grid_error(W, D, torch.where(s == 0, 1.0, s), z, bits))
    return best


def minmax_error(W: Tensor, D: Tensor, bits: int, sym: bool) -> Tensor:
    """The error of the plain min-max grid, the usual round-to-nearest."""
    low, high = W.amin(1).clamp(max=0), W.amax(1).clamp(min=0)
    if sym:
        s = torch.maximum(-low, high) * 2 / (2**bits - 1)
        z = torch.full_like(s, float(2 ** (bits - 1)))
    else:
        s = (high - low) / (2**bits - 1)
        z = torch.round(-low / s).clamp(1, 2**bits - 1)
    return grid_error(W, D, s.half(), z, bits)
