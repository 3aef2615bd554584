"""Quantizable layers, seen as one thing: a matrix (out, in) applied to rows.

nn.Linear holds the matrix as it is, transformers' Conv1D holds it transposed, and nn.Conv2d with the kernel flattened
into the inputs.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers.pytorch_utils import Conv1D

# What code raises that needs the values of tensors, or that does not run on the meta device.
NEEDS_VALUES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
LAYER_TYPES = (nn.Linear, Conv1D, nn.Conv2d)


def is_layer(module: nn.Module) -> bool:
    """Whether `module` is a quantizable type with a plain weight."""
    return isinstance(module, LAYER_TYPES) and isinstance(getattr(module, "weight", None), nn.Parameter)


def has_plain_forward(module: nn.Module) -> bool:
    """Whether the forward of a layer is the product with its weight, also in a subclass with another forward.

    Such a forward is tried on a small random weight.
    """
    kind = type(module)
    if kind.forward in [base.forward for base in LAYER_TYPES]:
        return True
    if not isinstance(module, nn.Linear):
        return False
    weight, x = torch.arange(15.0).view(3, 5), torch.arange(10.0).view(1, 2, 5)
    bias = None if module.bias is None else nn.Parameter(torch.ones(3), requires_grad=False)
    small = copy.copy(module)
    small._parameters = {"weight": nn.Parameter(weight, requires_grad=False), "bias": bias}
    try:
        y = kind.forward(small, x)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    expected = F.linear(x, weight, bias)
    return isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected)


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """Return (out_features, in_features) of the weight matrix."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[1]), int(module.weight.shape[0])
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0], weight[0].numel()


def weight_matrix(module: nn.Module) -> Tensor:
    """Return the weight as a matrix (out, in), as a view where the layout allows it."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    weight = weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight.flatten(1)


def set_weight_matrix(module: nn.Module, W: Tensor) -> None:
    """Replace the weight by a matrix (out, in). Other modules that share the old weight keep it."""
    old = module.weight
    assert isinstance(old, Tensor)
    new = W.T.contiguous() if isinstance(module, Conv1D) else W.reshape(old.shape)
    module.weight = nn.Parameter(new.to(old.dtype), requires_grad=False)


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """Return the inputs of the matrix as rows (tokens, in).

    For a convolution, each output position is a row: the patch under the kernel.
    """
    if not isinstance(module, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    patches = F.unfold(padded, module.kernel_size, dilation=module.dilation, stride=module.stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def row_mask(x: Tensor, mask: Tensor) -> Tensor | None:
    """Flatten `mask` (batch, tokens) to the rows of `x`; None if the rows of `x` are not the tokens.

    Layers see (batch, tokens, in) or, in models that flatten early, (batch·tokens, in).
    """
    if x.shape[:-1] == mask.shape or (x.ndim == 2 and x.shape[0] == mask.numel()):
        return mask.reshape(-1).bool()
    return None


def empty_state(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name, without values: on the meta device."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}


def without_cache(model: nn.Module) -> dict[str, bool]:
    """Return the arguments that keep a model's forward from filling a cache of keys and values."""
    accepted = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    takes_it = "use_cache" in accepted or (takes_any and hasattr(model, "config"))
    return {"use_cache": False} if takes_it else {}


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give `module` another forward while entered."""
    previous = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if previous is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = previous
