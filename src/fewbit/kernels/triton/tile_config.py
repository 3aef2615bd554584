"""How a Triton product is cut into programs: one config by sizes alone, and a few others worth timing."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .fragments import pairs_in_unit, words_in_unit

DENSE_FROM = 256  # tokens; from here on, unpacking to memory takes less than half of the product's time
_LARGEST_BUCKET = 4096  # tokens; larger products are tuned as this size
_SHARED = (
    80 << 10
)  # bytes; consumer GPUs give a program 99 KB, and the products need part of it for other data
_PROGRAMS = 264  # enough to fill a large GPU; the same everywhere, so that results are the same everywhere


@dataclass(frozen=True)
class TileConfig:
    """How a product is cut up. It changes results only through the order of float32 additions.

    Attributes:
        path: "gemv" or "gemm" (the kernels of these names), or "dense" (dequantize, then torch's product).
        tokens: tokens per program.
        tiles: tiles of 32 outputs per program.
        depth: inputs that a warp ("gemv") or a program ("gemm") multiplies at once, where groups allow it.
        warps: warps per program; in "gemv" each has its own inputs.
        split: programs that share the inputs of the same outputs.
        stages: number of pipelined load steps.
    """

    path: str
    tokens: int = 16
    tiles: int = 1
    depth: int = 128
    warps: int = 4
    split: int = 1
    stages: int = 3


@dataclass(frozen=True)
class ProblemKey:
    """The sizes that a config depends on.

    Attributes:
        tokens: number of tokens, rounded up to a power of two.
        outputs: number of outputs.
        inputs: number of inputs.
        bits: bits per code.
        group: positions per group; 0 for one group.
        dtype: dtype of the activations, such as "float16".
    """

    tokens: int
    outputs: int
    inputs: int
    bits: int
    group: int
    dtype: str


def problem_key(
    tokens: int, outputs: int, inputs: int, bits: int, group: int, dtype: torch.dtype
) -> ProblemKey:
    """The key of a product with `tokens` rows."""
    bucket = min(_LARGEST_BUCKET, 1 << (tokens - 1).bit_length())
    return ProblemKey(bucket, outputs, inputs, bits, group, str(dtype).removeprefix("torch."))


def heuristic_config(key: ProblemKey) -> TileConfig:
    """A config by sizes alone that fits the shared memory of any recent GPU.

    Few tokens are bound by memory: about 25 KB must be in flight per multiprocessor, and for more than a few tokens x
    must not be read so often that it outweighs the weight. Many tokens are bound by arithmetic.
    """
    config = _by_sizes(key)
    while shared_bytes(config, key.bits) > _SHARED:
        config = _smaller(config)
    return config


def candidates(key: ProblemKey) -> tuple[TileConfig, ...]:
    """Configs worth timing, the heuristic one first. All have its path and split, and so the same form of output."""
    first = heuristic_config(key)
    others: tuple[TileConfig, ...] = ()
    if first.path == "dense" or key.dtype == "float32":
        pass
    elif key.tokens <= 2:
        others = (replace(first, warps=8), replace(first, warps=4), replace(first, warps=8, depth=256))
    elif key.tokens <= 16:
        others = (replace(first, tiles=2, depth=128), replace(first, warps=8))
    else:
        others = (
            replace(first, tokens=128, warps=8, stages=4),
            replace(first, tokens=64, warps=4),
        )
    return tuple(dict.fromkeys((first, *others)))


def shared_bytes(config: TileConfig, bits: int) -> int:
    """Approximate shared memory of a program: words and activations of the pipelined steps."""
    if config.path == "dense":
        return 0
    unit = 16 * pairs_in_unit(bits)  # inputs of a block
    depth = max(config.depth, unit)
    words = depth // unit * words_in_unit(bits) * 1024 * config.tiles
    slices = config.warps if config.path == "gemv" else 1
    return (config.stages - 1) * slices * (words + 2 * depth * config.tokens)


def _smaller(config: TileConfig) -> TileConfig:
    if config.tiles > 1 and config.path == "gemv":
        return replace(config, tiles=config.tiles // 2)
    if config.stages > 2:
        return replace(config, stages=config.stages - 1)
    if config.warps > 1 and config.path == "gemv":
        return replace(config, warps=config.warps // 2)
    return replace(config, tokens=config.tokens // 2)


def _by_sizes(key: ProblemKey) -> TileConfig:
    tiles = -(-key.outputs // 32)
    if key.tokens <= 2:
        warps = 16 if tiles <= 160 else 8 if tiles <= 320 else 4
        split = _power_of_two(_PROGRAMS // 2 // tiles, 4)
        return TileConfig("gemv", tokens=2, tiles=1, depth=128, warps=warps, split=split)
    if key.dtype == "float32":
        split = _power_of_two(_PROGRAMS // tiles, 8)
        return TileConfig("gemv", tokens=16, tiles=1, depth=32, warps=4, split=split)
    if key.tokens <= 16:
        tokens, widest = (8, 2) if key.tokens <= 8 else (16, 4)
        wide = min(widest, 4 if tiles >= 128 else 2 if tiles >= 64 else 1)
        split = _power_of_two(wide * _PROGRAMS // tiles, 8)
        return TileConfig("gemv", tokens, tiles=wide, depth=64, warps=4, split=split)
    if key.tokens >= DENSE_FROM:
        return TileConfig("dense")
    tokens, warps = (32, 4) if key.tokens <= 32 else (64, 4) if key.tokens == 64 else (128, 8)
    programs = -(-tiles // 4) * -(-key.tokens // tokens)
    split = _power_of_two(_PROGRAMS // programs, 8)
    return TileConfig("gemm", tokens, tiles=4, depth=64, warps=warps, split=split)


def _power_of_two(wanted: int, most: int) -> int:
    """The power of two at or below `wanted`, from 1 to `most`."""
    return min(most, 1 << max(0, wanted.bit_length() - 1))
