"""The solver: a weight, the statistics of its input and its settings in; integer codes out.

Contract: pure. Tensors in, a dataclass out; no logging, no files, no knowledge of models. The steps are the correction
(the target), the grid (scales and zero points) and the rounding of the columns (codes); cholesky.py has the fallbacks
for a bad Hessian.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from ..config import LayerSettings
from ..errors import SolverError
from ..quantized_matrix import QuantizedMatrix, sequential_groups
from .backends import select
from .cholesky import NO_CORRECTION, SCALES_CLAMPED, FactoredHessian, factor_hessian
from .correction import (
    ALPHA_SHRINKAGE,
    Holdout,
    InputErrorCovariance,
    RowReduce,
    best_alpha,
    correction_step,
    input_error_covariance,
    local_sum,
    true_error,
)
from .grid import Grid, clamped_scales, fit_grid, nearest
from .hessian import Hessian
from .output_feedback import factor_outputs, round_with_feedback
from .round_rows import round_rows


@dataclass
class InputGroup:
    """The input that some layers share, and what they compute of it only once.

    Attributes:
        hessian: the Hessian of the input, with all tokens.
        holdout: held-out tokens of the input; None if there are none.
    """

    hessian: Hessian
    holdout: Holdout | None = None
    _factored: dict[tuple[str, int, float], FactoredHessian] = field(default_factory=dict, repr=False)
    _input_error: InputErrorCovariance | None = field(default=None, repr=False)

    def factored(self, settings: LayerSettings) -> FactoredHessian:
        """The factorization of the Hessian for these settings."""
        key = settings.act_order, settings.group_size, settings.damp
        if key not in self._factored:
            self._factored[key] = factor_hessian(
                self.hessian, settings.group_size, settings.act_order, settings.damp
            )
        return self._factored[key]

    def input_error(self) -> InputErrorCovariance:
        """C and the factorization for the correction."""
        if self._input_error is None:
            self._input_error = input_error_covariance(self.hessian)
        return self._input_error


@dataclass(frozen=True)
class Solution:
    """A solved layer.

    Attributes:
        codes: the quantized weight.
        loss: tr((T − Ŵ) H (T − Ŵ)ᵀ), the squared error of the layer's outputs summed over the calibration
            tokens; T = W without correction. Without a Hessian ‖W − Ŵ‖².
        fallbacks: names of the fallbacks that a bad Hessian needed (see `gptq.cholesky`).
        damp: the damping in use, a fraction of mean(diag H); None without a factorization.
        tokens: number of calibration tokens in H.
        dropped: number of tokens left out because they were not finite.
        dead: number of columns whose input was always zero; they are rounded to nearest (of the shifted target, where
            outputs have a Hessian).
        alpha: α of the correction; None without full-precision inputs.
        true_error: ‖WX̃ − ŴX‖ / ‖WX̃‖ on the held-out tokens; None without them, or where they carry no signal.
    """

    codes: QuantizedMatrix
    loss: float
    fallbacks: tuple[str, ...] = ()
    damp: float | None = None
    tokens: int = 0
    dropped: int = 0
    dead: int = 0
    alpha: float | None = None
    true_error: float | None = None


@contextmanager
def full_float32() -> Iterator[None]:
    """Multiply float32 matrices in float32 on GPUs, whatever the user allows elsewhere.

    TF32 keeps 11 bits of every factor: targets would be off by a thousandth of a step, and codes near a tie would
    differ.
    """
    matmul = torch.backends.cuda.matmul
    # The older name of the setting may not be read where the newer one was used.
    newer = hasattr(matmul, "fp32_precision")
    key, fast, exact = ("fp32_precision", "tf32", "ieee") if newer else ("allow_tf32", True, False)
    if getattr(matmul, key) != fast:
        yield
        return
    setattr(matmul, key, exact)
    try:
        yield
    finally:
        setattr(matmul, key, fast)


@full_float32()
def quantize_weight(
    W: Tensor,
    group: InputGroup | None,
    settings: LayerSettings,
    *,
    correction: float | str = 0.0,
    reduce: RowReduce = local_sum,
    G: Tensor | None = None,
) -> Solution:
    """Quantize one linear layer, or some of its rows: given H, rows depend on each other only through a few sums, and
    through the blocks of G.

    Args:
        W: (out, in), any float dtype, on the device of the Hessian; computed in float32.
        group: the layer's input; None for round-to-nearest. Ignored by methods without calibration.
        settings: bits, group size, and so on.
        correction: α, 0 to 1, or "auto": the best on the held-out tokens; without them no correction.
        reduce: sums statistics of rows over all rows of the layer, where W holds only some of them. α, loss and true
            error are then the same in every part.
        G: float32 (blocks, size, size), the Hessian of the outputs of these rows in blocks (see `output_feedback`);
            None counts all outputs alike.

    Raises:
        SolverError: W is not a matrix, does not fit H, or is not finite.
    """
    _check(W, group)
    W = W.detach().float()
    if group is None or not settings.needs_inputs:
        return _round_to_nearest(W, settings, reduce)
    H, backend = group.factored(settings), select(W.device)
    T, alpha, fallbacks = _target(W, group, H, correction, reduce)
    grid = fit_grid(T, H.D, H.g_idx, settings.bits, sym=settings.sym, search=backend.search)
    if H.factor is None:
        codes = _matrix(nearest(T, grid, settings.bits), grid, settings)
        losses = _losses(T - codes.dequantize(), group.hessian)
    else:
        rounding = partial(round_rows, factor=H.factor, bits=settings.bits, round_block=backend.round_block)
        rounded = (
            rounding(T, grid) if G is None else round_with_feedback(T, grid, factor_outputs(G), rounding)
        )
        codes, losses = _matrix(rounded.codes, replace(grid, scales=rounded.scales), settings), rounded.losses
        if G is not None:  # the losses of the shifted targets
            losses = _losses(T - codes.dequantize(), group.hessian)
    loss, error = float(reduce(losses)), None
    fallbacks += _clamped(codes, reduce)
    if group.holdout is not None:
        error = true_error(W, codes.dequantize(), group.holdout, reduce)
    return Solution(
        codes,
        loss,
        fallbacks,
        damp=None if H.factor is None else H.damp,
        tokens=group.hessian.tokens,
        dropped=group.hessian.dropped,
        dead=H.dead,
        alpha=alpha,
        true_error=error,
    )


def _target(
    W: Tensor, group: InputGroup, H: FactoredHessian, correction: float | str, reduce: RowReduce
) -> tuple[Tensor, float | None, tuple[str, ...]]:
    """T = W + α W C (H + ρI)⁻¹, α, and the names of the fallbacks."""
    if not group.hessian.has_full:
        return W, None, H.fallbacks
    if correction == 0 or H.factor is None or (correction == "auto" and group.holdout is None):
        return W, 0.0, H.fallbacks
    input_error = group.input_error()
    if input_error.L is None:
        return W, 0.0, (*H.fallbacks, NO_CORRECTION)
    step = correction_step(W, input_error)
    if correction == "auto" and group.holdout is not None:
        alpha = ALPHA_SHRINKAGE * best_alpha(W, step, group.holdout, reduce)
    else:
        alpha = float(correction)
    return torch.add(W, step, alpha=alpha, out=step), alpha, H.fallbacks


def _losses(E: Tensor, hessian: Hessian) -> Tensor:
    """tr(e H eᵀ) of every row e of E, float64 (m,)."""
    return (E @ hessian.matrix()).mul_(E).sum(dim=1, dtype=torch.float64)


def _round_to_nearest(W: Tensor, settings: LayerSettings, reduce: RowReduce) -> Solution:
    n = W.shape[1]
    g_idx = sequential_groups(n, settings.group_size, device=W.device)
    D, search = torch.ones(n, device=W.device), select(W.device).search
    grid = fit_grid(W, D, g_idx, settings.bits, sym=settings.sym, search=search)
    codes = _matrix(nearest(W, grid, settings.bits), grid, settings)
    loss = float(reduce((W - codes.dequantize()).square().sum(dim=1, dtype=torch.float64)))
    return Solution(codes, loss, _clamped(codes, reduce))


def _clamped(codes: QuantizedMatrix, reduce: RowReduce) -> tuple[str, ...]:
    """The fallback that says that some scales, in any part of the rows, are the smallest or largest possible."""
    return (SCALES_CLAMPED,) if float(reduce(clamped_scales(codes.scales).double())) else ()


def _matrix(q: Tensor, grid: Grid, settings: LayerSettings) -> QuantizedMatrix:
    return QuantizedMatrix(q, grid.scales, grid.zeros, grid.g_idx, settings.bits, settings.group_size)


def _check(W: Tensor, group: InputGroup | None) -> None:
    """Raise SolverError unless the weight fits its Hessian and is finite."""
    if W.ndim != 2 or W.numel() == 0 or not W.is_floating_point():
        raise SolverError(
            f"a weight must be a float matrix (out, in); got {W.dtype} of shape {tuple(W.shape)}"
        )
    if group is not None and group.hessian.n != W.shape[1]:
        raise SolverError(
            f"the weight has {W.shape[1]} input features, but its Hessian has {group.hessian.n}"
        )
    # NaN and infinity survive these reductions.
    if bool(torch.isfinite(torch.stack(torch.aminmax(W))).all()):
        return
    finite = torch.isfinite(W)
    rows, columns = (int((~finite).any(side).sum()) for side in (1, 0))
    raise SolverError(
        f"the weight has values that are not finite, in {rows} of {W.shape[0]} rows and "
        f"{columns} of {W.shape[1]} columns; the checkpoint is damaged, or its training diverged"
    )
