"""The only door to the compiled module `fewbit._native`: the solver's loops and the kernels for CPUs.

Every function here has a torch counterpart with the same result up to the order of floating-point sums. Where the
module is absent, `available` is False and `unsupported_reason` says why. Threads follow `torch.get_num_threads()`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import KernelError

# Numbers of `DType` in csrc/matmul.h.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_isa = "best"  # see `instruction_set`


@functools.cache
def _load() -> tuple[Any, str]:
    """The compiled module and an empty string, or None and the reason."""
    try:
        return importlib.import_module("fewbit._native"), ""
    except ImportError as error:
        return None, (
            f"the compiled module fewbit._native cannot be imported ({error}). Installing fewbit with a "
            "C++17 compiler at hand builds it; until then the slower torch path is used."
        )


def available() -> bool:
    """Whether the compiled module can be used here."""
    return _load()[0] is not None


def unsupported_reason() -> str:
    """Why the compiled module cannot be used, in words; empty where it can."""
    return _load()[1]


def instruction_sets() -> tuple[str, ...]:
    """What the compiled module can use here, for example ``("avx512", "avx2", "generic", "avx512_bf16")``."""
    module, _ = _load()
    return tuple(module.instruction_sets()) if module is not None else ()


@functools.cache
def has_amx() -> bool:
    """Whether the processor multiplies tiles of bfloat16, and the compiled module uses it."""
    return "amx" in instruction_sets()


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Run compiled code for another instruction set than the best one, to test what other processors run.

    Args:
        name: one of `instruction_sets`.
    """
    global _isa
    before, _isa = _isa, name
    try:
        yield
    finally:
        _isa = before


@functools.cache
def _module() -> Any:
    """The compiled module.

    Raises:
        KernelError: it is missing; the message says why.
    """
    found, reason = _load()
    if found is None:
        raise KernelError(reason)
    return found


def gram_bf16(
    A: Tensor,
    B: Tensor,
    C: Tensor,
    ends: Tensor,
    row_factors: Tensor,
    column_factors: Tensor,
    *,
    upper: bool,
) -> None:
    """C += Aᵀ B, or only its upper triangle, in integers: the sum of every batch is scaled and rounded separately.

    Args:
        A: bfloat16 (tokens, n), contiguous.
        B: bfloat16 (tokens, n), contiguous.
        C: int32 (n, n), contiguous, added to.
        ends: int64 (batches,), the end of each batch: batch b is rows ``ends[b − 1] … ends[b]``.
        row_factors: float32 (n,), what the rows of the sums are multiplied by.
        column_factors: float32 (n,), what the columns of the sums are multiplied by.
        upper: whether only the upper triangle is computed.
    """
    arrays = (tensor.detach() for tensor in (A, B, C, ends, row_factors, column_factors))
    _module().gram_bf16(*arrays, upper, torch.get_num_threads(), _isa)


def fit_grid(
    W: Tensor,
    D: Tensor,
    starts: Tensor,
    coarse: Tensor,
    fine: Tensor,
    offsets: Tensor,
    bits: int,
    sym: bool,
) -> tuple[Tensor, Tensor]:
    """The search of `gptq.grid`; group g is the columns ``starts[g] … starts[g+1]``.

    Args:
        W: float32 (m, n), contiguous.
        D: float32 (n,), the weight of each column's squared error.
        starts: int32 (G + 1,).
        coarse: float32, multiples of the base scale.
        fine: float32, multiples of the best coarse scale.
        offsets: int32, candidate zero points relative to the centered one; not used when `sym`.
        bits: bits per code.
        sym: whether the zero point is fixed to the middle.

    Returns:
        scales float32 (m, G) and zeros float32 (m, G).
    """
    size = W.shape[0], starts.numel() - 1
    scales, zeros = torch.empty(size), torch.empty(size)
    arrays = (tensor.detach() for tensor in (W, D, starts, coarse, fine, offsets))
    _module().fit_grid(*arrays, bits, sym, scales, zeros, torch.get_num_threads(), _isa)
    return scales, zeros


def round_block(
    W: Tensor,
    T: Tensor,
    F: Tensor,
    d: Tensor,
    scales: Tensor,
    zeros: Tensor,
    groups: Tensor,
    bits: int,
    codes: Tensor,
    E: Tensor,
) -> Tensor:
    """One block of columns on one grid: fills codes and E, returns its share of every row's loss, float32 (m,).

    All matrices are contiguous. Matrices with m as the last dimension hold one column of the weight per row.

    Args:
        W: float32 (k, m), the weights; k ≤ 128.
        T: float32 (k, m), the targets.
        F: float32 (k, k), unit upper triangular.
        d: float32 (k,), the diagonal of D.
        scales: float32 (G, m).
        zeros: float32 (G, m).
        groups: int32 (k,), the group of each column.
        bits: bits per code.
        codes: uint8 (k, m), written.
        E: float32 (k, m), written: W − Ŵ.
    """
    loss = torch.empty(W.shape[1])
    arrays = (tensor.detach() for tensor in (W, T, F, d, scales, zeros, groups))
    _module().round_block(*arrays, bits, codes, E, loss, torch.get_num_threads(), _isa)
    return loss


def sum_of_squares(X: Tensor) -> Tensor:
    """Σ x_i² over the rows of X (tokens, n), contiguous, of a dtype in `DTYPES`: float32 (n,)."""
    sums = torch.empty(X.shape[1])
    _module().sum_of_squares(X.detach(), sums, torch.get_num_threads(), _isa)
    return sums


def advise_huge_pages(tensor: Tensor) -> None:
    """Ask the system for huge pages behind a large, still unwritten tensor: fewer address translations miss."""
    _module().advise_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def drop_page_cache(tensor: Tensor) -> bool:
    """Give back the pages of a tensor that lies in a mapped safetensors file; they can be read again.

    While a model is loaded, every weight is read once from the file and repacked. The pages that were read would count
    as memory of the process until the whole file is unmapped: at the end, twice the checkpoint's size.

    Returns:
        Whether the tensor lies in such a file. Any other tensor is left alone.
    """
    if not sys.platform.startswith("linux") or not tensor.is_cpu or not tensor.is_contiguous():
        return False
    size = tensor.numel() * tensor.element_size()
    if size < mmap.PAGESIZE or not _in_mapped_file(tensor.data_ptr(), tensor.data_ptr() + size):
        return False
    _module().drop_pages(tensor.data_ptr(), size)
    return True


def _in_mapped_file(first: int, last: int) -> bool:
    """Whether these addresses lie in one mapping of a safetensors file."""
    for line in Path("/proc/self/maps").read_bytes().splitlines():
        if line.endswith(b".safetensors"):
            start, end = (int(address, 16) for address in line.split()[0].split(b"-"))
            if start <= first < end:
                return last <= end
    return False


# Packed weights (csrc/matmul.h), and the operations between their products.


def has_int8_products() -> bool:
    """Whether the best instruction set has its own products for 8-bit activations."""
    return bool(_module().has_int8_products())


def packed_view(
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor,
    order: Tensor,
    starts: Tensor,
    bits: int,
    in_features: int,
    out_features: int,
) -> Any:
    """The compiled module's view of a `fewbit.kernels.cpu.packed.PackedWeight`. The caller keeps the tensors alive.

    Raises:
        ValueError: `starts` does not fit the tiles.
    """
    return _module().Packed(
        tiles.data_ptr(), scales.data_ptr(), DTYPES[scales.dtype], zeros.data_ptr(), zeros.shape == scales.shape,
        order.data_ptr() if order.numel() else 0, starts.data_ptr(), out_features, in_features, scales.shape[1],
        bits, tiles.shape[1],
    )  # fmt: skip


def pack_tiles(view: Any, qweight: Tensor, tiles: Tensor) -> None:
    """Write the tiles of a packed weight.

    Args:
        view: from `packed_view`.
        qweight: int32 (words, out_features), contiguous.
        tiles: the view's tiles, written.
    """
    view.pack(qweight, tiles, torch.get_num_threads())


def unpack_tiles(view: Any, qweight: Tensor) -> None:
    """Inverse of `pack_tiles`: set the bits of `qweight`, which is zero, for all inputs that exist."""
    view.unpack(qweight, torch.get_num_threads())


def dequantize_tiles(view: Any, out: Tensor) -> None:
    """Write the weight (out_features, in_features), computed in float32 and rounded once."""
    view.dequantize(out, torch.get_num_threads())


# The four functions below take tens of microseconds for one token. They pass addresses, because converting tensors to
# checked arrays would add a measurable share; their callers check shapes and dtypes.


def matmul(view: Any, x: Tensor, y: Tensor, tokens: int, bias: Tensor | None, rounding: int) -> None:
    """y = x Ŵᵀ + bias.

    Args:
        view: from `packed_view`.
        x: (…, in_features), contiguous.
        y: (…, out_features), contiguous, in x's dtype, written.
        tokens: number of rows of x.
        bias: (out_features,), or None.
        rounding: a `fewbit.kernels.cpu.packed.Rounding`.
    """
    bias_address, bias_type = (0, 0) if bias is None else (bias.data_ptr(), DTYPES[bias.dtype])
    view.matmul(
        x.data_ptr(), y.data_ptr(), DTYPES[x.dtype], tokens, bias_address, bias_type, rounding,
        torch.get_num_threads(), _isa,
    )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight · x / √(mean(x²) + eps) over the last dimension, rounded before the weight as in transformers' models.

    Args:
        x: (…, n), contiguous.
        weight: (n,), in x's dtype: float32, float16 or bfloat16.
    """
    y, n = torch.empty_like(x), weight.numel()
    _module().rms_norm(
        x.data_ptr(), weight.data_ptr(), y.data_ptr(), DTYPES[x.dtype], x.numel() // n, n, eps,
        torch.get_num_threads(), _isa,
    )  # fmt: skip
    return y


def silu_mul(x: Tensor) -> Tensor:
    """silu(gate) · up, rounded after silu.

    Args:
        x: (…, 2n), contiguous, float32, float16 or bfloat16: gate, then up.
    """
    n = x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype)
    _module().silu_mul(
        x.data_ptr(), y.data_ptr(), DTYPES[x.dtype], x.numel() // (2 * n), n, torch.get_num_threads(), _isa
    )
    return y


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool = False) -> Tensor:
    """softmax(scale · Q Kᵀ) V.

    Args:
        query: (batch, heads, queries, size).
        key: (batch, key heads, length, size), length > 0; heads is a multiple of key heads. All three tensors have one
            dtype, float32, float16 or bfloat16, and each vector is contiguous.
        value: (batch, key heads, length, size).
        causal: query i sees the keys 0 … i, and there are as many keys as queries.

    Returns:
        (batch, queries, heads, size)
    """
    batch, heads, queries, size = query.shape
    _, key_heads, length, _ = key.shape
    y = torch.empty((batch, queries, heads, size), dtype=query.dtype)
    _module().attention(
        query.data_ptr(), key.data_ptr(), value.data_ptr(), y.data_ptr(), DTYPES[query.dtype], batch, heads,
        key_heads, queries, length, size, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], scale, causal,
        torch.get_num_threads(), _isa,
    )  # fmt: skip
    return y
