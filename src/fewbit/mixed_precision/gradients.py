"""How the model's output depends on every layer: inputs and output gradients of the same tokens.

`collect_samples` runs the model forward and backward over a few batches and does not change it.

The labels are drawn from the model's own distribution p, and g_t is the gradient of log p(labels) with respect to a
layer's output at token t. The second-order term of the KL divergence is ½ Δyᵀ F Δy with the Fisher information
F = E[g gᵀ]. So a small change Δy_t causes a KL divergence of E[½ (g_tᵀ Δy_t)²].

Memory: the inputs of every block for one batch, one block's activations, and the rows that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import ModelError
from ..modeling.layers import input_rows
from ..pipeline.quantize_layers import without_cache

# Positions × vocabulary of one float32 softmax: 64 MB.
_CHUNK_ELEMENTS = 1 << 24


@dataclass
class LayerSample:
    """Some tokens of one layer, in the dtype of the activations; one tensor for each call of the layer.

    Attributes:
        x: inputs (tokens, in).
        g: gradients (tokens, out) of the log-likelihood of the labels, scaled so that a sum of (gᵀ Δy)² over these
            tokens estimates the sum over all tokens.
    """

    x: list[Tensor] = field(default_factory=list)
    g: list[Tensor] = field(default_factory=list)

    def rows(self) -> tuple[Tensor, Tensor]:
        """x and g, each as one tensor."""
        return torch.cat(self.x), torch.cat(self.g)


def collect_samples(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    blocks: Sequence[nn.Module],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    rows: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> tuple[dict[str, LayerSample], int]:
    """Inputs and gradients of all layers, and the number of positions whose labels were drawn.

    Args:
        model: model in evaluation mode.
        layers: layers of the model, by name.
        blocks: modules whose activations are computed again in the backward pass; only their inputs are kept.
        batches: keyword arguments of the model, on its device.
        rows: tokens kept per layer and batch.
        seed: seed of the labels.
        progress: callback, called as ``progress(done, total)`` after each batch.

    Raises:
        ModelError: gradients cannot be computed through this model.
    """
    samples = {name: LayerSample() for name in layers}
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    positions = 0
    with ExitStack() as undo:
        undo.enter_context(torch.enable_grad())
        undo.enter_context(_frozen(model))
        undo.enter_context(_recomputed(blocks))
        for name, module in layers.items():
            hook = _keep(samples[name], rows)
            undo.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        for done, batch in enumerate(batches, start=1):
            positions += _forward_backward(model, batch, generator)
            progress(done, len(batches))
    return samples, positions


def _forward_backward(model: nn.Module, batch: Mapping[str, Tensor], generator: torch.Generator) -> int:
    """Run one batch forward and backward. Returns the number of labels drawn."""
    advice = "target_bits measures every layer by its gradients: leave target_bits out and choose bits with override"
    try:
        output = model(**batch, **without_cache(model))
        result, score = _result(output)
        if result is None or not result.requires_grad:
            raise ModelError(f"no gradient reaches the output of {type(model).__name__}. {advice}")
        gradient, count = score(result.detach(), _counted(result, batch), generator)
        torch.autograd.backward([result], [gradient])
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"no gradients through {type(model).__name__}: {reason}. {advice}") from error
    return count


Score = Callable[[Tensor, Tensor | None, torch.Generator], tuple[Tensor, int]]


def _result(output: Any) -> tuple[Tensor | None, Score]:
    """The part of a model's output that is compared: its logits, or its first tensor (the last hidden state)."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits, label_score
    first = output if isinstance(output, Tensor) else output[0]
    return first if isinstance(first, Tensor) else None, gaussian_score


def label_score(logits: Tensor, counted: Tensor | None, generator: torch.Generator) -> tuple[Tensor, int]:
    """Gradient of Σ log p(label) with respect to the logits, the labels drawn from p: onehot(label) − p.

    Args:
        logits: float (..., vocabulary).
        counted: bool (...), positions with a label; None for all.
        generator: random numbers for the labels.

    Returns:
        The gradient, of the shape and dtype of the logits, and the number of labels.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    gradient = torch.empty_like(flat)
    step = max(1, _CHUNK_ELEMENTS // flat.shape[-1])
    for start in range(0, len(flat), step):
        p = flat[start : start + step].float().softmax(-1)
        labels = torch.multinomial(p, 1, generator=generator)
        gradient[start : start + step] = p.neg_().scatter_add_(1, labels, torch.ones_like(p[:, :1]))
    return _only(gradient, counted, logits)


def gaussian_score(hidden: Tensor, counted: Tensor | None, generator: torch.Generator) -> tuple[Tensor, int]:
    """The same for outputs other than logits: labels ~ N(hidden, σ² I), σ² being the mean square of `hidden`.

    The KL divergence is then half the squared relative error of the output, summed over its features.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    noise = torch.randn(flat.shape, generator=generator, device=flat.device)
    sigma = flat.float().square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return _only((noise / sigma).to(hidden.dtype), counted, hidden)


def _only(gradient: Tensor, counted: Tensor | None, like: Tensor) -> tuple[Tensor, int]:
    if counted is None:
        return gradient.view_as(like), len(gradient)
    gradient *= counted.reshape(-1, 1)
    return gradient.view_as(like), int(counted.sum())


def _counted(result: Tensor, batch: Mapping[str, Tensor]) -> Tensor | None:
    """Which positions of the result are not padding; None for all."""
    mask = batch.get("decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask")
    return mask.bool() if mask is not None and mask.shape == result.shape[:-1] else None


def _keep(sample: LayerSample, rows: int) -> Callable[[nn.Module, Any, dict[str, Any], Tensor], Tensor]:
    """A forward hook that puts some input rows, and later their gradients, into `sample`."""

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if not output.requires_grad:  # the first layers, where the gradients end
            # Cloned, because a model may change it in place, which a leaf does not allow.
            output = output.detach().requires_grad_().clone()
        first: Tensor = args[0] if args else next(iter(kwargs.values()))
        x = input_rows(module, first.detach())
        kept = torch.linspace(0, len(x) - 1, min(rows, len(x)), device=x.device).round().long()
        x_kept, scale = x[kept], (len(x) / max(len(kept), 1)) ** 0.5

        def take(gradient: Tensor) -> None:
            sample.x.append(x_kept)
            sample.g.append(_output_rows(module, gradient)[kept] * scale)

        # A block that is computed again gives new outputs, whose hooks never run: each call counts once.
        output.register_hook(take)  # type: ignore[no-untyped-call]
        return output

    return hook


def _output_rows(module: nn.Module, y: Tensor) -> Tensor:
    """Outputs as rows (tokens, out), in the order of `input_rows`."""
    if isinstance(module, nn.Conv2d):
        y = y.flatten(2).transpose(1, 2)
    return y.reshape(-1, y.shape[-1])


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Switch off gradients of the weights, which would take as much memory as the model."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def _recomputed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Keep only the inputs of `blocks`; the backward pass computes their activations again."""

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)

    previous = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.__dict__["forward"] = wrap(block.forward)
        yield
    finally:
        for block, forward in zip(blocks, previous, strict=True):
            if forward is None:
                del block.__dict__["forward"]
            else:
                block.__dict__["forward"] = forward
