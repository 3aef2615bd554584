"""Everything that fewbit uses of torch's private interfaces.

No other module imports a private module of torch or reads a private attribute of its objects, so a new release can
break only this file. ``tests/test_internals.py`` checks each entry against the installed version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "NonDynamicallyQuantizableLinear",
    "TorchDispatchMode",
    "register_module_parameter_registration_hook",
    "tracing_state",
    "tree_leaves",
    "tree_map",
    "without_dispatch_modes",
]

# Context manager: run without the active TorchDispatchModes.
without_dispatch_modes = _disable_current_modes
# Returns the state of torch.jit.trace; None if it is not recording. Called for every product.
tracing_state = torch._C._get_tracing_state


def is_mutating(operator: Any) -> bool:
    """Return whether an aten operator writes to one of its arguments."""
    mutable: bool = operator._schema.is_mutable
    return mutable


def default_store() -> Any:
    """Return the key-value store of the default process group."""
    return torch.distributed.distributed_c10d._get_default_store()


def non_persistent_buffers(module: nn.Module) -> set[str]:
    """Return the names of the buffers that ``state_dict`` leaves out."""
    return module._non_persistent_buffers_set


class EveryOperation(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls `before` and `after` around every operation of torch, with the storages that it uses."""

    def __init__(
        self,
        before: Callable[[Any, list[UntypedStorage]], None],
        after: Callable[[list[UntypedStorage], list[UntypedStorage]], None],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._before, self._after = before, after

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = list(_storages((*args, *kwargs.values())))
        self._before(func, inputs)
        result = func(*args, **kwargs)
        self._after(inputs, list(_storages((result,))))
        return result


def _storages(values: Iterable[object]) -> Iterator[UntypedStorage]:
    """Yield the storages of all plain tensors; tensor subclasses have none."""
    for value in values:
        if isinstance(value, Tensor):
            if type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided:
                yield value.untyped_storage()
        elif isinstance(value, (list, tuple)):
            yield from _storages(value)
