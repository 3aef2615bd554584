"""Block tuning: the codes and scales of one block of layers, optimized jointly by gradient descent.

Input: a block (any module with a `forward`), the quantized matrices of its layers, and calls recorded on the quantized
path, each with the full-precision model's output. Output: codes on the same grids. Zero points and g_idx are unchanged,
codes are 0 … 2^bits − 1, scales are normal float16 numbers. The block is not changed. This file knows nothing of
calibration, files or the scheduler.

Several processes, each with a part of the calls, take the steps that one process would take: each runs its part of the
calls that are drawn, and gradients are summed. With one or two calls in a step, the result is the same to the last bit.

The solver minimizes the error of each layer alone; tuning minimizes the error of the block's output, as SignRound
(arXiv:2309.05516) and Block-AP (arXiv:2407.11062) do. With v the code before rounding and r a factor on the solver's
scale s₀, one v per weight and one r per row and group,

    ŵ = s (q − z),   q = clamp(round(v), 0, 2^bits − 1),   s = float16(s₀ r)
    ∂L/∂v = s ∂L/∂ŵ  (rounding counts as the identity),    ∂L/∂r = s₀ Σ_group (q − z) ∂L/∂ŵ

and L = mean over tokens of ‖y − ỹ‖² / ‖ỹ‖², where y is the block's output and ỹ the full-precision output. L is
relative because the next block normalizes each token, and a few tokens are hundreds of times larger than the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from ..distributed import Communicator
from ..errors import CalibrationError, ModelError
from ..gptq.grid import LARGEST_SCALE, SMALLEST_SCALE
from ..modeling.layers import weight_matrix
from ..quantized_matrix import QuantizedMatrix

TOKENS_PER_STEP = 1024  # minimum, in whole calls
RATE_CODES = 0.01  # Adam's learning rate for v: about the distance that v moves in one of the first steps
RATE_SCALES = 0.002  # Adam's learning rate for r
_BETAS = (0.9, 0.95)
_CHECKS = 8  # measurements of the holdout loss
_TINY = 1e-12  # replaces zero in a division
_CELL = 0.49  # maximum distance of v from its code at the start


@dataclass(frozen=True)
class TrainingCall:
    """One call of the block on the quantized path.

    Attributes:
        args: Positional arguments of the block's forward.
        kwargs: Keyword arguments of the block's forward.
        target: Output of the block in the full-precision model for the same tokens, (..., features).
        mask: Bool, one value per token of the target, False for padding; None if no token is padding.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor
    mask: Tensor | None = None

    @property
    def tokens(self) -> int:
        return int(self.mask.sum()) if self.mask is not None else self.target[..., 0].numel()


@dataclass(frozen=True)
class TuneResult:
    """A tuned block.

    Attributes:
        codes: Layer → its quantized matrix; the given matrices if tuning did not lower the holdout loss.
        before: L on the holdout calls with the given codes.
        after: L on the holdout calls with the returned codes.
        train_before: L on the same number of training calls with the given codes.
        train_after: L on the same number of training calls with the returned codes.
        kept: True if tuning lowered L on the holdout calls.
        changed: Share of the codes that differ from the given ones.
    """

    codes: dict[str, QuantizedMatrix]
    before: float
    after: float
    train_before: float
    train_after: float
    kept: bool
    changed: float


def tune_block(
    block: nn.Module,
    layers: Mapping[str, tuple[QuantizedMatrix, Tensor]],
    train: Sequence[TrainingCall],
    held_out: Sequence[TrainingCall],
    *,
    steps: int,
    seed: int = 0,
    comm: Communicator | None = None,
) -> TuneResult:
    """Optimize the codes and scales of the layers of one block.

    The result is the state with the lowest L on the holdout calls among the measured states, which include the given
    codes. The block runs in its dtype; v, r, their gradients and L are float32.

    Args:
        block: Block in evaluation mode, on any device. Its parameters are not changed.
        layers: Name of a layer inside the block → its quantized matrix from the solver, and its original weight matrix
            (out, in). The latter tells on which side of its code each weight lies, and so which codes change first.
        train: Training calls; at least one in any of the processes.
        held_out: Holdout calls; at least one in any of the processes.
        steps: Steps of about `TOKENS_PER_STEP` tokens, with a learning rate that falls linearly to 0.
        seed: Seed for the order in which calls are used.
        comm: Processes, each with its calls; all get the same result.

    Raises:
        CalibrationError: There is no training call or no holdout call.
        ModelError: The block's output does not have the target's shape.
    """
    comm = comm or Communicator()
    shared, judges = _Shared(train, comm), _Shared(held_out, comm)
    if not shared.count or not judges.count:
        raise CalibrationError(
            f"tuning needs calibration batches to learn from and others to judge by, but there are {shared.count} and "
            f"{judges.count}: give more text or a smaller batch_size"
        )
    trial = _Trial(block, {name: _Layer(*layer) for name, layer in layers.items()}, comm)
    first = best = trial.state(shared, judges)
    checks = {steps * i // _CHECKS for i in range(1, _CHECKS + 1)}
    for step in _descend(trial, shared, steps, seed):
        if step in checks:
            state = trial.state(shared, judges)
            best = state if state.held_out < best.held_out else best
    codes = {name: given for name, (given, _) in layers.items()}
    changed = sum(int((best.codes[name].codes != codes[name].codes).sum()) for name in codes)
    return TuneResult(
        codes=best.codes if best is not first else codes,
        before=first.held_out,
        after=best.held_out,
        train_before=first.train,
        train_after=best.train,
        kept=best is not first,
        changed=changed / sum(given.codes.numel() for given in codes.values()),
    )


@dataclass(frozen=True)
class _State:
    """Codes, and L with them on the holdout calls and on the same number of training calls."""

    codes: dict[str, QuantizedMatrix]
    train: float
    held_out: float


class _Shared:
    """The calls of all processes, in rank order.

    Attributes:
        count: Number of calls.
        tokens: Number of tokens of all calls.
    """

    def __init__(self, calls: Sequence[TrainingCall], comm: Communicator) -> None:
        everyones = comm.all_gather_object([call.tokens for call in calls])
        self._calls, self._first = calls, sum(map(len, everyones[: comm.rank]))
        self.count, self.tokens = sum(map(len, everyones)), sum(map(sum, everyones))

    def mine(self, numbers: Iterable[int]) -> list[TrainingCall]:
        """Return the calls of this process among the calls with these numbers."""
        own = range(len(self._calls))
        return [self._calls[number - self._first] for number in numbers if number - self._first in own]


class _Groups:
    """The columns of a matrix group by group: (m, n) ↔ (m, G, width), short groups padded with zeros."""

    def __init__(self, g_idx: Tensor) -> None:
        groups = g_idx.long()
        counts = torch.bincount(groups)
        self.count, self.width = len(counts), int(counts.max())
        columns = torch.argsort(groups, stable=True)
        within = (
            torch.arange(len(groups), device=groups.device) - (counts.cumsum(0) - counts)[groups[columns]]
        )
        self.position = torch.empty_like(groups)
        self.position[columns] = groups[columns] * self.width + within
        # Consecutive columns in full groups, the usual case, need no copy.
        self.plain = self.count * self.width == len(groups) and bool((self.position.diff() == 1).all())

    def split(self, X: Tensor) -> Tensor:
        if not self.plain:
            padded = X.new_zeros(X.shape[0], self.count * self.width)
            padded[:, self.position] = X
            X = padded
        return X.reshape(X.shape[0], self.count, self.width)

    def join(self, X: Tensor) -> Tensor:
        X = X.flatten(1)
        return X if self.plain else X.index_select(1, self.position)


class _Layer:
    """One layer while it is tuned. Its tensors are (m, G, width) or (m, G, 1).

    Attributes:
        v: Codes before rounding, float32 (m, G, width).
        r: Factors on the solver's scales, float32 (m, G, 1).
    """

    def __init__(self, given: QuantizedMatrix, W: Tensor) -> None:
        self.given = given
        self.levels = 2**given.bits - 1
        self.groups = _Groups(given.g_idx)
        self.s0, self.z = given.scales.float()[..., None], given.zeros.float()[..., None]
        q = self.groups.split(given.codes.float())
        # v starts at the original weight in units of the scale, but inside the rounding cell of its code.
        error = self.groups.split(W.float() - given.dequantize())
        self.v = nn.Parameter(q + (error / self.s0).clamp_(-_CELL, _CELL))
        self.r = nn.Parameter(torch.ones_like(self.s0))
        # A group of zeros has the scale 1, which has no relation to the size of its weights: it is not tuned.
        self.live = (q != self.z).any(2, keepdim=True)

    def q(self) -> Tensor:
        return self.v.detach().round().clamp_(0, self.levels)

    def s(self) -> Tensor:
        """Return the scales as they are stored, with the solver's signs."""
        s = (self.s0 * self.r.detach()).abs().clamp_(SMALLEST_SCALE, LARGEST_SCALE)
        return s.copysign_(self.s0).half().float()

    def matrix(self) -> Tensor:
        # Ŵ = s (q − z), float32 (m, n)
        return self.groups.join((self.q() - self.z) * self.s())

    def codes(self) -> QuantizedMatrix:
        q = self.groups.join(self.q()).to(torch.uint8)
        return replace(self.given, codes=q, scales=self.s()[..., 0].to(self.given.scales.dtype))

    def set_gradient(self, dW: Tensor) -> None:
        """Compute ∂L/∂v and ∂L/∂r from ∂L/∂Ŵ (m, n)."""
        dW = self.groups.split(dW) * self.live
        self.r.grad = (
            ((self.q() - self.z) * dW).sum(2, keepdim=True).mul_(self.s0)
        )  # ∂L/∂r = s₀ Σ (q − z) ∂L/∂ŵ
        self.v.grad = dW.mul_(self.s())  # ∂L/∂v = s ∂L/∂ŵ


class _Trial:
    """The block, run with the matrices being tuned instead of its weights."""

    def __init__(self, block: nn.Module, layers: dict[str, _Layer], comm: Communicator) -> None:
        self.block, self.layers, self.comm = block, layers, comm
        self.modules = {name: block.get_submodule(name) for name in layers}
        self.others = {name: parameter.detach() for name, parameter in block.named_parameters()}

    def matrices(self) -> dict[str, Tensor]:
        """Return Ŵ of every layer in the block's dtype."""
        return {
            name: layer.matrix().to(weight_matrix(self.modules[name]).dtype)
            for name, layer in self.layers.items()
        }

    def state(self, train: _Shared, held_out: _Shared) -> _State:
        matrices = self.matrices()
        none = next(iter(matrices.values())).new_empty(0, dtype=torch.float32)
        means = []
        for calls in (train, held_out):
            with torch.no_grad():
                errors = [self.errors(matrices, call) for call in calls.mine(range(held_out.count))]
            means.append(float(self.comm.all_gather_rows(torch.cat([none, *errors])).mean()))
        return _State({name: layer.codes() for name, layer in self.layers.items()}, *means)

    def set_gradients(self, calls: Sequence[TrainingCall]) -> None:
        """Set the gradients of v and r: the sum over these calls and the calls of the other processes.

        One call is in memory at a time.
        """
        matrices = {name: W.requires_grad_() for name, W in self.matrices().items()}
        total = {name: torch.zeros_like(W, dtype=torch.float32) for name, W in matrices.items()}
        for call in calls:
            with torch.enable_grad():
                # A sum: half-precision gradients of a mean over many tokens would vanish.
                loss = self.errors(matrices, call).sum()
            for name, gradient in zip(
                matrices,
                torch.autograd.grad(loss, list(matrices.values()), materialize_grads=True),
                strict=True,
            ):
                total[name] += gradient
        self.comm.all_reduce_(*total.values())
        for name, layer in self.layers.items():
            layer.set_gradient(total[name])

    def errors(self, matrices: Mapping[str, Tensor], call: TrainingCall) -> Tensor:
        """Return ‖y − ỹ‖² / ‖ỹ‖² of every token that is not padding: float32 (tokens,)."""
        weights = {f"{name}.weight": _as_weight(self.modules[name], W) for name, W in matrices.items()}
        output = functional_call(self.block, {**self.others, **weights}, call.args, call.kwargs)
        y = output[0] if isinstance(output, tuple) else output
        if not isinstance(y, Tensor) or y.shape != call.target.shape:
            raise ModelError(
                f"the block {type(self.block).__name__} cannot be tuned: it gives "
                f"{tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__} where the full-precision model "
                f"gave {tuple(call.target.shape)}; quantize without tune"
            )
        y, target = y.flatten(0, -2).float(), call.target.flatten(0, -2).float()
        if call.mask is not None:
            y, target = y[call.mask.flatten()], target[call.mask.flatten()]
        size = target.square().sum(1)
        return (y - target).square().sum(1) / size.clamp(min=_TINY)


def _as_weight(module: nn.Module, W: Tensor) -> Tensor:
    """Return a matrix (out, in) in the shape of the weight of `module`; gradients pass."""
    return W.T if isinstance(module, Conv1D) else W.reshape(module.get_parameter("weight").shape)


def _descend(trial: _Trial, train: _Shared, steps: int, seed: int) -> Iterator[int]:
    """Take all steps; yield the number of steps after each."""
    layers = list(trial.layers.values())
    optimizer = torch.optim.Adam(
        [
            {"params": [layer.v for layer in layers], "lr": RATE_CODES},
            {"params": [layer.r for layer in layers], "lr": RATE_SCALES},
        ],
        betas=_BETAS,
        eps=_TINY,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    drawn = _draw(train.count, seed)
    calls_per_step = math.ceil(TOKENS_PER_STEP * train.count / train.tokens)
    for step in range(1, steps + 1):
        trial.set_gradients(train.mine([next(drawn) for _ in range(calls_per_step)]))
        optimizer.step()
        schedule.step()
        yield step


def _draw(count: int, seed: int) -> Iterator[int]:
    """Yield the numbers of all calls in a random order, repeatedly."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
