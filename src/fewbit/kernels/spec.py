"""What a kernel is: a way to multiply with a quantized weight, and the conditions under which it can.

fewbit's own kernels hold no state. What they need at run time lies in the layer's buffers: the canonical tensors of the
checkpoint, or the kernel's own form of ``qweight`` (and perhaps of ``scales``), which can be restored bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..checkpoint.quantization_config import LayerFormat
from ..quantized_matrix import QuantizedMatrix


@dataclass(frozen=True)
class KernelSpec:
    """What a kernel must know about a layer before it is chosen.

    Attributes:
        bits: bits per code: 2, 3, 4 or 8.
        group_size: inputs per group; −1 for one group per row.
        sym: whether the checkpoint calls the grid symmetric.
        act_order: whether groups are not consecutive inputs.
        in_features: number of inputs.
        out_features: number of outputs.
        format: format of the canonical tensors, "gptq" or "gptq_v2".
        even_groups: whether every group has `group_size` inputs (without act-order the last may have fewer).
        kind: "linear", or "conv2d" with in_features = in_channels · kernel height · kernel width.
    """

    bits: int
    group_size: int
    sym: bool
    act_order: bool
    in_features: int
    out_features: int
    format: str = "gptq"
    even_groups: bool = True
    kind: str = "linear"

    @classmethod
    def of(
        cls, layer: LayerFormat, shape: tuple[int, int], format: str = "gptq", kind: str = "linear"
    ) -> KernelSpec:
        """The spec of a layer with this format whose weight has this shape (out_features, in_features)."""
        out_features, in_features = shape
        return cls(*layer, in_features, out_features, format=format, kind=kind)

    @property
    def layer_format(self) -> LayerFormat:
        """Bits, group size, symmetry and order."""
        return LayerFormat(self.bits, self.group_size, self.sym, self.act_order)


class QuantizedBuffers(Protocol):
    """The part of a quantized layer that a kernel reads."""

    @property
    def spec(self) -> KernelSpec:
        """The layer's settings and shape."""

    @property
    def bias(self) -> Tensor | None:
        """(out,), or None."""

    def get_buffer(self, target: str) -> Tensor:
        """The buffer called `target`."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """All buffers by name; faster than `get_buffer`."""

    def codes(self) -> QuantizedMatrix:
        """The weight as numbers."""


class Kernel(ABC):
    """One entry of the registry."""

    name: str
    summary: str
    repacks_scales = False

    @abstractmethod
    def unsupported_reason(
        self, spec: KernelSpec, device: torch.device, dtype: torch.dtype, trainable: bool
    ) -> str | None:
        """The first condition that keeps this kernel from running such a layer, in words; None if it can.

        Args:
            spec: the layer.
            device: where its tensors lie.
            dtype: dtype of the activations.
            trainable: whether gradients to the input are needed.
        """

    def self_check(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why "auto" should not take this kernel although it can run the layer, in words; None if it may.

        Called after `unsupported_reason`, and only where the kernel was not requested by name. May run the kernel.
        """
        return None

    def repack(self, layer: QuantizedBuffers) -> dict[str, Tensor]:
        """Buffers that replace ``qweight``, and ``scales`` where `repacks_scales`.

        Empty where the kernel reads ``qweight`` itself.
        """
        return {}

    def restore(self, layer: QuantizedBuffers) -> Tensor:
        """Inverse of `repack`: ``qweight``, int32 (words, out), without what some writers pad it with."""
        raise TypeError(f"kernel {self.name!r} reads qweight itself: there is nothing to restore")

    def restore_scales(self, layer: QuantizedBuffers) -> Tensor:
        """Inverse of `repack` where `repacks_scales`: ``scales``, (groups, out)."""
        raise TypeError(f"kernel {self.name!r} reads scales themselves: there is nothing to restore")

    @abstractmethod
    def linear(self, x: Tensor, layer: QuantizedBuffers) -> Tensor:
        """``x @ weightᵀ + bias`` in x's dtype: (…, in) → (…, out), with gradients to x."""
