"""The training loop: Adam with a cosine schedule, held-out sequences as judges, and a state that survives a kill."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..atomic_io import write_whole
from ..context import Progress
from ..errors import ModelError, ResumeError
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
    """A training run.

    Args:
        student: what is trained.
        run_student: logits of the student for a batch.
        run_teacher: logits of the original model.
        batches: one for each step, in this order.
        held_out: batches that only judge.
        rate: peak of the learning rate.
        state_file: where the state is kept; None for nowhere.
        fingerprint: of the inputs; a state with another one is refused.
        progress: called with ("distill", steps done, steps).
    """

    student: Student
    run_student: Logits
    run_teacher: Logits
    batches: Sequence[Mapping[str, Tensor]]
    held_out: Sequence[Mapping[str, Tensor]]
    rate: float
    state_file: Path | None
    fingerprint: str
    progress: Progress
    curve: list[Point] = field(default_factory=list)
    step: int = 0

    def run(self) -> None:
        """Train, and leave the best state in the student.

        Raises:
            ModelError: a loss is not finite.
            ResumeError: the state on disk belongs to other inputs.
        """
        tensors = [tensor.d for tensor in self.student.tensors]
        self._m = [torch.zeros_like(d) for d in tensors]
        self._v = [torch.zeros_like(d) for d in tensors]
        self._best = self.student.state()
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
        self.student.set_state(self._best)

    @property
    def best(self) -> Point:
        """The point with the lowest held-out KL."""
        return min(self.curve, key=lambda point: point.held_out)

    def _train_on(self, batch: Mapping[str, Tensor]) -> None:
        """Set the gradients of the mean KL of a batch."""
        with torch.no_grad():
            teacher = self.run_teacher(batch)
        with torch.enable_grad():
            total, tokens = divergence(self.run_student(batch), teacher, batch.get("attention_mask"))
            del teacher
            (total / tokens).backward()
        loss = float(total)
        if not math.isfinite(loss):
            raise ModelError(
                f"the KL divergence is {loss} at step {self.step}: one of the two models gives logits that are not finite"
            )
        self._sum, self._count = self._sum + loss, self._count + tokens

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

    @torch.no_grad()
    def _judge(self) -> None:
        """Add a point to the curve, and keep the state if it is the best one."""
        total, tokens = 0.0, 0
        for batch in self.held_out:
            kl, count = divergence(
                self.run_student(batch), self.run_teacher(batch), batch.get("attention_mask")
            )
            total, tokens = total + float(kl), tokens + count
        trained = sum(_tokens(batch) for batch in self.batches[: self.step])
        mean = self._sum / self._count if self._count else None
        point = Point(self.step, trained, mean, total / max(tokens, 1))
        if not math.isfinite(point.held_out):
            raise ModelError("the KL divergence of the held-out sequences is not finite")
        if not self.curve or point.held_out < self.best.held_out:
            self._best = self.student.state()
        self.curve.append(point)
        self._sum, self._count = 0.0, 0

    def _save(self) -> None:
        if self.state_file is None:
            return
        names = [tensor.name for tensor in self.student.tensors]
        tensors = {f"d.{name}": d for name, d in self.student.state().items()}
        tensors |= {f"best.{name}": d for name, d in self._best.items()}
        for key, values in (("m", self._m), ("v", self._v)):
            tensors |= {f"{key}.{name}": value for name, value in zip(names, values, strict=True)}
        facts = {
            "step": self.step,
            "curve": [vars(point) for point in self.curve],
            "sum": self._sum,
            "count": self._count,
        }
        metadata = {"fingerprint": self.fingerprint, "facts": json.dumps(facts)}
        self.state_file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(
            self.state_file, save({name: t.cpu().contiguous() for name, t in tensors.items()}, metadata)
        )

    def _resume(self) -> bool:
        """Continue from the state on disk, if there is one."""
        if self.state_file is None or not self.state_file.exists():
            return False
        try:
            with safe_open(self.state_file, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ResumeError(f"cannot read {self.state_file}: {error}. Remove it to start again") from error
        if metadata.get("fingerprint") != self.fingerprint:
            raise ResumeError(
                f"{self.state_file} belongs to a run with another checkpoint, model, text or setting: choose another "
                "output folder, or remove the file"
            )
        facts: dict[str, Any] = json.loads(metadata["facts"])
        self.step, self._sum, self._count = facts["step"], facts["sum"], facts["count"]
        self.curve[:] = [Point(**point) for point in facts["curve"]]
        names = [tensor.name for tensor in self.student.tensors]
        self.student.set_state({name: tensors[f"d.{name}"] for name in names})
        self._best = {name: tensors[f"best.{name}"].to(self._m[0].device) for name in names}
        for key, values in (("m", self._m), ("v", self._v)):
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


def in_turns(count: int, steps: int, per_step: int, seed: int) -> Iterator[list[int]]:
    """Draw `per_step` of `count` sequences for each step, every sequence once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    for _ in range(steps):
        while len(waiting) < per_step:
            waiting += torch.randperm(count, generator=generator).tolist()
        yield waiting[:per_step]
        del waiting[:per_step]
