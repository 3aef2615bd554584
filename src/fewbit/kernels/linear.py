"""Layers whose weight stays quantized: `QuantLinear`, and the base class that it shares with `QuantConv2d`.

A layer holds either the canonical tensors of the checkpoint, or a kernel's form of ``qweight`` (and of ``scales``) from
which they can be restored bit for bit. A layer always saves the canonical tensors, with the bytes that were loaded,
even if the model was cast or moved in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import torch_internals, transformers_internals
from ..checkpoint import layout
from ..checkpoint.quantization_config import LayerFormat
from ..errors import CheckpointError, KernelError
from ..quantized_matrix import QuantizedMatrix, group_count, sequential_groups
from . import registry
from .spec import Kernel, KernelSpec

if TYPE_CHECKING:
    from typing_extensions import Self

_PADDING = "qweight_padding"
_UNCHANGEABLE = (
    "the weight of a quantized layer cannot be changed in place; "
    "dequantize the model first (model.dequantize()) or train an adapter beside it"
)


class QuantizedWeight(Tensor):
    """A stand-in for a quantized layer's weight: it knows shape, dtype and device, and dequantizes for anything else.

    Other libraries read ``weight.dtype`` and ``weight.device``, and some read the numbers. Changing the numbers
    in place raises `KernelError`.
    """

    _layer: QuantizedLayer

    @staticmethod
    def __new__(cls, layer: QuantizedLayer, shape: tuple[int, ...]) -> QuantizedWeight:
        weight: QuantizedWeight = Tensor._make_wrapper_subclass(
            cls, shape, dtype=layer.compute_dtype, device=layer.device
        )
        weight._layer = layer
        transformers_internals.mark_loaded(weight)
        return weight

    def __init__(self, layer: QuantizedLayer, shape: tuple[int, ...]) -> None:
        super().__init__()

    @property
    def data(self) -> Tensor:
        """The stand-in itself."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        raise KernelError(_UNCHANGEABLE)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"QuantizedWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run any operation on the dequantized weight."""
        if torch_internals.is_mutating(func) and args and isinstance(args[0], QuantizedWeight):
            raise KernelError(_UNCHANGEABLE)

        def dense(value: Any) -> Any:
            return (
                value._layer.dequantize().view(value.shape) if isinstance(value, QuantizedWeight) else value
            )

        return func(*torch_internals.tree_map(dense, args), **torch_internals.tree_map(dense, kwargs or {}))


class QuantizedLayer(nn.Module):
    """Buffers ``qweight``, ``qzeros``, ``scales``, ``g_idx``; a kernel; save, load, move and cast."""

    QUANT_TYPE = "fewbit"

    spec: KernelSpec
    compute_dtype: torch.dtype
    bias: Any  # nn.Parameter or None

    def _set_up(
        self, spec: KernelSpec, tensors: Mapping[str, Tensor], bias: Tensor | None, compute_dtype: torch.dtype
    ) -> None:
        """Take the canonical tensors, which may be on the meta device until a loader fills them."""
        groups = group_count(spec.in_features, spec.group_size)
        problems = layout.shape_problems(tensors, spec.bits, groups, spec.in_features, spec.out_features)
        if problems:
            raise CheckpointError("not the tensors of a quantized layer: " + "; ".join(problems))
        self.spec = spec
        self.compute_dtype = compute_dtype
        self.desc_act = spec.act_order
        self.transposed_weight = False  # whether the layer replaced a transformers Conv1D
        for name in (layout.QWEIGHT, layout.QZEROS, layout.SCALES):
            self.register_buffer(name, tensors[name])
        # Where a checkpoint has no g_idx, none is saved either.
        g_idx = tensors.get(layout.G_IDX)
        stored = g_idx is not None
        self.register_buffer(layout.G_IDX, g_idx if stored else self._sequential(), persistent=stored)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self.kernel: Kernel = registry.get("reference")
        self.kernel_asked = "reference"
        self.trainable = False  # whether a kernel without gradients to the input was ruled out
        self.kernel_reasons: tuple[tuple[str, str | None], ...] = ()
        transformers_internals.mark_loaded(self)

    # Attributes that other libraries read from a GPTQ layer.
    @property
    def bits(self) -> int:
        return self.spec.bits

    @property
    def group_size(self) -> int:
        """Inputs per group, −1 for the whole row."""
        return self.spec.group_size

    @property
    def infeatures(self) -> int:
        """Number of inputs, under AutoGPTQ's name."""
        return self.spec.in_features

    @property
    def outfeatures(self) -> int:
        """Number of outputs, under AutoGPTQ's name."""
        return self.spec.out_features

    @property
    def sym(self) -> bool:
        """Whether the checkpoint calls the grid symmetric."""
        return self.spec.sym

    @property
    def checkpoint_format(self) -> str:
        """ "gptq" or "gptq_v2"."""
        return self.spec.format

    @property
    def device(self) -> torch.device:
        """The device of the quantized tensors."""
        return self.get_buffer(layout.QZEROS).device

    @property
    def weight(self) -> Tensor:
        """A stand-in that dequantizes when its numbers are used (`QuantizedWeight`)."""
        return QuantizedWeight(self, self._weight_shape())

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """All buffers by name."""
        return self._buffers  # type: ignore[return-value]

    def _weight_shape(self) -> tuple[int, ...]:
        return self.spec.out_features, self.spec.in_features

    def __getattr__(self, name: str) -> Any:
        # While a kernel holds the codes, or the scales, in its own form.
        if name in layout.PARTS and "kernel" in self.__dict__ and name in self._repacked():
            return self._restored(name)
        return super().__getattr__(name)

    def codes(self) -> QuantizedMatrix:
        """The weight as numbers."""
        spec = self.spec
        tensors = {name: getattr(self, name) for name in layout.PARTS}
        return layout.unpack(
            tensors, spec.bits, spec.group_size, spec.format, spec.in_features, spec.out_features
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (out, in), computed in float32 and rounded once to `dtype` (default: the layer's)."""
        parts = [getattr(self, name) for name in layout.PARTS]
        result: Tensor = torch.ops.fewbit.dequantize(
            *parts, self.spec.bits, self.spec.format, dtype or self.compute_dtype
        )
        return result

    # The kernel is chosen once, and the reasons are kept.
    def prepare(self, kernel: str = "auto", *, trainable: bool = False) -> None:
        """Choose the kernel for the current tensors, and repack them for it.

        Layers on the meta device, or whose tensors accelerate has offloaded, keep the reference kernel.

        Args:
            kernel: "auto" or the name of a kernel.
            trainable: whether the kernel must give gradients to the input, now and after the layer moves.

        Raises:
            KernelError: the requested kernel cannot run this layer; the message names the condition.
            CheckpointError: g_idx has a group that does not exist.
        """
        self.restore()
        self.trainable = trainable
        if any(buffer.is_meta for buffer in self.buffers()):
            self.kernel_reasons = (("reference", None),)
            return
        g_idx = self.g_idx.cpu()
        layout.check_groups(g_idx, group_count(self.spec.in_features, self.spec.group_size))
        size, counts = self.spec.group_size, torch.bincount(g_idx.long())
        act_order = not torch.equal(g_idx.int(), sequential_groups(self.spec.in_features, size))
        even = not act_order or size == -1 or bool((counts == size).all())
        self.spec = replace(self.spec, act_order=act_order, even_groups=even)
        chosen, reasons = registry.choose(self.spec, self.device, self.compute_dtype, kernel, trainable)
        self.kernel_asked, self.kernel_reasons = kernel, reasons
        packed = chosen.repack(self)
        self.kernel = chosen
        if packed:
            # Some writers pad qweight with unused words, which are saved unchanged.
            words = layout.word_count(self.spec.in_features, self.spec.bits)
            packed[_PADDING] = self.qweight[words:].clone()
            del self._buffers[layout.QWEIGHT]
            if chosen.repacks_scales:
                del self._buffers[layout.SCALES]
        for name, tensor in packed.items():
            self.register_buffer(name, tensor, persistent=False)

    def restore(self) -> None:
        """Go back to the canonical tensors and the reference kernel."""
        canonical = {name: self._restored(name) for name in self._repacked()}
        if canonical:
            for name in set(self._buffers) - set(layout.PARTS):
                del self._buffers[name]
                torch_internals.non_persistent_buffers(self).discard(name)
            self._buffers.update(canonical)
        self.kernel = registry.get("reference")

    def _repacked(self) -> list[str]:
        """The canonical tensors that the kernel holds in its own form."""
        return [name for name in layout.PARTS if name not in self._buffers]

    def _restored(self, name: str) -> Tensor:
        if name == layout.SCALES:
            return self.kernel.restore_scales(self)
        return torch.cat([self.kernel.restore(self), self.get_buffer(_PADDING)]).contiguous()

    def _sequential(self) -> Tensor:
        return sequential_groups(self.spec.in_features, self.spec.group_size)

    def fill_in_g_idx(self) -> None:
        """Write the g_idx that the checkpoint left out, after a loader has allocated the buffers."""
        if layout.G_IDX in torch_internals.non_persistent_buffers(self):
            self._buffers[layout.G_IDX] = self._sequential().to(self.device)

    # Moving, saving and loading, as nn.Module does it.
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the quantized tensors, but never cast them: the checkpoint defines their dtypes."""
        probe = fn(torch.empty(0, dtype=self.compute_dtype, device=self.device))
        changed = (probe.device, probe.dtype) != (self.device, self.compute_dtype)
        prepared = bool(self.kernel_reasons)
        if changed and prepared and not probe.is_meta:
            registry.choose(  # may refuse
                self.spec, probe.device, probe.dtype, self.kernel_asked, self.trainable
            )
            self.restore()
        own = {id(buffer) for buffer in self._buffers.values()}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in own and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        self.compute_dtype = probe.dtype
        if changed and prepared:
            self.prepare(self.kernel_asked, trainable=self.trainable)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._repacked():
            destination[prefix + name] = self._restored(name)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        self.restore()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.kernel_reasons:
            self.prepare(self.kernel_asked, trainable=self.trainable)

    def extra_repr(self) -> str:
        spec = self.spec
        return (
            f"in_features={spec.in_features}, out_features={spec.out_features}, "
            f"bias={self.bias is not None}, bits={spec.bits}, group_size={spec.group_size}, sym={spec.sym}, "
            f"format={spec.format!r}, kernel={self.kernel.name!r}"
        )


class QuantLinear(QuantizedLayer, nn.Linear):  # type: ignore[override]
    """A linear layer with a quantized weight; also an `nn.Linear`, so that adapters accept it.

    Args:
        spec: settings and shape of the layer.
        tensors: ``qweight``, ``qzeros``, ``scales`` and, if stored, ``g_idx``, as in the checkpoint.
        bias: (out,) or None.
        compute_dtype: the value of ``weight.dtype``; follows `.to(dtype)`.

    Raises:
        CheckpointError: the tensors do not fit the spec.
    """

    def __init__(
        self,
        spec: KernelSpec,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None = None,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate a dense weight
        self.in_features = spec.in_features
        self.out_features = spec.out_features
        self._set_up(spec, tensors, bias, compute_dtype)

    @classmethod
    def from_codes(
        cls,
        codes: QuantizedMatrix,
        bias: Tensor | None = None,
        fmt: str = "gptq",
        *,
        sym: bool = False,
        compute_dtype: torch.dtype = torch.float32,
    ) -> QuantLinear:
        """A layer from the solver's result, with the reference kernel; `prepare` chooses a faster one."""
        layer_format = LayerFormat(codes.bits, codes.group_size, sym, codes.has_act_order)
        spec = KernelSpec.of(layer_format, codes.shape, fmt)
        return cls(spec, layout.pack(codes, fmt), bias, compute_dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(…, in) → (…, out), in the input's dtype."""
        return self.kernel.linear(input, self)
