"""Memory that is a file: checkpoints are mapped, and what was read of them stays in memory until told otherwise.

While a model is loaded, every weight is read once from the file and repacked. Without `forget`, the pages that were
read would count as memory of the process until the whole file is unmapped: at the end, the checkpoint's size twice.
"""

from __future__ import annotations

import sys
from pathlib import Path

from torch import Tensor

from ... import native

_MAPS = Path("/proc/self/maps")


def forget(tensor: Tensor) -> bool:
    """Give back the pages of a tensor that is part of a mapped file and was not written to; they can be read again.

    Returns:
        Whether it was such a tensor. Anything else is left alone.
    """
    bytes_ = tensor.numel() * tensor.element_size()
    if not sys.platform.startswith("linux") or not tensor.is_cpu or not tensor.is_contiguous():
        return False
    if not _is_file(tensor.data_ptr(), tensor.data_ptr() + bytes_):
        return False
    native.module().forget_pages(tensor.data_ptr(), bytes_)
    return True


def _is_file(first: int, last: int) -> bool:
    """Whether these addresses lie in one mapping of a safetensors file, as the kernel sees it now."""
    for line in _MAPS.read_text().splitlines():
        addresses, _, _, _, _, *path = line.split(maxsplit=5)
        start, end = (int(address, 16) for address in addresses.split("-"))
        if start <= first < end:
            return last <= end and bool(path) and path[0].endswith(".safetensors")
    return False
