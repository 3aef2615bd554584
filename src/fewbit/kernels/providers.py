"""Kernels of another package: GPTQModel's layer classes behind fewbit's interface, only where asked for by name.

All of its classes lead one life: they are constructed, take the tensors of a checkpoint, are prepared (`post_init`)
and called. So a provider is a row of a table, and `Wrapped` lives that life for every row. Conditions that can be
known without the package are in the table; what remains, the package is asked (`validate`). Written for GPTQModel 7.7.

Run for real: the two CPU classes. **The four CUDA classes have never been run on a GPU by fewbit's authors**: their
own Python code was run with stand-ins for their compiled operators (`tests/kernels/test_gptqmodel.py`).
"""

from __future__ import annotations

import importlib
import importlib.util
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import layout
from ..errors import KernelError
from .spec import Kernel, KernelSpec, QuantizedBuffers

PACKAGE = "gptqmodel"
_INSTALL = "pip install gptqmodel"
_ELSEWHERE = "words_elsewhere"


@dataclass(frozen=True)
class Provider:
    """A kernel of another package, and the conditions that can be known without it.

    Attributes:
        summary: what it is.
        layer_class: "module:class" in the package; "" where no package has it any more.
        device: type of the device that it runs on.
        dtypes: of the activations.
        bits, group_sizes: that it takes; −1 is the whole row.
        needs_symmetry: only zero point 2^(bits−1).
        in_multiple, out_multiple: of the layer's sizes.
        needs_scratch: its `post_init` takes memory to unpack a weight into.
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

        Gradients to the input are never a reason: `Wrapped` computes them from the dequantized weight.
        """
        if not self.layer_class:
            return f"no current package has it ({self.summary})"
        if spec.kind != "linear":
            return f"the layer is a {spec.kind}, not a linear layer"
        if device.type != self.device:
            return f"device is {device.type}, not {self.device}"
        if dtype not in self.dtypes:
            return f"activations are {_name(dtype)}, not {_any_of(tuple(map(_name, self.dtypes)))}"
        if spec.bits not in self.bits:
            return f"bits {spec.bits} is not {_any_of(self.bits)}"
        if spec.group_size not in self.group_sizes:
            return f"group_size {spec.group_size} is not {_any_of(self.group_sizes)}"
        if self.needs_symmetry and not spec.sym:
            return "the layer is asymmetric; only symmetric ones (sym=True)"
        if not spec.even_groups:
            return "g_idx gives some groups more or fewer inputs than group_size"
        in_multiple = max(self.in_multiple, spec.group_size)
        if spec.in_features % in_multiple or spec.out_features % self.out_multiple:
            return (
                f"shape {spec.out_features} x {spec.in_features} (out x in) is not a multiple of "
                f"{self.out_multiple} x {in_multiple}"
            )
        if importlib.util.find_spec(PACKAGE) is None:
            return f"the package {PACKAGE} is not installed ({_INSTALL})"
        return None

    def open(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> Wrapped:
        """The kernel for one layer. Imports the package, and may compile its operators: minutes, once per machine.

        Raises:
            KernelError: the package does not import, lacks the class, or refuses the layer; with its own words.
        """
        layer_class = self._layer_class()
        fits, reason = layer_class.validate(
            bits=spec.bits,
            group_size=spec.group_size,
            desc_act=spec.act_order,
            sym=spec.sym,
            in_features=spec.in_features,
            out_features=spec.out_features,
            pack_dtype=torch.int32,
            dtype=dtype,
            device=device,
            trainable=False,
        )
        if not fits:
            raise KernelError(f"kernel {self.name!r}: {PACKAGE} refuses the layer: {_first_line(reason)}")
        return Wrapped(self, layer_class, spec, dtype)

    def _layer_class(self) -> Any:
        module_name, _, class_name = self.layer_class.partition(":")
        try:
            module = importlib.import_module(f"{PACKAGE}.{module_name}")
        except ImportError as error:
            raise KernelError(
                f"kernel {self.name!r}: {PACKAGE} is installed but does not import: {_first_line(error)}"
            ) from error
        found = getattr(module, class_name, None)
        if found is None:
            raise KernelError(
                f"kernel {self.name!r}: this version of {PACKAGE} has no {class_name}; fewbit knows version 7.7"
            )
        return found


_HALF = (torch.float16, torch.bfloat16)
_LAYERS = "nn_modules.qlinear"

PROVIDERS: tuple[Provider, ...] = (
    Provider(
        "marlin", "GPTQModel's Marlin", f"{_LAYERS}.marlin:MarlinLinear",
        "cuda", _HALF, (4, 8), (-1, 32, 64, 128), needs_symmetry=True,
    ),
    Provider(
        "machete", "GPTQModel's Machete, for Hopper GPUs", f"{_LAYERS}.machete:MacheteLinear",
        "cuda", _HALF, (4, 8), (-1, 64, 128), in_multiple=64, out_multiple=128,
    ),
    Provider(
        "exllamav2", "GPTQModel's ExLlamaV2", f"{_LAYERS}.exllamav2:ExllamaV2Linear",
        "cuda", _HALF, (4,), (-1, 32, 64, 128), needs_scratch=True,
    ),
    Provider("exllama", "superseded by exllama_v2", "", "cuda", _HALF, (4,), (-1, 32, 64, 128)),
    Provider(
        "tritonv2", "GPTQModel's Triton kernel", f"{_LAYERS}.tritonv2:TritonV2Linear",
        "cuda", _HALF, (2, 4, 8), (-1, 32, 64, 128, 256, 512, 1024),
    ),
    Provider(
        "torch_aten", "torch's int4 operator, through GPTQModel", f"{_LAYERS}.torch_aten_kernel:TorchAtenLinear",
        "cpu", _HALF, (4,), (32, 64, 128, 256),
    ),
    Provider(
        "torch_cpu_avx512", "GPTQModel's kernel for AVX512-BF16", f"{_LAYERS}.torch_cpu_avx512:TorchCpuAvx512Linear",
        "cpu", (torch.bfloat16,), (4,), (32, 64, 128, 256, 512),
    ),
)  # fmt: skip


class Wrapped(Kernel):
    """One layer of the other package.

    Unlike fewbit's own kernels it holds state: that layer, and in host memory the tensors that it was made of. The
    package rewrites its own; what fewbit saves and moves comes from here, bit for bit.
    """

    def __init__(self, provider: Provider, layer_class: Any, spec: KernelSpec, dtype: torch.dtype) -> None:
        self.name, self.summary = provider.name, provider.summary
        self._provider, self._class, self._spec, self._dtype = provider, layer_class, spec, dtype
        self._sym = spec.sym
        self._kept: dict[str, Tensor] = {}
        self._layer: Any = None

    def unsupported_reason(
        self, spec: KernelSpec, device: torch.device, dtype: torch.dtype, trainable: bool
    ) -> str | None:
        """As its provider."""
        return self._provider.unsupported_reason(spec, device, dtype, trainable)

    def repack(self, layer: QuantizedBuffers) -> dict[str, Tensor]:
        """Build the other package's layer where `layer` lies; the buffer only marks that it has the codes.

        Raises:
            KernelError: the package would silently compute with another weight, or cannot prepare its layer.
        """
        codes = layer.codes()
        # What the checkpoint calls symmetric may not be, and some classes then read no zero points.
        self._sym = bool((codes.zeros == 1 << (codes.bits - 1)).all())
        if self._provider.needs_symmetry and not self._sym:
            raise KernelError(
                f"kernel {self.name!r} ignores zero points, and this layer has some that are not "
                f"{1 << (codes.bits - 1)} although the checkpoint says sym: true; use kernel='auto'"
            )
        if not torch.equal(codes.scales.half().to(codes.scales.dtype), codes.scales):
            raise KernelError(
                f"kernel {self.name!r} keeps scales in float16, which cannot hold this layer's; use kernel='auto'"
            )
        fmt = "gptq_v2" if self._class.REQUIRES_FORMAT_V2 else "gptq"
        self._kept = {name: tensor.cpu() for name, tensor in layout.pack(codes, fmt).items()}
        self._layer = self._built(codes.codes.device)
        return {_ELSEWHERE: torch.empty(0)}

    def restore(self, layer: QuantizedBuffers) -> Tensor:
        """See `Kernel.restore`."""
        return self._kept[layout.QWEIGHT].to(layer.get_buffer(layout.SCALES).device)

    def linear(self, x: Tensor, layer: QuantizedBuffers) -> Tensor:
        """See `Kernel.linear`. The gradient is that of the dequantized weight."""
        y: Tensor = _Product.apply(x, self, layer) if x.requires_grad else self.product(x)  # type: ignore[no-untyped-call]
        return y if layer.bias is None else y + layer.bias.to(y.dtype)

    def product(self, x: Tensor) -> Tensor:
        """``x @ weightᵀ`` by the other package, in x's dtype: (…, in) → (…, out). No gradient."""
        if x.numel() == 0:
            return x.new_empty((*x.shape[:-1], self._spec.out_features))
        with torch.no_grad():
            y: Tensor = self._layer(x.to(self._dtype).contiguous())
        return y.to(x.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Wrapped:
        # A layer may hold addresses of its own tensors: a copy is built anew.
        copy = Wrapped(self._provider, self._class, self._spec, self._dtype)
        copy._sym, copy._kept = self._sym, self._kept
        if self._layer is not None:
            copy._layer = copy._built(next(_tensors(self._layer)).device)
        return copy

    def _built(self, device: torch.device) -> Any:
        spec = self._spec
        try:
            with torch.device(device):
                layer = self._class(
                    bits=spec.bits,
                    group_size=spec.group_size,
                    desc_act=spec.act_order,
                    sym=self._sym,
                    in_features=spec.in_features,
                    out_features=spec.out_features,
                    bias=False,
                    pack_dtype=torch.int32,
                    register_buffers=True,
                    dtype=self._dtype,
                )
            layer = layer.to(device)
            self._fill(layer)
            if self._class.REQUIRES_FORMAT_V2:
                layer.qzero_format(format=2)
            scratch = {"scratch_space": _scratch(layer, device)} if self._provider.needs_scratch else {}
            layer.eval()
            layer.post_init(**scratch)
        except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
            raise KernelError(
                f"kernel {self.name!r}: {PACKAGE} cannot prepare its layer: {_first_line(error)}"
            ) from error
        return layer

    def _fill(self, layer: Any) -> None:
        result = layer.load_state_dict(self._kept, strict=False)
        missing = set(result.missing_keys) & set(layout.PARTS)
        if missing or result.unexpected_keys:
            raise KernelError(
                f"kernel {self.name!r}: this version of {PACKAGE} keeps other tensors than qweight, qzeros, scales and "
                "g_idx; fewbit knows version 7.7"
            )


class _Product(torch.autograd.Function):
    """The other package's product, with the gradient of the weight that fewbit dequantizes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Wrapped, layer: Any) -> Tensor:
        ctx.layer = layer
        return kernel.product(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        return grad @ ctx.layer.dequantize(grad.dtype), None, None


# Layers of one size on one device unpack into the same memory, one after the other.
_SCRATCH: weakref.WeakValueDictionary[tuple[torch.device, int], Any] = weakref.WeakValueDictionary()


def _scratch(layer: Any, device: torch.device) -> Any:
    space = importlib.import_module(f"{PACKAGE}.utils.exllamav2").ScratchSpace
    size = layer.temp_dq_size()
    shared = _SCRATCH.get((device, size))
    if shared is None:
        shared = _SCRATCH[device, size] = space(scratch_bytes=size + 128, dev=device)
    layer.fewbit_scratch = shared  # lives as long as a layer that points into it
    return shared


def _tensors(layer: Any) -> Any:
    yield from layer.buffers()
    yield from layer.parameters()


def _any_of(values: tuple[object, ...]) -> str:
    return " or ".join(map(str, values)) if len(values) < 3 else "one of " + ", ".join(map(str, values))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first_line(error: object) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
