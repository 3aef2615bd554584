"""Speed of one layer shape at a time: milliseconds by kernel and number of tokens, with cold caches.

In a model, the weight of a layer is read from memory, not from a cache. On a CPU every candidate therefore has
enough copies of the layer to exceed the last-level cache several times, and uses them in rotation. On a GPU the clock
empties the cache before each call (`machine_limits`). Weights are random codes; the time does not depend on them.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from machine_limits import last_level_cache
from torch import Tensor, nn
from torch.nn import functional

from fewbit.bench.timing import Stopwatch, Times, in_turns, seconds_per_call
from fewbit.checkpoint.reader import LayerSpec
from fewbit.errors import ConfigError, DependencyError, KernelError
from fewbit.kernels.linear import QuantLinear
from fewbit.quantized_matrix import QuantizedMatrix, group_count, sequential_groups

Run = Callable[[Tensor], Tensor]
Candidate = Callable[[QuantizedMatrix, torch.dtype], Run]

_CPU = torch.device("cpu")
_INNER_TILES = 8  # tiles of 16 inputs that torch's GPU operator packs into one: 2, 4 or 8
_ROWS_CHECKED = 64  # rows of the product that are compared with float64

# Llama 3.2 1B, 3.1 8B, 3.1 70B: hidden size, inner size of the MLP, outputs of k and v, layers.
_LLAMA = {
    "1b": (2048, 8192, 512, 16),
    "8b": (4096, 14336, 1024, 32),
    "70b": (8192, 28672, 1024, 80),
}


@dataclass(frozen=True)
class Shape:
    """The properties of a layer that its speed depends on.

    Attributes:
        count: number of such layers in a model.
    """

    out_features: int
    in_features: int
    bits: int
    group_size: int
    sym: bool = True
    act_order: bool = False
    count: int = 1

    @property
    def nbytes(self) -> int:
        """Size of the packed codes, zero points and float16 scales, which a product must read."""
        groups = group_count(self.in_features, self.group_size) * self.out_features
        return (self.out_features * self.in_features + groups) * self.bits // 8 + 2 * groups

    def operations(self, tokens: int) -> int:
        """Operations of a product with `tokens` rows; a multiply-add counts as two."""
        return 2 * tokens * self.out_features * self.in_features


@dataclass(frozen=True)
class Measured:
    """Time and error of one candidate.

    Attributes:
        times: seconds of one call, by round.
        error: ‖y − y₆₄‖ / ‖y₆₄‖, with y₆₄ the float64 product of the same weight and activations.
    """

    times: Times
    error: float


def shapes_of(layers: Iterable[LayerSpec]) -> list[Shape]:
    """The different shapes among a checkpoint's layers, most weights first."""
    counts: dict[Shape, int] = {}
    for layer in layers:
        shape = Shape(
            layer.out_features, layer.in_features, layer.bits, layer.group_size, layer.sym, layer.desc_act
        )
        counts[shape] = counts.get(shape, 0) + 1
    return _most_weights_first(replace(shape, count=count) for shape, count in counts.items())


def llama_shapes(name: str, bits: int, group_size: int, sym: bool = True) -> list[Shape]:
    """The linear layers of a Llama model ("1b", "8b" or "70b"), most weights first.

    Raises:
        ConfigError: the name is unknown.
    """
    if name not in _LLAMA:
        raise ConfigError(f"there are no shapes called {name!r}; there are {', '.join(_LLAMA)}")
    hidden, inner, narrow, count = _LLAMA[name]
    return _most_weights_first(
        Shape(out_features, in_features, bits, group_size, sym, count=times * count)
        for out_features, in_features, times in (
            (inner, hidden, 2),  # gate, up
            (hidden, inner, 1),  # down
            (hidden, hidden, 2),  # q, o
            (narrow, hidden, 2),  # k, v
        )
    )


def _most_weights_first(shapes: Iterable[Shape]) -> list[Shape]:
    return sorted(shapes, key=lambda shape: -shape.count * shape.out_features * shape.in_features)


def random_weight(shape: Shape) -> QuantizedMatrix:
    """Random codes of a weight that keeps the variance of its input, about as a trained layer does."""
    generator = torch.Generator().manual_seed(0)
    groups = group_count(shape.in_features, shape.group_size)
    g_idx = sequential_groups(shape.in_features, shape.group_size)
    if shape.act_order:
        g_idx = g_idx[torch.randperm(shape.in_features, generator=generator)]
    top = 2**shape.bits
    size = (shape.out_features, groups)
    zeros = torch.full(size, top // 2, dtype=torch.int16)
    if not shape.sym:
        zeros = torch.randint(1, top, size, generator=generator, dtype=torch.int16)
    step = 3.5 / top / math.sqrt(shape.in_features)
    return QuantizedMatrix(
        codes=torch.randint(
            0, top, (shape.out_features, shape.in_features), generator=generator, dtype=torch.uint8
        ),
        scales=((torch.rand(size, generator=generator) + 0.5) * step).half(),
        zeros=zeros,
        g_idx=g_idx,
        bits=shape.bits,
        group_size=shape.group_size,
    )


def registered(kernel: str) -> Candidate:
    """A kernel of `fewbit.kernels.registry`, by name.

    The candidate raises KernelError where the kernel cannot run the layer.
    """

    def make(codes: QuantizedMatrix, dtype: torch.dtype) -> Run:
        layer = QuantLinear.from_codes(codes, compute_dtype=dtype)
        layer.prepare(kernel)
        return layer

    return make


def dense(weight_dtype: torch.dtype) -> Candidate:
    """`torch.nn.Linear` with the dequantized weight; activations in the weight's dtype."""

    def make(codes: QuantizedMatrix, dtype: torch.dtype) -> Run:
        return _Dense(codes.dequantize(weight_dtype))

    return make


class _Dense(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x.to(self.weight.dtype), self.weight)


def torch_operator(codes: QuantizedMatrix, dtype: torch.dtype) -> Run:
    """torch's int4 operator alone: bfloat16 activations, scales and zero points, no corrections.

    It runs on the device of the codes, a CPU or a GPU of compute capability 8.0 or higher. The GPU operator is only
    measured: a kernel of the registry must be able to return its codes, and the packed order is not documented.

    Raises:
        KernelError: not 4 bits, or groups or a shape that the operator does not support.
    """
    on_gpu = codes.codes.device.type != "cpu"
    why_not = _why_not_torch_operator(codes, dtype, on_gpu)
    if why_not:
        raise KernelError(f"torch's int4 operator cannot run this layer: {why_not}")
    return _TorchOperatorGpu(codes) if on_gpu else _TorchOperator(codes)


def _why_not_torch_operator(codes: QuantizedMatrix, dtype: torch.dtype, on_gpu: bool) -> str:
    if codes.bits != 4:
        return f"{codes.bits} bits"
    if dtype != torch.bfloat16:
        return f"activations are {dtype}"
    if codes.group_size not in (32, 64, 128, 256) or codes.shape[1] % codes.group_size:
        return f"group_size {codes.group_size} with {codes.shape[1]} inputs"
    out_features, in_features = codes.shape
    if on_gpu and (out_features % 8 or in_features % (16 * _INNER_TILES)):
        return f"shape {out_features} x {in_features} is not a multiple of 8 x {16 * _INNER_TILES}"
    return "act-order" if codes.has_act_order else ""


class _TorchOperator(nn.Module):
    def __init__(self, codes: QuantizedMatrix) -> None:
        super().__init__()
        self.group_size = codes.group_size
        self.register_buffer("scales", _int4_scales(codes))
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.codes.int(), 1)
        self.register_buffer("packed", packed)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, self.group_size, self.scales)
        return y


class _TorchOperatorGpu(nn.Module):
    def __init__(self, codes: QuantizedMatrix) -> None:
        super().__init__()
        self.group_size = codes.group_size
        self.register_buffer("scales", _int4_scales(codes))
        # Two codes to a byte; the code of the even input is in the upper half.
        pairs = (codes.codes[:, ::2] << 4) | codes.codes[:, 1::2]
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack(pairs, _INNER_TILES))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm(x, self.packed, self.group_size, self.scales)
        return y


def _int4_scales(codes: QuantizedMatrix) -> Tensor:
    """(s, z) of Σ x·(s·(q − 8) + z), bfloat16 (groups, out, 2)."""
    scale = codes.scales.t().float()
    shift = scale * (8 - codes.zeros.t().float())
    return torch.stack([scale, shift], dim=-1).bfloat16().contiguous()


@dataclass(frozen=True)
class Method:
    """How a shape is measured.

    Attributes:
        rounds: number of rounds, see `in_turns`.
        budget: seconds per number of tokens after which no further round begins.
        rotate: bytes of the copies of each candidate on a CPU; None for `cold_bytes`. A GPU has one copy.
        device: device of weights and activations.
        stopwatch: clock for work on the device.
    """

    rounds: int = 9
    budget: float = 20.0
    rotate: int | None = None
    device: torch.device = _CPU
    stopwatch: Stopwatch = seconds_per_call


def measure_shape(
    shape: Shape,
    token_counts: Sequence[int],
    candidates: Mapping[str, Candidate],
    dtype: torch.dtype = torch.bfloat16,
    method: Method | None = None,
) -> tuple[dict[int, dict[str, Measured]], dict[str, str]]:
    """Measure every candidate at every number of tokens, with activations in `dtype`.

    Returns:
        tokens → name → result; and name → reason for each candidate that cannot run this layer.
    """
    method = method or Method()
    device = method.device
    weight = _on(random_weight(shape), device)
    rotations: dict[str, Rotation] = {}
    refused: dict[str, str] = {}
    for name, candidate in candidates.items():
        try:
            nbytes = 1 if device.type != "cpu" else method.rotate or cold_bytes()
            rotations[name] = Rotation(candidate(weight, dtype), nbytes)
        except (KernelError, DependencyError) as error:
            refused[name] = str(error)
    exact = weight.dequantize(torch.float64)
    results: dict[int, dict[str, Measured]] = {}
    with torch.inference_mode():
        for tokens in token_counts:
            generator = torch.Generator().manual_seed(tokens)
            x = torch.randn(tokens, shape.in_features, generator=generator).to(device, dtype)
            truth = x[:_ROWS_CHECKED].double() @ exact.t()
            work = {name: functools.partial(rotation, x) for name, rotation in rotations.items()}
            errors = {name: _relative(run()[:_ROWS_CHECKED], truth) for name, run in work.items()}
            clocks = {name: method.stopwatch(run) for name, run in work.items()}
            times = in_turns(clocks, method.rounds, method.budget)
            results[tokens] = {name: Measured(times[name], errors[name]) for name in work}
    return results, refused


def _on(codes: QuantizedMatrix, device: torch.device) -> QuantizedMatrix:
    moved = {name: getattr(codes, name).to(device) for name in ("codes", "scales", "zeros", "g_idx")}
    return replace(codes, **moved)


def _relative(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def cold_bytes() -> int:
    """Total size of the copies of a layer that guarantees that none is still in a cache when it is used again."""
    return max(4 * last_level_cache(), 128 << 20)


class Rotation:
    """Copies of one layer, used in turn; at most a thousand, because no model has more.

    Args:
        run: a module, or a callable that can be deep-copied and has its size in ``nbytes``.
        nbytes: least total size of the copies.
    """

    def __init__(self, run: Run, nbytes: int) -> None:
        copies = min(1000, math.ceil(nbytes / _held_bytes(run)))
        self._next = itertools.cycle([run, *(copy.deepcopy(run) for _ in range(copies - 1))])

    def __call__(self, x: Tensor) -> Tensor:
        return next(self._next)(x)


def _held_bytes(run: Any) -> int:
    if isinstance(run, nn.Module):
        return sum(tensor.nbytes for tensor in itertools.chain(run.buffers(), run.parameters()))
    return int(run.nbytes)
