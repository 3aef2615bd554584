"""KL(teacher ‖ student) per token and its gradient, a few tokens at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..resources import rows_at_once


class _Divergence(torch.autograd.Function):
    """Σ over tokens of KL(p ‖ q), p = softmax(teacher), q = softmax(student). The gradient is q − p."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        grad = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        step = rows_at_once(student.shape[-1], student.device)
        for start in range(0, len(student), step):
            rows = slice(start, start + step)
            log_p, log_q = teacher[rows].float().log_softmax(-1), student[rows].float().log_softmax(-1)
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum(-1).double().sum()
            if grad is not None:
                grad[rows] = log_q.exp_().sub_(p).to(grad.dtype)
        ctx.save_for_backward(*([grad] if grad is not None else []))
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0].to(grad.dtype), None


def divergence(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> tuple[Tensor, int]:
    """Sum KL(teacher ‖ student) over all tokens.

    Args:
        student: logits (batch, tokens, vocabulary).
        teacher: logits of the same shape, without gradient.
        mask: (batch, tokens), 0 for padding; None if there is none.

    Returns:
        The sum in nats, and the number of tokens.
    """
    student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
    if mask is not None:
        kept = mask.flatten().nonzero()[:, 0].to(student.device)
        student, teacher = student.index_select(0, kept), teacher.index_select(0, kept)
    total: Tensor = _Divergence.apply(student, teacher)  # type: ignore[no-untyped-call]
    return total, len(student)
