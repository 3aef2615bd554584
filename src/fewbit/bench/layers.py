"""One layer shape at a time: milliseconds by kernel and number of tokens, with memory as cold as in a model.

In a model a layer's weight was read a whole model ago, so it comes from memory. On a CPU every candidate therefore has
as many copies of the layer as it takes to be several times larger than the last-level cache, and uses them in rotation;
on a GPU the clock empties the cache before each call (`gpu`).
Weights are random codes; time does not depend on them.
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
from torch import Tensor, nn
from torch.nn import functional

from ..checkpoint.reader import LayerSpec
from ..errors import DependencyError, KernelError
from ..kernels import registry
from ..kernels.linear import QuantLinear
from ..kernels.spec import KernelSpec
from ..quantized_matrix import QuantizedMatrix, group_count, sequential_groups
from .machine import last_level_cache
from .timing import Stopwatch, Times, in_turns, seconds_per_call

Run = Callable[[Tensor], Tensor]
Candidate = Callable[[QuantizedMatrix, torch.dtype], Run]

_INNER_TILES = 8  # of 16 inputs that torch's operator for GPUs packs together: 2, 4 or 8
_ROWS_CHECKED = 64  # of the product, against float64


@dataclass(frozen=True)
class Shape:
    """What a layer's speed depends on.

    Attributes:
        count: how many layers of a model are like this.
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
        """Of the packed codes, zero points and float16 scales, all of which a product must read."""
        groups = group_count(self.in_features, self.group_size) * self.out_features
        return (self.out_features * self.in_features + groups) * self.bits // 8 + 2 * groups

    def operations(self, tokens: int) -> int:
        """Of a product with `tokens` rows; a multiply-add counts two."""
        return 2 * tokens * self.out_features * self.in_features


@dataclass(frozen=True)
class Measured:
    """Attributes:
    times: of one call.
    error: ‖y − y₆₄‖ / ‖y₆₄‖ against the product in float64 of the same weight and activations.
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
    found = [Shape(**{**vars(shape), "count": count}) for shape, count in counts.items()]
    return sorted(found, key=lambda shape: -shape.count * shape.out_features * shape.in_features)


def able_kernels(
    shapes: Iterable[Shape], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> list[str]:
    """Kernels of the registry that can run all these layers here; not the reference, which is for checking."""
    able: list[str] = [name for name in registry.names() if name != "reference"]
    for shape in shapes:
        spec = KernelSpec(
            shape.bits, shape.group_size, shape.sym, shape.act_order, shape.in_features, shape.out_features
        )
        reasons = dict(registry.explain(spec, device, dtype))
        able = [name for name in able if reasons[name] is None]
    return able


def random_weight(shape: Shape, seed: int = 0) -> QuantizedMatrix:
    """Random codes whose weight has about unit variance per row sum, as trained layers do."""
    generator = torch.Generator().manual_seed(seed)
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
    """torch's int4 operator by itself: bfloat16, scales and zero points rounded to it, no corrections.

    The one for CPUs or, where the codes are on a GPU (compute capability 8.0 or higher), the other. That is measured
    only: as a kernel of the registry it would have to give back its codes, and their order in its packed form is not
    documented.

    Raises:
        KernelError: not 4 bits, or groups or a shape that it does not know.
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
        # Two codes to a byte, that of the even input in the upper half.
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


def measure_shape(
    shape: Shape,
    token_counts: Sequence[int],
    candidates: Mapping[str, Candidate],
    dtype: torch.dtype = torch.bfloat16,
    *,
    rounds: int = 9,
    budget: float = 20.0,
    rotate: int | None = None,
    device: torch.device | str = "cpu",
    stopwatch: Stopwatch = seconds_per_call,
) -> tuple[dict[int, dict[str, Measured]], dict[str, str]]:
    """Every candidate at every number of tokens.

    Args:
        dtype: of the activations.
        rounds, budget: see `in_turns`, for each number of tokens.
        rotate: bytes of each candidate's copies; None: `cold_bytes`. On a GPU there is one.
        device: where everything lies.
        stopwatch: measures work there.

    Returns:
        tokens → name → what was measured; and the candidates that cannot run this layer, with the reason.
    """
    weight = _on(random_weight(shape), torch.device(device))
    rotations: dict[str, Rotation] = {}
    refused: dict[str, str] = {}
    for name, candidate in candidates.items():
        try:
            nbytes = 1 if torch.device(device).type != "cpu" else rotate or cold_bytes()
            rotations[name] = Rotation(candidate(weight, dtype), nbytes)
        except (KernelError, DependencyError) as error:
            refused[name] = str(error)
    exact = weight.dequantize(torch.float64)
    results: dict[int, dict[str, Measured]] = {}
    with torch.inference_mode():
        for tokens in token_counts:
            x = torch.randn(tokens, shape.in_features, generator=torch.Generator().manual_seed(tokens)).to(
                device, dtype
            )
            truth = x[:_ROWS_CHECKED].double() @ exact.t()
            work = {name: functools.partial(rotation, x) for name, rotation in rotations.items()}
            errors = {name: _relative(run()[:_ROWS_CHECKED], truth) for name, run in work.items()}
            times = in_turns({n: stopwatch(run) for n, run in work.items()}, rounds, budget)
            results[tokens] = {name: Measured(times[name], errors[name]) for name in work}
    return results, refused


def _on(codes: QuantizedMatrix, device: torch.device) -> QuantizedMatrix:
    moved = {name: getattr(codes, name).to(device) for name in ("codes", "scales", "zeros", "g_idx")}
    return replace(codes, **moved)


def _relative(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def cold_bytes() -> int:
    """What copies of a layer must hold together so that none is still in a cache when its turn comes."""
    return max(4 * last_level_cache(), 128 << 20)


class Rotation:
    """Copies of one layer, used in turn; of a tiny one not more than a thousand, as no model has more.

    Args:
        run: a module, or a callable that can be deep-copied and says its size in ``nbytes``.
        nbytes: what the copies hold together, at least.
    """

    def __init__(self, run: Run, nbytes: int) -> None:
        copies = min(1000, math.ceil(nbytes / _held_bytes(run)))
        self._next = itertools.cycle([run, *(copy.deepcopy(run) for _ in range(copies - 1))])

    def __call__(self, x: Tensor) -> Tensor:
        """The product, from the next copy."""
        return next(self._next)(x)


def _held_bytes(run: Any) -> int:
    if isinstance(run, nn.Module):
        return sum(tensor.nbytes for tensor in itertools.chain(run.buffers(), run.parameters()))
    return int(run.nbytes)
