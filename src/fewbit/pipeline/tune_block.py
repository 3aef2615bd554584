"""Tuning: the codes and scales of one block of layers, optimised together by gradient.

Contract: a block (any module with a `forward`), the codes of its layers, and calls recorded on the way
through the quantized model, each with the full-precision model's output, in; codes on the same grids
out: zero points and g_idx unchanged, codes 0 … 2^bits − 1, scales normal float16. The block is left as
it was found. Nothing here knows calibration, files or the walk.

Several processes, each with some of the calls, take the steps that one would take: each runs its own of the calls
that are drawn, and gradients are summed. With one or two calls to a step that is the same to the last bit.

The solver makes each layer good on its own; this makes the block good as a whole. The idea is that of
SignRound (arXiv:2309.05516) and Block-AP (arXiv:2407.11062). With v the code before rounding and r a
factor on the solver's scale s₀, one v per weight and one r per row and group,

    ŵ = s (q − z),   q = clamp(round(v), 0, 2^bits − 1),   s = float16(s₀ r)
    ∂L/∂v = s ∂L/∂ŵ  (rounding counts as the identity),    ∂L/∂r = s₀ Σ_group (q − z) ∂L/∂ŵ

and L = mean over tokens of ‖y − ỹ‖² / ‖ỹ‖², y the block's output and ỹ the full-precision one: relative,
because the next block normalises each token, and a few tokens are hundreds of times larger than the rest.
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

TOKENS_PER_STEP = 1024  # at least so many, in whole calls
RATE_CODES = 0.01  # of Adam: about how far v moves in one of the first steps
RATE_SCALES = 0.002  # of Adam: the same for r
_BETAS = (0.9, 0.95)
_CHECKS = 8  # so often is the held-out loss measured
_TINY = 1e-12  # instead of zero, in a division
_CELL = 0.49  # how far from its code v may start


@dataclass(frozen=True)
class TrainingCall:
    """One call of the block on the way through the quantized model.

    Attributes:
        args, kwargs: what the block's forward was given.
        target: the full-precision model's output of this block for the same tokens, (..., features).
        mask: bool, one value per token of the target, False where it is padding and does not count; None
            where all count.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor
    mask: Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many count."""
        return int(self.mask.sum()) if self.mask is not None else self.target[..., 0].numel()


@dataclass(frozen=True)
class TuneResult:
    """A tuned block.

    Attributes:
        codes: layer → its codes; the very ones given where nothing was kept.
        before, after: L on the held-out calls, with the codes given and with those returned.
        train_before, train_after: L on as many of the other calls.
        kept: whether tuning lowered L on the held-out calls.
        changed: share of the codes that differ from the ones given.
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
    codes: Mapping[str, QuantizedMatrix],
    weights: Mapping[str, Tensor],
    train: Sequence[TrainingCall],
    held_out: Sequence[TrainingCall],
    *,
    steps: int,
    seed: int = 0,
    comm: Communicator | None = None,
) -> TuneResult:
    """Optimise the codes and scales of the layers of one block.

    Of the states seen, the one with the lowest L on the held-out calls is returned; the given codes are one
    of them. The block runs in its own dtype; v, r, their gradients and L are float32.

    Args:
        block: in evaluation mode, on any device. Its parameters are not touched.
        codes: name of a layer inside the block → its codes from the solver.
        weights: the same names → original weight matrix (out, in), which says on which side of its code each
            weight lies, and so which codes are next to change.
        train, held_out: at least one call each, in any of the processes.
        steps: of about `TOKENS_PER_STEP` tokens each, with a rate that falls linearly to 0.
        seed: of the order in which calls are used.
        comm: the processes, each with its calls; all get the same result.

    Raises:
        CalibrationError: no call to train on, or none to judge by.
        ModelError: the block's output does not have the target's shape.
    """
    comm = comm or Communicator()
    shared, judges = _Shared(train, comm), _Shared(held_out, comm)
    if not shared.count or not judges.count:
        raise CalibrationError(
            f"tuning needs calibration batches to learn from and others to judge by, but there are {shared.count} and "
            f"{judges.count}: give more text or a smaller batch_size"
        )
    trial = _Trial(block, {name: _Layer(codes[name], weights[name]) for name in codes}, comm)
    first = best = trial.state(shared, judges)
    checks = {steps * i // _CHECKS for i in range(1, _CHECKS + 1)}
    for step in _descend(trial, shared, steps, seed):
        if step in checks:
            state = trial.state(shared, judges)
            best = state if state.held_out < best.held_out else best
    changed = sum(int((best.codes[name].codes != codes[name].codes).sum()) for name in codes)
    return TuneResult(
        codes=best.codes if best is not first else dict(codes),
        before=first.held_out,
        after=best.held_out,
        train_before=first.train,
        train_after=best.train,
        kept=best is not first,
        changed=changed / sum(given.codes.numel() for given in codes.values()),
    )


@dataclass(frozen=True)
class _State:
    """Codes, and L with them on as many of the training calls as are held out, and on those."""

    codes: dict[str, QuantizedMatrix]
    train: float
    held_out: float


class _Shared:
    """The calls of all processes, in rank order.

    Attributes:
        count: how many there are. tokens: of all of them.
    """

    def __init__(self, calls: Sequence[TrainingCall], comm: Communicator) -> None:
        everyones = comm.all_gather_object([call.tokens for call in calls])
        self._calls, self._first = calls, sum(map(len, everyones[: comm.rank]))
        self.count, self.tokens = sum(map(len, everyones)), sum(map(sum, everyones))

    def mine(self, numbers: Iterable[int]) -> list[TrainingCall]:
        """Those of the calls with these numbers that this process has."""
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
        self.place = torch.empty_like(groups)
        self.place[columns] = groups[columns] * self.width + within
        # Consecutive columns in full groups, the usual case, need no copy.
        self.plain = self.count * self.width == len(groups) and bool((self.place.diff() == 1).all())

    def split(self, X: Tensor) -> Tensor:
        if not self.plain:
            padded = X.new_zeros(X.shape[0], self.count * self.width)
            padded[:, self.place] = X
            X = padded
        return X.reshape(X.shape[0], self.count, self.width)

    def join(self, X: Tensor) -> Tensor:
        X = X.flatten(1)
        return X if self.plain else X.index_select(1, self.place)


class _Layer:
    """One layer while it is tuned; all tensors but the matrices going in and out are (m, G, width) or (m, G, 1).

    Attributes:
        v: codes before rounding, float32. r: factors on the solver's scales, float32.
    """

    def __init__(self, given: QuantizedMatrix, W: Tensor) -> None:
        self.given = given
        self.levels = 2**given.bits - 1
        self.groups = _Groups(given.g_idx)
        self.s0, self.z = given.scales.float()[..., None], given.zeros.float()[..., None]
        q = self.groups.split(given.codes.float())
        # Each weight starts on that side of its code where the original lies, not further than its cell.
        error = self.groups.split(W.float() - given.dequantize())
        self.v = nn.Parameter(q + (error / self.s0).clamp_(-_CELL, _CELL))
        self.r = nn.Parameter(torch.ones_like(self.s0))
        # A group of zeros has the scale 1, which says nothing about how far its weights may go.
        self.live = (q != self.z).any(2, keepdim=True)

    def q(self) -> Tensor:
        return self.v.detach().round().clamp_(0, self.levels)

    def s(self) -> Tensor:
        """Scales as they are stored, with the solver's signs."""
        s = (self.s0 * self.r.detach()).abs().clamp_(SMALLEST_SCALE, LARGEST_SCALE)
        return s.copysign_(self.s0).half().float()

    def matrix(self) -> Tensor:
        """Ŵ, float32 (m, n)."""
        return self.groups.join((self.q() - self.z) * self.s())

    def codes(self) -> QuantizedMatrix:
        q = self.groups.join(self.q()).to(torch.uint8)
        return replace(self.given, codes=q, scales=self.s()[..., 0].to(self.given.scales.dtype))

    def set_gradient(self, dW: Tensor) -> None:
        """∂L/∂v and ∂L/∂r from ∂L/∂Ŵ, (m, n)."""
        dW = self.groups.split(dW) * self.live
        self.r.grad = ((self.q() - self.z) * dW).sum(2, keepdim=True).mul_(self.s0)
        self.v.grad = dW.mul_(self.s())


class _Trial:
    """The block with the matrices being tuned in place of its own."""

    def __init__(self, block: nn.Module, layers: dict[str, _Layer], comm: Communicator) -> None:
        self.block, self.layers, self.comm = block, layers, comm
        self.modules = {name: block.get_submodule(name) for name in layers}
        self.others = {name: parameter.detach() for name, parameter in block.named_parameters()}

    def matrices(self) -> dict[str, Tensor]:
        """Ŵ of every layer in the block's dtype."""
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
        """Give every v and r the gradient of the errors summed over these calls and those of the other processes.

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
        """‖y − ỹ‖² / ‖ỹ‖² of every token that counts: float32 (tokens,)."""
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
    """A matrix (out, in) in the shape in which `module` holds it; gradients pass."""
    return W.T if isinstance(module, Conv1D) else W.reshape(module.get_parameter("weight").shape)


def _descend(trial: _Trial, train: _Shared, steps: int, seed: int) -> Iterator[int]:
    """Take all steps; yields the number of steps taken after each."""
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
    """The numbers of all calls in a random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
