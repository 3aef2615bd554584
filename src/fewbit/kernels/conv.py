"""A 2-D convolution with a quantized weight, stored as a linear layer (out, in·kh·kw)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .linear import QuantizedLayer
from .spec import KernelSpec


class QuantConv2d(QuantizedLayer, nn.Conv2d):  # type: ignore[override]
    """An `nn.Conv2d` (one group) whose weight is dequantized at every call.

    Args:
        spec: a spec with ``kind="conv2d"`` and in_features = in_channels · kernel height · kernel width.
        tensors: tensors of the checkpoint, as for `QuantLinear`.
        like: a convolution with the same channels, kernel size, stride, padding and dilation; its weight is not used.
        bias: (out,) or None.
        compute_dtype: the value of ``weight.dtype``.

    Raises:
        CheckpointError: the convolution is grouped, or the tensors do not fit.
    """

    def __init__(
        self,
        spec: KernelSpec,
        tensors: Mapping[str, Tensor],
        like: nn.Conv2d,
        bias: Tensor | None = None,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        if like.groups != 1:
            raise CheckpointError(
                f"a convolution with {like.groups} groups cannot be quantized; only one group"
            )
        nn.Module.__init__(self)
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"):
            setattr(self, name, getattr(like, name))
        self.transposed, self.output_padding, self.groups = False, (0, 0), 1
        self.padding_mode = like.padding_mode
        self._reversed_padding_repeated_twice = like._reversed_padding_repeated_twice
        self._set_up(spec, tensors, bias, compute_dtype)

    def _weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels, *self.kernel_size

    def forward(self, input: Tensor) -> Tensor:
        """(N, in, H, W) → (N, out, H′, W′)."""
        weight = self.dequantize(input.dtype).view(self._weight_shape())
        bias = None if self.bias is None else self.bias.to(input.dtype)
        output: Tensor = self._conv_forward(input, weight, bias)
        return output
