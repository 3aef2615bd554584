"""An output layer that multiplies with 8 bits while the model keeps its weight.

In a small model the output layer is most of what one token reads, and it is rarely quantized. Here a copy of its
weight, rounded to 8 bits in groups of 64 inputs, serves the products on the CPU. The weight itself does not change: it
may be shared with the embeddings, it is saved, moved and trained as before, and it is used wherever the copy cannot be.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ... import native
from ...checkpoint import layout
from ...errors import ConfigError
from ...quantized_matrix import group_count, sequential_groups
from ..linear import QuantizedLayer
from . import packed
from .kernel import product
from .packed import Rounding

BITS, GROUP = 8, 64
SHARE = 0.1  # largest squared error of the copy, as a share of the squared error of the quantized layers
# Mean squared error of rounding normally distributed weights to the best uniform grid, by bits (J. Max, 1960), as a
# share of their variance.
_ROUNDING = {2: 0.1188, 3: 0.03744, 4: 0.01154, 8: 1e-4}
_SAMPLE = 256  # rows whose error is measured
_ROWS = 4096  # rounded at a time


class Int8LMHead(nn.Linear):
    """The output layer with its weight and an 8-bit copy of it, which is used unless the weight is trained.

    Args:
        linear: the layer; its parameters are shared, not copied.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: there is no weight to create
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.copy = round_to_8_bits(linear.weight.detach())
        self._copied = (linear.weight.data_ptr(), linear.weight._version)

    def forward(self, input: Tensor) -> Tensor:
        """(…, in) → (…, out), in the input's dtype."""
        weight = self.weight
        # A compiler cannot read addresses: its graph assumes that the weight does not change.
        current = torch.compiler.is_compiling() or (weight.data_ptr(), weight._version) == self._copied
        trained = torch.is_grad_enabled() and weight.requires_grad
        if input.is_cpu and current and not trained:
            return product(input, self.copy, self.bias, rounding=Rounding.NONE)
        return functional.linear(input, weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, runtime_bits={BITS}"


def round_to_8_bits(weight: Tensor) -> packed.PackedWeight:
    """A packed copy of a weight (out, in), each group of 64 inputs rounded to the nearest multiple of max|w| / 127."""
    words, scales, order = _rounded(weight)
    return packed.pack(words, scales, torch.full((1, 1), 128), order, BITS)


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes (words, out) with zero point 128, scales (groups, out) and the group of each input."""
    out_features, in_features = weight.shape
    groups = group_count(in_features, GROUP)
    words = torch.empty((layout.word_count(in_features, BITS), out_features), dtype=torch.int32)
    scales = torch.empty((groups, out_features), dtype=torch.bfloat16)
    for first in range(0, out_features, _ROWS):
        rows = weight[first : first + _ROWS].float()
        padded = functional.pad(rows, (0, groups * GROUP - in_features)).reshape(len(rows), groups, GROUP)
        scale = (padded.abs().amax(dim=2) / 127).bfloat16()
        inverse = torch.where(scale > 0, 1 / scale.float(), 0.0).unsqueeze(2)
        codes = (padded * inverse).round().clamp(-127, 127).add(128).to(torch.uint8)
        words[:, first : first + _ROWS] = layout.pack_rows(codes.flatten(1)[:, :in_features], BITS).t()
        scales[:, first : first + _ROWS] = scale.t()
    return words, scales, sequential_groups(in_features, GROUP)


def reason_against_int8(model: nn.Module) -> str | None:
    """Why the output layer should stay as it is by default; None if 8 bits cost next to nothing.

    The squared error of the 8-bit copy must be below a tenth of the quantized layers' own. In float32 nothing is
    rounded unless asked for.
    """
    head = _output_layer(model)
    if isinstance(head, QuantizedLayer):
        return "it is quantized in the checkpoint"
    if not isinstance(head, nn.Linear) or head.weight.device.type != "cpu":
        return "there is no linear output layer on the CPU"
    if not native.available():
        return native.unsupported_reason()
    if head.weight.dtype is torch.float32:
        return "the model is in float32"
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    weights = [layer.spec.in_features * layer.spec.out_features for layer in layers]
    own = sum(_ROUNDING[layer.bits] * n for layer, n in zip(layers, weights, strict=True)) / max(
        sum(weights), 1
    )
    rows = head.weight.detach()[:: -(-head.out_features // _SAMPLE)].float()
    words, scales, order = _rounded(rows)
    codes = layout.unpack_rows(words.t().contiguous(), BITS, head.in_features).float() - 128
    rounded = codes * scales.t().float().index_select(1, order.long())
    error = float(
        (rounded - rows).square().sum() / rows.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
    )
    if not own:
        return "no layer is quantized"
    return f"8 bits would add {error / own:.0%} to its squared error" if error > SHARE * own else None


def _output_layer(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    found: nn.Module | None = get() if get is not None else None
    return found


def add_int8_lm_head(model: nn.Module, bits: int | str) -> None:
    """Give a model's output layer an 8-bit copy of its weight to multiply with.

    Raises:
        ConfigError: `bits` is not 8, the model has no output layer or has it on another device, the layer is quantized
            already, or the compiled module is missing.
    """
    if bits != BITS:
        raise ConfigError(f"lm_head_runtime must be 8, 16 or 'auto', got {bits!r}")
    head = _output_layer(model)
    if head is None:
        raise ConfigError(f"{type(model).__name__} has no output layer: leave out lm_head_runtime")
    if isinstance(head, QuantizedLayer):
        raise ConfigError("the output layer is quantized in the checkpoint: leave out lm_head_runtime")
    if not isinstance(head, nn.Linear):
        raise ConfigError(
            f"the output layer is a {type(head).__name__}, not a linear layer: leave out lm_head_runtime"
        )
    if head.weight.device.type != "cpu":
        raise ConfigError(
            f"lm_head_runtime is for CPUs, and the output layer is on {head.weight.device}: leave it out"
        )
    if not native.available():
        raise ConfigError(f"lm_head_runtime cannot work: {native.unsupported_reason()}")
    for name, module in model.named_modules():
        if module is head:
            model.set_submodule(name, Int8LMHead(head))
