"""Layer shapes of models that people run, so that kernels can be compared without a checkpoint at hand."""

from __future__ import annotations

from ..errors import ConfigError
from .layers import Shape

# Llama 3.2 1B, 3.1 8B, 3.1 70B: hidden size, inner size of the MLP, outputs of k and v, layers.
_MODELS = {
    "1b": (2048, 8192, 512, 16),
    "8b": (4096, 14336, 1024, 32),
    "70b": (8192, 28672, 1024, 80),
}
NAMES = tuple(_MODELS)


def shapes(name: str, bits: int, group_size: int, sym: bool = True) -> list[Shape]:
    """The linear layers of one model, most weights first.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in _MODELS:
        raise ConfigError(f"there are no shapes called {name!r}; there are {', '.join(NAMES)}")
    hidden, inner, narrow, count = _MODELS[name]
    found = [
        Shape(out_features, in_features, bits, group_size, sym, count=times * count)
        for out_features, in_features, times in (
            (inner, hidden, 2),  # gate, up
            (hidden, inner, 1),  # down
            (hidden, hidden, 2),  # q, o
            (narrow, hidden, 2),  # k, v
        )
    ]
    return sorted(found, key=lambda shape: -shape.count * shape.out_features * shape.in_features)
