"""All kernels, in order of preference, and the one choice among them.

"auto" takes the first that can run the layer. A kernel asked for by name runs or says which condition fails.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from ..errors import KernelError
from .cpu import TorchInt4
from .kernel import Kernel, KernelSpec
from .reference import Reference

KERNELS: tuple[Kernel, ...] = (TorchInt4(), Reference())


@dataclass(frozen=True)
class Provider:
    """A kernel of another package. This version knows its conditions but does not call it.

    Attributes:
        packages: any of them has it.
        bits, group_sizes: that it takes.
        needs_symmetry: only zero point 2^(bits−1).
        in_multiple, out_multiple: of the layer's sizes.
        act_order: whether it takes groups that are not consecutive inputs.
    """

    name: str
    packages: tuple[str, ...]
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...] | None
    needs_symmetry: bool
    in_multiple: int
    out_multiple: int
    act_order: bool = True

    def why_not(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype, trainable: bool) -> str:
        """The first condition that fails; at last that fewbit does not wrap it."""
        if spec.kind != "linear":
            return f"the layer is a {spec.kind}, not a linear layer"
        if device.type != "cuda":
            return f"device is {device.type}, not cuda"
        if spec.bits not in self.bits:
            return f"bits {spec.bits} is not {_any_of(self.bits)}"
        if self.group_sizes is not None and spec.group_size not in self.group_sizes:
            return f"group_size {spec.group_size} is not {_any_of(self.group_sizes)}"
        if self.needs_symmetry and not spec.sym:
            return "the layer is asymmetric; only symmetric ones (sym=True)"
        if spec.act_order and not self.act_order:
            return "act-order (desc_act) is not supported"
        if spec.in_features % self.in_multiple or spec.out_features % self.out_multiple:
            return (
                f"shape {spec.out_features} x {spec.in_features} (out x in) is not a multiple of "
                f"{self.out_multiple} x {self.in_multiple}"
            )
        if not any(importlib.util.find_spec(package) for package in self.packages):
            return f"the package {_any_of(self.packages)} is not installed"
        return "fewbit does not wrap it yet"


PROVIDERS: tuple[Provider, ...] = (
    Provider("marlin", ("gptqmodel", "vllm"), (4, 8), (-1, 32, 64, 128), True, 128, 64),
    Provider("machete", ("vllm",), (4, 8), (-1, 64, 128), True, 64, 128),
    Provider("exllamav2", ("gptqmodel", "exllamav2"), (4,), None, False, 32, 32),
    Provider("exllama", ("gptqmodel", "auto_gptq"), (4,), None, False, 32, 32),
)


_ENTRIES: tuple[Kernel | Provider, ...] = (*KERNELS, *PROVIDERS)


def _any_of(values: tuple[object, ...]) -> str:
    return " or ".join(map(str, values)) if len(values) < 3 else "one of " + ", ".join(map(str, values))


def names() -> tuple[str, ...]:
    """Every name that `choose` understands, beside "auto"."""
    return tuple(entry.name for entry in _ENTRIES)


def get(name: str) -> Kernel:
    """The kernel called `name`.

    Raises:
        KernelError: there is none of this name that fewbit can run.
    """
    for kernel in KERNELS:
        if kernel.name == name:
            return kernel
    raise KernelError(f"there is no kernel {name!r}; use auto or one of {', '.join(names())}")


def explain(
    spec: KernelSpec, device: torch.device | str, dtype: torch.dtype, trainable: bool = False
) -> list[tuple[str, str | None]]:
    """Every kernel with None where it can run the layer and otherwise the reason why it cannot."""
    device = torch.device(device)
    return [(entry.name, entry.why_not(spec, device, dtype, trainable)) for entry in _ENTRIES]


def choose(
    spec: KernelSpec,
    device: torch.device,
    dtype: torch.dtype,
    name: str = "auto",
    trainable: bool = False,
) -> tuple[Kernel, tuple[tuple[str, str | None], ...]]:
    """The kernel for a layer, and for each one tried before it why it cannot.

    Raises:
        KernelError: `name` is not known, cannot run the layer (the message says why), or nothing can.
    """
    if name != "auto":
        return _by_name(spec, device, dtype, name, trainable)
    reasons: list[tuple[str, str | None]] = []
    for kernel in KERNELS:
        reason = kernel.why_not(spec, device, dtype, trainable)
        reasons.append((kernel.name, reason))
        if reason is None:
            return kernel, tuple(reasons)
    raise KernelError(f"no kernel can run this layer: {'; '.join(f'{k}: {r}' for k, r in reasons)}")


def _by_name(
    spec: KernelSpec, device: torch.device, dtype: torch.dtype, name: str, trainable: bool
) -> tuple[Kernel, tuple[tuple[str, str | None], ...]]:
    entry = next((e for e in _ENTRIES if e.name == name), None)
    if entry is None:
        raise KernelError(f"there is no kernel {name!r}; use auto or one of {', '.join(names())}")
    reason = entry.why_not(spec, device, dtype, trainable)
    if reason is not None or isinstance(entry, Provider):
        able = [n for n, r in explain(spec, device, dtype, trainable) if r is None]
        raise KernelError(
            f"kernel {name!r} cannot run a layer of {spec.bits} bits, group_size {spec.group_size}, "
            f"{spec.out_features} x {spec.in_features}: {reason}. "
            f"Kernels that can: {', '.join(able) or 'none'}; kernel='auto' chooses among them."
        )
    return entry, ((name, None),)
