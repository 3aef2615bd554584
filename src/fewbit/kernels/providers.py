"""GPTQModel's kernels, for users who ask for them by name: its layer classes behind fewbit's `Kernel`.

All of its classes are used in the same way: they are constructed, loaded with the tensors of a checkpoint, prepared
(`post_init`) and called. So each kernel is a row of `PROVIDERS`, and `WrappedKernel` serves every row. Conditions that
are known without the package are in the row; the package checks the others (`validate`). Written for GPTQModel 7.7.
The two CPU classes are tested; **fewbit's authors have never run the four CUDA classes on a GPU**.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import layout
from ..errors import KernelError
from .spec import Kernel, KernelSpec, QuantizedBuffers

PACKAGE = "gptqmodel"
_MARKER = "words_elsewhere"  # a buffer that marks that the package's layer holds the codes
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Provider:
    """A kernel of the package, and the conditions that are known without it.

    Attributes:
        name: name of the kernel.
        summary: short description.
        layer_class: "module:class" in the package's `nn_modules.qlinear`; "" if no current package has it.
        device: type of the device that it runs on.
        dtypes: supported dtypes of the activations.
        bits: supported bits per code.
        group_sizes: supported group sizes; −1 is one group per row.
        needs_symmetry: whether it supports only the zero point 2^(bits−1).
        in_multiple: what in_features must be a multiple of, in addition to the group size.
        out_multiple: what out_features must be a multiple of.
        needs_scratch: whether its `post_init` needs memory to unpack a weight into.
    """

    name: str
    summary: str
    layer_class: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    needs_symmetry: bool = False
    in_multiple: int = 32
    out_multiple: int = 32
    needs_scratch: bool = False

    def unsupported_reason(
        self, spec: KernelSpec, device: torch.device, dtype: torch.dtype, trainable: bool
    ) -> str | None:
        """The first condition that fails, in words; None where only the package itself can tell.

        Gradients to the input never fail: `WrappedKernel` computes them from the dequantized weight.
        """
        in_multiple = max(self.in_multiple, spec.group_size)
        conditions = (
            (bool(self.layer_class), f"no current package has it ({self.summary})"),
            (spec.kind == "linear", f"the layer is a {spec.kind}, not a linear layer"),
            (device.type == self.device, f"device is {device.type}, not {self.device}"),
            (dtype in self.dtypes, f"activations are {_name(dtype)}, not {_any_of(map(_name, self.dtypes))}"),
            (spec.bits in self.bits, f"bits {spec.bits} is not {_any_of(self.bits)}"),
            (
                spec.group_size in self.group_sizes,
                f"group_size {spec.group_size} is not {_any_of(self.group_sizes)}",
            ),
            (
                spec.sym or not self.needs_symmetry,
                "the layer is asymmetric; only symmetric ones (sym=True)",
            ),
            (spec.even_groups, "g_idx gives some groups more or fewer inputs than group_size"),
            (
                spec.in_features % in_multiple == 0 and spec.out_features % self.out_multiple == 0,
                f"shape {spec.out_features} x {spec.in_features} (out x in) is not a multiple of "
                f"{self.out_multiple} x {in_multiple}",
            ),
            (
                importlib.util.find_spec(PACKAGE) is not None,
                f"the package {PACKAGE} is not installed (pip install {PACKAGE})",
            ),
        )
        return next((reason for holds, reason in conditions if not holds), None)

    def open(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> WrappedKernel:
        """The kernel for one layer. Imports the package, and may compile its operators: minutes, once per machine.

        Raises:
            KernelError: the package does not import, lacks the class, or refuses the layer; with its own words.
        """
        module_name, _, class_name = self.layer_class.partition(":")
        try:
            module = importlib.import_module(f"{PACKAGE}.nn_modules.qlinear.{module_name}")
        except ImportError as error:
            raise KernelError(
                f"kernel {self.name!r}: {PACKAGE} is installed but does not import: {_first_line(error)}"
            ) from error
        layer_class = getattr(module, class_name, None)
        if layer_class is None:
            raise KernelError(
                f"kernel {self.name!r}: this version of {PACKAGE} has no {class_name}; fewbit knows version 7.7"
            )
        fits, reason = layer_class.validate(
            **_settings(spec, spec.sym), dtype=dtype, device=device, trainable=False
        )
        if not fits:
            raise KernelError(f"kernel {self.name!r}: {PACKAGE} refuses the layer: {_first_line(reason)}")
        return WrappedKernel(self, layer_class, spec, dtype)


PROVIDERS: tuple[Provider, ...] = (
    Provider(
        "marlin", "GPTQModel's Marlin", "marlin:MarlinLinear",
        "cuda", _HALF, (4, 8), (-1, 32, 64, 128), needs_symmetry=True,
    ),
    Provider(
        "machete", "GPTQModel's Machete, for Hopper GPUs", "machete:MacheteLinear",
        "cuda", _HALF, (4, 8), (-1, 64, 128), in_multiple=64, out_multiple=128,
    ),
    Provider(
        "exllamav2", "GPTQModel's ExLlamaV2", "exllamav2:ExllamaV2Linear",
        "cuda", _HALF, (4,), (-1, 32, 64, 128), needs_scratch=True,
    ),
    Provider("exllama", "superseded by exllama_v2", "", "cuda", _HALF, (4,), (-1, 32, 64, 128)),
    Provider(
        "tritonv2", "GPTQModel's Triton kernel", "tritonv2:TritonV2Linear",
        "cuda", _HALF, (2, 4, 8), (-1, 32, 64, 128, 256, 512, 1024),
    ),
    Provider(
        "torch_aten", "torch's int4 operator, through GPTQModel", "torch_aten_kernel:TorchAtenLinear",
        "cpu", _HALF, (4,), (32, 64, 128, 256),
    ),
    Provider(
        "torch_cpu_avx512", "GPTQModel's kernel for AVX512-BF16", "torch_cpu_avx512:TorchCpuAvx512Linear",
        "cpu", (torch.bfloat16,), (4,), (32, 64, 128, 256, 512),
    ),
)  # fmt: skip


class WrappedKernel(Kernel):
    """One layer of the package.

    Unlike fewbit's own kernels it holds state: that layer, and in host memory the tensors that it was made of. The
    package rewrites its own tensors, so what fewbit saves and moves comes from here, bit for bit.
    """

    def __init__(self, provider: Provider, layer_class: Any, spec: KernelSpec, dtype: torch.dtype) -> None:
        self.name, self.summary = provider.name, provider.summary
        self._provider, self._class, self._spec, self._dtype = provider, layer_class, spec, dtype
        self._sym = spec.sym
        self._tensors: dict[str, Tensor] = {}
        self._layer: Any = None

    def unsupported_reason(
        self, spec: KernelSpec, device: torch.device, dtype: torch.dtype, trainable: bool
    ) -> str | None:
        return self._provider.unsupported_reason(spec, device, dtype, trainable)

    def repack(self, layer: QuantizedBuffers) -> dict[str, Tensor]:
        """Build the package's layer on `layer`'s device.

        Raises:
            KernelError: the package would silently compute with another weight, or cannot prepare its layer.
        """
        codes = layer.codes()
        middle = 1 << (codes.bits - 1)
        # A checkpoint may call a layer symmetric that is not, and some classes then ignore zero points.
        self._sym = bool((codes.zeros == middle).all())
        if self._provider.needs_symmetry and not self._sym:
            raise KernelError(
                f"kernel {self.name!r} ignores zero points, and this layer has some that are not "
                f"{middle} although the checkpoint says sym: true; use kernel='auto'"
            )
        if not torch.equal(codes.scales.half().to(codes.scales.dtype), codes.scales):
            raise KernelError(
                f"kernel {self.name!r} keeps scales in float16, which cannot hold this layer's; use kernel='auto'"
            )
        fmt = "gptq_v2" if self._class.REQUIRES_FORMAT_V2 else "gptq"
        self._tensors = {name: tensor.cpu() for name, tensor in layout.pack(codes, fmt).items()}
        self._layer = self._build(codes.codes.device)
        return {_MARKER: torch.empty(0)}

    def restore(self, layer: QuantizedBuffers) -> Tensor:
        return self._tensors[layout.QWEIGHT].to(layer.get_buffer(layout.SCALES).device)

    def linear(self, x: Tensor, layer: QuantizedBuffers) -> Tensor:
        y: Tensor = _Product.apply(x, self, layer) if x.requires_grad else self.product(x)  # type: ignore[no-untyped-call]
        return y if layer.bias is None else y + layer.bias.to(y.dtype)

    def product(self, x: Tensor) -> Tensor:
        """``x @ weightᵀ`` by the package, in x's dtype: (…, in) → (…, out). No gradient."""
        if x.numel() == 0:
            return x.new_empty((*x.shape[:-1], self._spec.out_features))
        with torch.no_grad():
            y: Tensor = self._layer(x.to(self._dtype).contiguous())
        return y.to(x.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> WrappedKernel:
        # A layer may hold addresses of its tensors, so a copy is built from scratch.
        copy = WrappedKernel(self._provider, self._class, self._spec, self._dtype)
        copy._sym, copy._tensors = self._sym, self._tensors
        if self._layer is not None:
            copy._layer = copy._build(next(iter(self._layer.state_dict().values())).device)
        return copy

    def _build(self, device: torch.device) -> Any:
        try:
            with torch.device(device):
                layer = self._class(
                    **_settings(self._spec, self._sym), bias=False, register_buffers=True, dtype=self._dtype
                )
            layer = layer.to(device)
            result = layer.load_state_dict(self._tensors, strict=False)
            if set(result.missing_keys) & set(layout.PARTS) or result.unexpected_keys:
                raise KernelError(
                    f"kernel {self.name!r}: this version of {PACKAGE} keeps other tensors than qweight, qzeros, "
                    "scales and g_idx; fewbit knows version 7.7"
                )
            if self._class.REQUIRES_FORMAT_V2:
                layer.qzero_format(format=2)
            layer.eval()
            layer.post_init(
                **({"scratch_space": _scratch(layer, device)} if self._provider.needs_scratch else {})
            )
        except KernelError:
            raise
        except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
            raise KernelError(
                f"kernel {self.name!r}: {PACKAGE} cannot prepare its layer: {_first_line(error)}"
            ) from error
        return layer


class _Product(torch.autograd.Function):
    """The package's product, with the gradient of the dequantized weight, which is not kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: WrappedKernel, layer: Any) -> Tensor:
        ctx.layer = layer
        return kernel.product(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        return grad @ ctx.layer.dequantize(grad.dtype), None, None


# Layers of one size on one device unpack into the same memory, one after the other.
_SCRATCH: dict[tuple[torch.device, int], Any] = {}


def _scratch(layer: Any, device: torch.device) -> Any:
    size = layer.temp_dq_size()
    if (device, size) not in _SCRATCH:
        space = importlib.import_module(f"{PACKAGE}.utils.exllamav2").ScratchSpace
        _SCRATCH[device, size] = space(scratch_bytes=size + 128, dev=device)
    return _SCRATCH[device, size]


def _settings(spec: KernelSpec, sym: bool) -> dict[str, Any]:
    """A layer's settings as the package's classes take them."""
    return {
        "bits": spec.bits,
        "group_size": spec.group_size,
        "desc_act": spec.act_order,
        "sym": sym,
        "in_features": spec.in_features,
        "out_features": spec.out_features,
        "pack_dtype": torch.int32,
    }


def _any_of(values: Iterable[object]) -> str:
    words = list(map(str, values))
    return " or ".join(words) if len(words) < 3 else "one of " + ", ".join(words)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first_line(error: object) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
