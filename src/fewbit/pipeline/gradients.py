"""How the model's output depends on every layer: inputs and output gradients of the same tokens.

`run_backward` runs the model forward and backward over some batches and does not change it.

The labels are drawn from the model's own distribution p, and g_t is the gradient of log p(labels) with respect to a
layer's output at token t. The second-order term of the KL divergence is ½ Δyᵀ F Δy with the Fisher information
F = E[g gᵀ]. So a small change Δy_t causes a KL divergence of E[½ (g_tᵀ Δy_t)²].

Memory: the inputs of every block for one batch, one block's activations, and what the caller keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..calibration import Calibration
from ..errors import ModelError
from ..modeling.layers import forward_replaced, input_rows, is_layer, without_cache
from ..planning import Plan, block_of

# Positions × vocabulary of one float32 softmax: 64 MB.
_CHUNK_ELEMENTS = 1 << 24


# Called with the input rows x (tokens, in) of one call of a layer. What it returns is called in the backward pass with
# g (tokens, out), the gradient of the log-likelihood of the labels with respect to the output rows. Both have the
# dtype of the activations. What it keeps of x stays in memory until then.
Take = Callable[[Tensor], Callable[[Tensor], None]]


def run_backward(
    model: nn.Module,
    takes: Mapping[str, Take],
    blocks: Sequence[nn.Module],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    seed: int,
    progress: Callable[[int, int], None],
    release: Callable[[], None] = lambda: None,
) -> int:
    """Run all batches forward and backward.

    Args:
        model: model in evaluation mode.
        takes: name of a layer → what gets its rows.
        blocks: modules whose activations are computed again in the backward pass; only their inputs are kept.
        batches: keyword arguments of the model, on its device.
        seed: seed of the labels.
        progress: callback, called as ``progress(done, total)`` after each batch.
        release: called when a block was computed; its weights may then leave the model until the block runs again.

    Returns:
        The number of positions whose labels were drawn.

    Raises:
        ModelError: gradients cannot be computed through this model.
    """
    device = next(iter(batches[0].values())).device
    generator = torch.Generator(device).manual_seed(seed)
    positions = 0
    with ExitStack() as undo:
        undo.enter_context(torch.enable_grad())
        undo.enter_context(_frozen(model))
        undo.enter_context(_recomputed(blocks, release))
        for name, take in takes.items():
            hook = model.get_submodule(name).register_forward_hook(_hook(take), with_kwargs=True)
            undo.callback(hook.remove)
        for done, batch in enumerate(batches, start=1):
            positions += _forward_backward(model, batch, generator)
            progress(done, len(batches))
    return positions


def some_batches(
    calibration: Calibration, tokens: int, least: int, device: torch.device
) -> list[dict[str, Tensor]]:
    """Batches evenly from the calibration set: `least` of them, or more if these have fewer than `tokens` tokens."""
    count = len(calibration.batches)
    # Ready-made batches may hold no tokens.
    for_tokens = -(-tokens * count // calibration.tokens) if calibration.tokens else 0
    wanted = min(count, max(least, for_tokens))
    chosen = [calibration.batches[i * count // wanted] for i in range(wanted)]
    return [{key: value.to(device) for key, value in batch.items()} for batch in chosen]


def repeated_blocks(model: nn.Module, plan: Plan) -> list[nn.Module]:
    """The repeated blocks that hold layers of the plan; a layer outside of blocks is none."""
    names = dict.fromkeys(block_of(layer.name) for layer in plan.layers)
    modules = [model.get_submodule(name) for name in names]
    return [module for module in modules if not is_layer(module)]


def _forward_backward(model: nn.Module, batch: Mapping[str, Tensor], generator: torch.Generator) -> int:
    """Run one batch forward and backward. Returns the number of labels drawn."""
    advice = "target_bits and loss_aware need the gradients of every layer: leave them out"
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


def _hook(take: Take) -> Callable[[nn.Module, Any, dict[str, Any], Tensor], Tensor]:
    """A forward hook that hands the input rows, and later the gradients of the output rows, to `take`."""

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if not output.requires_grad:  # the first layers, where the gradients end
            # Cloned, because a model may change it in place, which a leaf does not allow.
            output = output.detach().requires_grad_().clone()
        first: Tensor = args[0] if args else next(iter(kwargs.values()))
        take_gradients = take(input_rows(module, first.detach()))
        # A block that is computed again gives new outputs, whose hooks never run: each call counts once.
        output.register_hook(lambda g: take_gradients(_output_rows(module, g)))  # type: ignore[no-untyped-call]
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
def _recomputed(blocks: Sequence[nn.Module], release: Callable[[], None]) -> Iterator[None]:
    """Keep only the inputs of `blocks`; the backward pass computes their activations again."""

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return forward(*args, **kwargs)
            finally:  # the second time it ends early, with an exception, once all activations are there
                release()

        return lambda *args, **kwargs: checkpoint(run, *args, use_reentrant=False, **kwargs)

    with ExitStack() as undo:
        for block in blocks:
            undo.enter_context(forward_replaced(block, wrap(block.forward)))
        yield
