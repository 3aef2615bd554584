"""All kernels, in order of preference, and the one choice among them.

"auto" takes the first kernel that can run the layer and passes its self-check, if it has one; "auto_a16" excludes
kernels that round activations to 8 bits. A kernel requested by name runs, or the error says which condition fails.
Kernels of other packages (`providers`) run only if they are requested by name.
"""

from __future__ import annotations

import torch

from ..errors import KernelError
from .cpu.kernel import Cpu, Cpu16, CpuInt8
from .providers import PROVIDERS, Provider
from .reference import Reference
from .spec import Kernel, KernelSpec
from .triton.kernel import TritonKernel

# The reference kernel can always run.
_AUTO: tuple[Kernel, ...] = (Cpu(), TritonKernel(), Reference())
_AUTO_A16: tuple[Kernel, ...] = (Cpu16(), *_AUTO[1:])

KERNELS: tuple[Kernel, ...] = (*_AUTO, Cpu16(), CpuInt8())

_ENTRIES: tuple[Kernel | Provider, ...] = (*KERNELS, *PROVIDERS)

# Names that other tools use. GPTQModel's may start with "gptq_".
_ALIASES = {"exllama_v1": "exllama", "exllama_v2": "exllamav2", "torch": "reference"}
_ENGINES = ("vllm", "sglang", "mlx")


def names() -> tuple[str, ...]:
    """Every kernel's name, fewbit's own first. `resolve` accepts further names."""
    return tuple(entry.name for entry in _ENTRIES)


def get(name: str) -> Kernel:
    """The kernel called `name`.

    Raises:
        KernelError: fewbit itself has no kernel with this name.
    """
    for kernel in KERNELS:
        if kernel.name == name:
            return kernel
    raise KernelError(f"there is no kernel {name!r}; use auto or one of {', '.join(names())}")


def resolve(name: str) -> tuple[Kernel | Provider, ...]:
    """The kernels that a name from fewbit, GPTQModel or transformers stands for, the preferred one first.

    Also accepted: "auto", "auto_a16", "auto_trainable" and "torch" (the reference kernel).

    Raises:
        KernelError: no kernel has this name.
    """
    short = name.lower().removeprefix("gptq_")
    short = _ALIASES.get(short, short)
    if short in ("auto", "auto_trainable"):
        return _AUTO
    if short == "auto_a16":
        return _AUTO_A16
    if short in _ENGINES:
        raise KernelError(
            f"{name} is an engine, not a kernel: it serves the checkpoint's folder by itself. "
            "Here use kernel='auto'"
        )
    found = tuple(entry for entry in _ENTRIES if entry.name == short)
    if not found:
        raise KernelError(f"there is no kernel {name!r}; use auto or one of {', '.join(names())}")
    return found


def explain(
    spec: KernelSpec, device: torch.device | str, dtype: torch.dtype, trainable: bool = False
) -> list[tuple[str, str | None]]:
    """Every kernel's name with the reason why it cannot run the layer; None if it can."""
    device = torch.device(device)
    return [(entry.name, entry.unsupported_reason(spec, device, dtype, trainable)) for entry in _ENTRIES]


def choose(
    spec: KernelSpec,
    device: torch.device,
    dtype: torch.dtype,
    name: str = "auto",
    trainable: bool = False,
) -> tuple[Kernel, tuple[tuple[str, str | None], ...]]:
    """The kernel for a layer, and the kernels that were tried, with the reasons why they cannot run it.

    Args:
        spec: the layer.
        device: the device of its tensors.
        dtype: dtype of the activations.
        name: a name that `resolve` accepts. "auto_trainable" is "auto" with gradients to the input.
        trainable: whether gradients to the input are needed.

    Raises:
        KernelError: `name` is not known, cannot run the layer (the message says why), or nothing can.
    """
    entries = resolve(name)
    trainable = trainable or name.lower() == "auto_trainable"
    reasons: list[tuple[str, str | None]] = []
    for entry in entries:
        reason = entry.unsupported_reason(spec, device, dtype, trainable)
        if reason is None and isinstance(entry, Kernel) and len(entries) > 1:
            reason = entry.self_check(spec, device, dtype)
        reasons.append((entry.name, reason))
        if reason is None:
            kernel = entry.open(spec, device, dtype) if isinstance(entry, Provider) else entry
            return kernel, tuple(reasons)
    if len(entries) > 1:
        tried = "; ".join(f"{kernel}: {reason}" for kernel, reason in reasons)
        raise KernelError(f"no kernel can run this layer: {tried}")
    able = [kernel for kernel, why in explain(spec, device, dtype, trainable) if why is None]
    raise KernelError(
        f"kernel {entries[0].name!r} cannot run a layer of {spec.bits} bits, group_size {spec.group_size}, "
        f"{spec.out_features} x {spec.in_features}: {reasons[0][1]}. "
        f"Kernels that can: {', '.join(able) or 'none'}; kernel='auto' chooses among fewbit's own."
    )
