"""What a kernel is: a way to multiply with a quantized weight, and the conditions under which it can.

A kernel of fewbit's own holds no state. What it needs at run time lies in the layer's buffers: the canonical tensors
of the checkpoint, or the kernel's own form of ``qweight``, and perhaps of ``scales``, from which they can be restored
bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..quantized_matrix import QuantizedMatrix


@dataclass(frozen=True)
class KernelSpec:
    """What a kernel must know of a layer before it is chosen.

    Attributes:
        act_order: groups are not consecutive inputs.
        even_groups: every group has `group_size` inputs (the last may have fewer without act-order).
        format: "gptq" or "gptq_v2", of the canonical tensors.
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
    def why_not(
        self, spec: KernelSpec, device: torch.device, dtype: torch.dtype, trainable: bool
    ) -> str | None:
        """The first condition that keeps this kernel from running such a layer, in words; None if it can.

        Args:
            spec: the layer.
            device: where its tensors lie.
            dtype: of the activations.
            trainable: whether gradients to the input are needed.
        """

    def distrust(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why "auto" should not take this kernel although it can run the layer, in words; None if it may.

        Asked after `why_not`, and only where the kernel was not asked for by name. May run the kernel to find out.
        """
        return None

    def repack(self, layer: QuantizedBuffers) -> dict[str, Tensor]:
        """Buffers that take the place of ``qweight``; empty where the kernel reads ``qweight`` itself.

        Where `repacks_scales`, they take the place of ``scales`` too.
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
