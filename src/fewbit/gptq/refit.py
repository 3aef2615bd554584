"""The refit: better scales for the codes that the sweep found.

Contract: pure. With the codes fixed, Z = q − z, the error ‖Ŵ − T‖²_H is quadratic in the scales. One sweep
over the groups g of every row, each taking its best scale given the others (Gauss–Seidel):

    s_g ← s_g + Z_gᵀ (H e)_g / Z_gᵀ H_gg Z_g,   e = t − ŵ,

rounded to the stored dtype before the next group sees it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantized_matrix import QuantizedMatrix
from .grid import storable


def refit_scales(T: Tensor, codes: QuantizedMatrix, H: Tensor, sweeps: int = 1) -> Tensor:
    """The refitted scales, dtype and shape as in `codes`; their signs stay.

    Args:
        T: float32 (m, n), the targets. H: float32 (n, n), symmetric, damped or not.
    """
    groups = codes.g_idx.long()
    scales = codes.scales.float()
    Z = codes.codes.float() - codes.zeros.float()[:, groups]
    EH = (T - Z * scales[:, groups]) @ H
    size = len(groups) if codes.group_size == -1 else codes.group_size
    members = torch.split(torch.argsort(groups, stable=True), size)
    for _ in range(sweeps):
        for g, columns in enumerate(members):
            Z_g = Z[:, columns]
            gain = (EH[:, columns] * Z_g).sum(1)
            curvature = (Z_g @ H[columns][:, columns] * Z_g).sum(1)
            s = scales[:, g]
            best = storable(s + gain / curvature)
            # A row whose codes are all zero points has no best scale, and one that would change its sign a bad one.
            best = torch.where((curvature > 0) & (best * s > 0), best, s)
            EH.addmm_((best - s)[:, None] * Z_g, H[columns], alpha=-1)
            scales[:, g] = best
    return scales.to(codes.scales.dtype)
