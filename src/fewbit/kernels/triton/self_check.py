"""Whether the Triton kernel computes the right numbers on a device, found out by trying.

"auto" asks before it takes the kernel: a new device, driver or version of Triton must not be found out about by a
model that writes nonsense. A small layer is multiplied on every path of the kernel, one with act-order on the shortest,
and compared with float64. The first time on a machine this compiles a few kernels, which takes seconds; Triton keeps
them.
"""

from __future__ import annotations

import functools
import logging

import torch

from ...quantized_matrix import QuantizedMatrix
from . import autotune as triton_choice
from . import layout as fragments
from .layout import Fragments

_LOG = logging.getLogger(__name__)

_OUT, _IN, _GROUP = 96, 512, 128
# Relative, of the whole product. A right one stays under a third of it, a wrong weight is far over.
_TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2e-2, torch.float32: 1e-4}


@functools.cache
def problem(device: torch.device, bits: int, dtype: torch.dtype) -> str | None:
    """None where the kernel is right on this device; otherwise what is wrong, which is also logged.

    Found out once per process, device, bits and dtype.
    """
    try:
        reason = _try(device, bits, dtype)
    except triton_choice.failures() as error:
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    if reason is None:
        return None
    reason = f"its self-check on {device} failed ({reason})"
    _LOG.warning(
        "kernel triton, %d bits, %s: %s; the reference kernel, which is slow, takes its place",
        bits,
        dtype,
        reason,
    )
    return reason


def _try(device: torch.device, bits: int, dtype: torch.dtype) -> str | None:
    from .kernels import multiply, on

    for act_order in (False, True):
        codes = _layer(bits, act_order)
        order = fragments.positions(codes.g_idx, _GROUP, _IN // _GROUP)
        group = fragments.group_of(order, _IN // _GROUP, _GROUP)
        words = fragments.pack(codes.codes, bits, order)
        zeros = codes.zeros.t().to(torch.uint8).contiguous()
        weight = Fragments(words.to(device), zeros.to(device), order.to(device), group)
        scales = codes.scales.t().contiguous().to(device)
        exact = codes.dequantize(torch.float64).t()
        for tokens in (1,) if act_order else (1, 16, 40, triton_choice.DENSE_FROM):
            x = torch.randn(tokens, _IN, generator=torch.Generator().manual_seed(tokens)).to(dtype)
            tiles = triton_choice.rule(triton_choice.job(tokens, _OUT, _IN, bits, group, dtype))
            with on(device):
                found = multiply(x.to(device), weight, scales, bits, tiles).cpu().double()
            truth = x.double() @ exact
            error = float((found - truth).norm() / truth.norm())
            if not error < _TOLERANCE[dtype]:  # NaN is not
                return f"error {error:.1e} at {tokens} tokens{', act-order' if act_order else ''}"
    return None


def _layer(bits: int, act_order: bool) -> QuantizedMatrix:
    generator = torch.Generator().manual_seed(bits)
    groups, top = _IN // _GROUP, 2**bits
    g_idx = torch.arange(_IN, dtype=torch.int32) // _GROUP
    if act_order:
        g_idx = g_idx[torch.randperm(_IN, generator=generator)]
    return QuantizedMatrix(
        codes=torch.randint(0, top, (_OUT, _IN), generator=generator, dtype=torch.uint8),
        scales=((torch.rand((_OUT, groups), generator=generator) + 0.5) / top / 8).half(),
        zeros=torch.randint(1, top, (_OUT, groups), generator=generator, dtype=torch.int16),
        g_idx=g_idx,
        bits=bits,
        group_size=_GROUP,
    )
