"""Rotating the residual stream of a model before it is quantized (QuaRot, arXiv:2404.00456, section 4, stage 1a).

An orthogonal Q turns the stream h into h Q, and the function of the model does not change if

    embeddings                    E → E Q
    norms that read the stream    g ∘ h / rms(h) + β: g moves into the layers behind the norm, since rms(h Q) = rms(h)
                                  g → 1,  β → (β / g) Q
    layers that read the stream   W → W diag(g) Q
    layers that write to it       W → Qᵀ W,  b → b Q

A rotated column of W is a sum of all columns. So large values are spread over all of them, and grids fit better.

F is a Kronecker product of Hadamard matrices, and of a Hartley matrix for the odd part of the width; D are random
signs. Then `Q = D F`. A LayerNorm subtracts the mean of h, which Q must not change. For models with such norms it is
`Q = F D F`, where the first sign is 1. The first row of F is constant, so `1 Q = 1`.

An output layer that shares its matrix with the embeddings gets its own, because g goes into one of them only.

Nothing is computed before a tensor is read: `rotated` replaces the tensors of the source by ones that rotate when read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.safetensors_file import FileTensor
from ..transformers_internals import unexpected_in_files
from .residual_stream import Norm, ResidualStream, bias_beside

_LARGEST_FACTOR = 64
_ROWS = 4096  # rows of a matrix that are rotated at a time


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal matrix `D F` or `F D F` with `F = F₁ ⊗ F₂ ⊗ …`, which multiplies without being formed.

    Attributes:
        signs: the diagonal of D: ±1, float32, (width,).
        factors: symmetric orthogonal matrices, float32; the product of their sizes is the width.
        keeps_mean: whether it is `F D F`.
    """

    signs: Tensor
    factors: tuple[Tensor, ...]
    keeps_mean: bool = False

    @classmethod
    def random(cls, width: int, seed: int, *, keeps_mean: bool = False) -> Rotation:
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (width,), generator=generator).float() * 2 - 1
        if keeps_mean:
            signs[0] = 1
        odd, power = width, 1
        while odd % 2 == 0:
            odd, power = odd // 2, power * 2
        sizes = [odd] if odd > 1 else []
        while power > 1:
            sizes.append(min(power, _LARGEST_FACTOR))
            power //= sizes[-1]
        factors = tuple(_hadamard(n) if n % 2 == 0 else _hartley(n) for n in sizes)
        return cls(signs, factors, keeps_mean)

    def of_rows(self, x: Tensor) -> Tensor:
        """Return `x Q` for x (..., width), float32."""
        return self._spread((self._spread(x) if self.keeps_mean else x) * self.signs)

    def _spread(self, x: Tensor) -> Tensor:
        """Return `x F`."""
        shape, before = x.shape, 1
        for factor in self.factors:
            size = len(factor)
            x = x.reshape(-1, before, size, shape[-1] // before // size)
            x = torch.einsum("abcd,ce->abed", x, factor)
            before *= size
        return x.reshape(shape)


def _hadamard(size: int) -> Tensor:
    """Sylvester's matrix, scaled to be orthogonal."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def _hartley(size: int) -> Tensor:
    """`(cos(2πij/n) + sin(2πij/n)) / √n`."""
    i = torch.arange(size, dtype=torch.float64)
    angles = 2 * math.pi * (torch.outer(i, i) % size) / size
    return ((angles.cos() + angles.sin()) / math.sqrt(size)).float()


@dataclass(frozen=True)
class RotatedTensor(FileTensor):
    """A tensor that is rotated while it is read.

    Attributes:
        source: tensor of the file.
        rotation: Q.
        last_axis: whether the last axis is the stream: `x → x diag(g) Q` with `g = offset + gain`.
        first_axis: whether the first axis is the stream: `x → Qᵀ x`.
        gain: weight of the norm in front; None for none.
        offset: see `Norm`.
        divides: `x → (x / g) Q` instead.
    """

    source: FileTensor
    rotation: Rotation
    last_axis: bool = False
    first_axis: bool = False
    gain: FileTensor | None = None
    offset: float = 1.0
    divides: bool = False

    def read(self, *, pinned: bool = False) -> Tensor:
        """Read and rotate the whole tensor, in float32 and by parts.

        Raises:
            ModelError: the file cannot be read any more.
        """
        x = self.source.read()
        if self.last_axis:
            gain = torch.tensor(self.offset) if self.gain is None else self.offset + self.gain.read().float()
            g = 1 / gain if self.divides else gain
            x = self._by_parts(x, lambda rows: self.rotation.of_rows(rows.float() * g))
        if self.first_axis:
            x = self._by_parts(x.T, lambda rows: self.rotation.of_rows(rows.float())).T.contiguous()
        return x.pin_memory() if pinned else x

    def _by_parts(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        result = torch.empty(x.shape, dtype=self.info.dtype)
        if x.ndim == 1:
            return result.copy_(function(x))
        for start in range(0, len(x), _ROWS):
            result[start : start + _ROWS] = function(x[start : start + _ROWS])
        return result


@dataclass(frozen=True)
class ConstantTensor(FileTensor):
    """One value everywhere: what is left of the weight of a norm."""

    value: float

    def read(self, *, pinned: bool = False) -> Tensor:
        """Return the whole tensor."""
        return torch.full(self.info.shape, self.value, dtype=self.info.dtype, pin_memory=pinned)


def norm_with_zeros(stream: ResidualStream, tensors: Mapping[str, FileTensor]) -> str | None:
    """Find a norm whose bias cannot be divided by its weight; None if there is none."""
    for name, norm in stream.norms.items():
        if norm.parameters == ("weight", "bias") and not bool(
            (norm.offset + tensors[f"{name}.weight"].read().float()).all()
        ):
            return name
    return None


def stream_like(model: nn.Module, unused: Mapping[str, FileTensor], width: int) -> list[str]:
    """Find tensors that the model does not run and that may read or write the stream, by an axis of its width."""
    ignored = unexpected_in_files(model)
    return [
        name
        for name, tensor in unused.items()
        if width in tensor.info.shape and not any(re.search(pattern, name) for pattern in ignored)
    ]


def rotated(
    stream: ResidualStream, tensors: Mapping[str, FileTensor], dtypes: Mapping[str, torch.dtype], seed: int
) -> dict[str, FileTensor]:
    """Replace the tensors of parameters that a rotation of the residual stream changes.

    Args:
        stream: where the model reads and writes it. Its output layer shares no matrix with the embeddings.
        tensors: where each parameter lies.
        dtypes: dtype of each parameter in the model.
        seed: chooses the signs of Q.

    Raises:
        KeyError: a parameter is missing in `tensors`.
    """
    centers = any(norm.centers for norm in stream.norms.values())
    rotation = Rotation.random(stream.width, seed, keeps_mean=centers)
    found: dict[str, FileTensor] = {}

    def add(name: str, **how: Any) -> None:
        if name in dtypes:
            info = replace(tensors[name].info, dtype=dtypes[name])
            found[name] = RotatedTensor(tensors[name].path, info, tensors[name], rotation, **how)

    for embedding in stream.embeddings:
        add(embedding, last_axis=True)
    for matrix in {*stream.reads, *stream.writes}:
        name, writes = stream.reads.get(matrix), matrix in stream.writes
        norm = stream.norms[name] if name else Norm()
        gain = tensors[f"{name}.weight"] if "weight" in norm.parameters else None
        reads = matrix in stream.reads
        add(matrix, last_axis=reads, first_axis=writes, gain=gain, offset=norm.offset)
        if writes:
            add(bias_beside(matrix), last_axis=True)
    for name, norm in stream.norms.items():
        gain = tensors[f"{name}.weight"] if "weight" in norm.parameters else None
        if "bias" in norm.parameters:
            add(f"{name}.bias", last_axis=True, gain=gain, offset=norm.offset, divides=True)
        if gain is not None:
            found[f"{name}.weight"] = ConstantTensor(gain.path, gain.info, 1 - norm.offset)
    return found
