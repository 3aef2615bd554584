"""The training loop: Adam with a cosine schedule, held-out sequences as judges, and a state that survives a kill."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..atomic_io import write_whole
from ..distributed import Communicator
from ..errors import ModelError, ResumeError
from ..progress import Progress
from .loss import divergence
from .student import Student
from .teacher import Logits

BETAS, EPSILON = (0.9, 0.95), 1e-12
WARMUP = 0.05  # share of the steps in which the rate rises
LAST_RATE = 0.05  # of the peak, at the end of the cosine
EVALUATIONS = 10  # of the held-out sequences, evenly spaced
SAVES = 50  # of the state, evenly spaced


@dataclass(frozen=True)
class Point:
    """The loss at one moment, mean KL in nats per token.

    Attributes:
        step: steps done.
        tokens: tokens trained on.
        train: KL of the batches since the point before; None at the start.
        held_out: KL of the held-out sequences.
    """

    step: int
    tokens: int
    train: float | None
    held_out: float


@dataclass
class Training:
    """A training run. `values` then has the best state: the tensors by name, as `Student.values` gives them.

    Args:
        student: what is trained.
        run_student: logits of the student for a batch.
        run_teacher: logits of the original model.
        batches: one for each step, in this order.
        held_out: batches that only judge.
        rate: peak of the learning rate.
        device: where the models are.
        state_file: where the state is kept, in a folder whose other files tell that it belongs to this run.
        comm: processes that share each batch.
        progress: called with ("distill", steps done, steps).
    """

    student: Student
    run_student: Logits
    run_teacher: Logits
    batches: Sequence[Mapping[str, Tensor]]
    held_out: Sequence[Mapping[str, Tensor]]
    rate: float
    device: torch.device
    state_file: Path
    comm: Communicator
    progress: Progress
    curve: list[Point] = field(default_factory=list)
    step: int = 0
    values: dict[str, Tensor] = field(default_factory=dict)

    def run(self) -> None:
        """Train; `values` becomes the best state.

        Raises:
            ModelError: a loss is not finite.
            ResumeError: the state on disk cannot be read.
        """
        tensors = [tensor.d for tensor in self.student.tensors]
        self._m = [torch.zeros_like(d) for d in tensors]
        self._v = [torch.zeros_like(d) for d in tensors]
        self.values = self.student.values()
        self._sum, self._count = 0.0, 0
        if not self._resume():
            self._judge()
        steps = len(self.batches)
        judged = _evenly(steps, EVALUATIONS)
        saved = _evenly(steps, SAVES)
        while self.step < steps:
            self._train_on(self.batches[self.step])
            self._descend(tensors, self.rate * schedule(self.step, steps))
            self.step += 1
            if self.step in judged:
                self._judge()
            if self.step in saved:
                self._save()
            self.progress("distill", self.step, steps)

    @property
    def best(self) -> Point:
        """The point with the lowest held-out KL."""
        return min(self.curve, key=lambda point: point.held_out)

    def _train_on(self, batch: Mapping[str, Tensor]) -> None:
        """Set the gradients of the mean KL of a batch; each process takes some of its sequences."""
        mine = _share(batch, self.comm)
        loss, tokens = 0.0, 0
        if mine is not None:
            mine = self._moved(mine)
            with torch.no_grad():
                teacher = self.run_teacher(mine)
            with torch.enable_grad():
                total, tokens = divergence(self.run_student(mine), teacher, mine.get("attention_mask"))
                del teacher
                torch.autograd.backward(total / _tokens(batch))
            loss = float(total.detach())
        self._add_gradients()
        parts = self.comm.all_gather_object((loss, tokens))
        loss = sum(part for part, _ in parts)
        if not math.isfinite(loss):
            raise ModelError(
                f"the KL divergence is {loss} at step {self.step}: one of the models gives logits that are not finite"
            )
        self._sum, self._count = self._sum + loss, self._count + sum(count for _, count in parts)

    def _add_gradients(self) -> None:
        """Add the gradients of all processes, in the order of their ranks."""
        if self.comm.world_size == 1:
            return
        tensors = [tensor.d for tensor in self.student.tensors]
        own = torch.cat([(d.new_zeros(d.shape) if d.grad is None else d.grad).flatten() for d in tensors])
        total = self.comm.all_gather_rows(own[None].cpu()).sum(0).to(self.device)
        for d, part in zip(tensors, torch.split(total, [d.numel() for d in tensors]), strict=True):
            d.grad = part.view_as(d)

    def _moved(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: value.to(self.device) for key, value in batch.items()}

    @torch.no_grad()
    def _descend(self, tensors: Sequence[nn.Parameter], rate: float) -> None:
        """One step of Adam: m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g², d ← d − rate · m̂ / √v̂."""
        b1, b2 = BETAS
        t = self.step + 1
        for d, m, v in zip(tensors, self._m, self._v, strict=True):
            if d.grad is None:  # no token came here
                continue
            m.mul_(b1).add_(d.grad, alpha=1 - b1)
            v.mul_(b2).addcmul_(d.grad, d.grad, value=1 - b2)
            d.sub_(m / (v / (1 - b2**t)).sqrt_().add_(EPSILON), alpha=rate / (1 - b1**t))
            d.grad = None
        self.student.changed()

    @torch.no_grad()
    def _judge(self) -> None:
        """Add a point to the curve, and keep the state if it is the best one."""
        total, tokens = 0.0, 0
        for batch in map(self._moved, self.comm.share(self.held_out)):
            mask = batch.get("attention_mask")
            kl, count = divergence(self.run_student(batch), self.run_teacher(batch), mask)
            total, tokens = total + float(kl), tokens + count
        parts = self.comm.all_gather_object((total, tokens))
        total, tokens = sum(part for part, _ in parts), sum(count for _, count in parts)
        trained = sum(_tokens(batch) for batch in self.batches[: self.step])
        mean = self._sum / self._count if self._count else None
        point = Point(self.step, trained, mean, total / max(tokens, 1))
        if not math.isfinite(point.held_out):
            raise ModelError("the KL divergence of the held-out sequences is not finite")
        if not self.curve or point.held_out < self.best.held_out:
            self.values = self.student.values()
        self.curve.append(point)
        self._sum, self._count = 0.0, 0

    def _save(self) -> None:
        if not self.comm.is_leader:
            return
        names = [tensor.name for tensor in self.student.tensors]
        tensors = {f"best.{name}": value for name, value in self.values.items()}
        for key, values in (
            ("d", [tensor.d for tensor in self.student.tensors]),
            ("m", self._m),
            ("v", self._v),
        ):
            tensors |= {f"{key}.{name}": value for name, value in zip(names, values, strict=True)}
        facts = {
            "step": self.step,
            "curve": [vars(point) for point in self.curve],
            "sum": self._sum,
            "count": self._count,
        }
        content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_whole(self.state_file, save(content, {"facts": json.dumps(facts)}))

    def _resume(self) -> bool:
        """Continue from the state on disk, if there is one."""
        if not self.comm.broadcast_object(self.state_file.exists()):
            return False
        try:
            with safe_open(self.state_file, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ResumeError(f"cannot read {self.state_file}: {error}. Remove it to start again") from error
        facts: dict[str, Any] = json.loads(metadata["facts"])
        self.step, self._sum, self._count = facts["step"], facts["sum"], facts["count"]
        self.curve[:] = [Point(**point) for point in facts["curve"]]
        names = [tensor.name for tensor in self.student.tensors]
        self.values = {name: tensors[f"best.{name}"] for name in names}
        for key, values in (
            ("d", [tensor.d.data for tensor in self.student.tensors]),
            ("m", self._m),
            ("v", self._v),
        ):
            for name, value in zip(names, values, strict=True):
                value.copy_(tensors[f"{key}.{name}"])
        return True


def schedule(step: int, steps: int) -> float:
    """The learning rate of a step as a share of its peak: a linear rise, then half a cosine."""
    rise = min(1.0, (step + 1) / max(1, round(WARMUP * steps)))
    return rise * (LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _evenly(steps: int, count: int) -> set[int]:
    """`count` steps, evenly spaced, with the last one."""
    return {round(steps * i / count) for i in range(1, count + 1)} - {0}


def _tokens(batch: Mapping[str, Tensor]) -> int:
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else batch["input_ids"].numel()


def _share(batch: Mapping[str, Tensor], comm: Communicator) -> dict[str, Tensor] | None:
    """The sequences of a batch that this process takes; None if there are none left for it."""
    if comm.world_size == 1:
        return dict(batch)
    chosen = comm.share(range(len(batch["input_ids"])))
    return {key: value[list(chosen)] for key, value in batch.items()} if len(chosen) else None
