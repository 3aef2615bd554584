"""What many processes would gain, on paper: the tables of docs/scale.md.

    python benchmarks/scale.py

Every part of a run is counted in floating-point operations, bytes or steps, from the shapes of the layers; a
`Machine` says what each costs. Parts are divided over ranks by batches or by rows, or not at all. Assumed, not
measured: `H100`. What is measured is the step from one process to two on a CPU: `python benchmarks/ranks.py`, which
prints `two_processes` beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

GRIDS = 3  # grids that a layer is rounded with
PROBE = 2048  # held-out rows of a layer
GRID_BYTES = 147 * 6 * 8  # per weight, to fit a 4-bit grid: candidates × passes × (read and write)
ROUNDING_BYTES = 28  # per product of two inputs and batch, to round it to integers and add it, in torch
SMALL_PER_LAYER, SMALL_PER_INPUT = 11, 8  # exchanges of a few bytes
STARVED = 2  # tokens for each input feature that an expert gets at least


@dataclass(frozen=True)
class Input:
    """An input of n features that one or more layers share, and their rows m; `times` such inputs in a block."""

    n: int
    rows: tuple[int, ...]
    times: int = 1
    expert_share: float = 1.0  # of the tokens, that are routed here


@dataclass(frozen=True)
class Model:
    """Blocks by kind, each with how many there are; width of the attention's scores."""

    name: str
    blocks: tuple[tuple[int, tuple[Input, ...]], ...]
    attention: int
    other_weights: float  # embeddings

    @property
    def inputs(self) -> Iterator[tuple[int, Input]]:
        """Every input with the number of times it occurs in the model."""
        for count, inputs in self.blocks:
            for one in inputs:
                yield count * one.times, one

    @property
    def weights(self) -> float:
        return sum(count * one.n * sum(one.rows) for count, one in self.inputs)


def llama(name: str, blocks: int, hidden: int, inner: int, kv: int, vocabulary: int) -> Model:
    """The shapes of a dense Llama."""
    block = (
        Input(hidden, (hidden, kv, kv)),
        Input(hidden, (hidden,)),
        Input(hidden, (inner, inner)),
        Input(inner, (hidden,)),
    )
    return Model(name, ((blocks, block),), hidden, 2 * vocabulary * hidden)


def deepseek_v3() -> Model:
    """61 blocks with latent attention; 3 dense ones, 58 with 256 routed experts (8 for each token) and a shared one."""
    hidden, q, kv = 7168, 1536, 512
    attention = (
        Input(hidden, (q, kv + 64)),
        Input(q, (128 * 192,)),
        Input(kv, (128 * 256,)),
        Input(128 * 128, (hidden,)),
    )
    dense = (Input(hidden, (18432, 18432)), Input(18432, (hidden,)))
    shared = (Input(hidden, (2048, 2048)), Input(2048, (hidden,)))
    experts = (Input(hidden, (2048, 2048), 256, 8 / 256), Input(2048, (hidden,), 256, 8 / 256))
    blocks = ((3, attention + dense), (58, attention + shared + experts))
    return Model("DeepSeek-V3 671B", blocks, 128 * 192, 2 * 129280 * hidden)


MODELS = (
    llama("Llama-3 8B", 32, 4096, 14336, 1024, 128256),
    llama("Llama-3 70B", 80, 8192, 28672, 1024, 128256),
    deepseek_v3(),
)


@dataclass(frozen=True)
class Machine:
    """What one rank, its node and the network do, in units per second.

    Attributes:
        forward: bfloat16 operations. product: float32 ones of matrix products. factor: of a factorization.
        column: seconds for one column of the column loop, however many rows and grids. memory: bytes.
        near, far: bytes of an all-reduce inside a node and between nodes, per rank. hop: seconds for a few bytes to
            the next rank. read, write: bytes of a node's disk (hashing included).
    """

    forward: float
    product: float
    factor: float
    column: float
    memory: float
    near: float
    far: float
    hop: float
    read: float
    write: float
    ranks_per_node: int = 8


# Half of the bfloat16 peak of 990 Tflop/s; float32 without tensor cores; 400 Gb/s for each GPU between nodes, 80% of
# it used. A column, of all grids at once, is 13 operations of torch, launched one after the other.
H100 = Machine(
    forward=500e12, product=50e12, factor=10e12, column=50e-6, memory=2.5e12, near=300e9, far=40e9, hop=30e-6,
    read=2.5e9, write=0.6e9,
)  # fmt: skip
FUSED = Machine(**{**H100.__dict__, "column": 2e-6})

BATCHES, ROWS, ALONE, EXCHANGE = "batches", "rows", "every rank", "exchange"
PARTS = {
    "forward, both paths": BATCHES,
    "Hessians and covariances": BATCHES,
    "grid, correction, rounding": ROWS,
    "column loop": ALONE,
    "factorizations": ALONE,
    "reading and writing": ALONE,
    "sums": EXCHANGE,
    "codes and holdout": EXCHANGE,
    "small messages": EXCHANGE,
}


def seconds(model: Model, machine: Machine, ranks: int, sequences: int, seq_len: int) -> dict[str, float]:
    """Seconds of every part on the slowest rank."""
    tokens = sequences * seq_len
    batches = -(-sequences // ranks) / sequences
    part: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    bandwidth = machine.near if ranks <= machine.ranks_per_node else machine.far
    passed_on = (ranks - 1) / ranks
    for count, one in model.inputs:
        n, m = one.n, sum(one.rows)
        active = tokens * one.expert_share
        seen = active if one.expert_share == 1 else max(active, min(STARVED * n, tokens))
        part["forward, both paths"] += count * 2 * 2 * m * n * active / machine.forward
        part["Hessians and covariances"] += count * (1.2 + 2) * seen * n * n / machine.product
        # The upper triangle of H, in blocks, and all of C.
        part["Hessians and covariances"] += count * 1.6 * n * n * sequences * ROUNDING_BYTES / machine.memory
        part["factorizations"] += count * 2 / 3 * n**3 / machine.factor
        products = (4 + GRIDS) * m * n * n + 8 * PROBE * m * n
        part["grid, correction, rounding"] += count * (
            products / machine.product + GRID_BYTES * m * n / machine.memory
        )
        part["column loop"] += count * n * len(one.rows) * machine.column
        part["sums"] += count * 2 * passed_on * 8 * n * n / bandwidth
        part["codes and holdout"] += count * passed_on * (m * n + 8 * PROBE * n) / bandwidth
        small = SMALL_PER_LAYER * len(one.rows) + SMALL_PER_INPUT
        part["small messages"] += count * small * 2 * (ranks - 1) * machine.hop
    layers = sum(count for count, _ in model.blocks)
    part["forward, both paths"] += 2 * 2 * layers * tokens * seq_len * model.attention / machine.forward
    part["forward, both paths"] *= batches
    part["Hessians and covariances"] *= batches
    part["grid, correction, rounding"] /= ranks
    total = model.weights + model.other_weights
    part["reading and writing"] = 2 * 2 * total / machine.read + 4.25 / 8 * total / machine.write
    return part


def two_processes(report: Mapping[str, Any], flops: float, bandwidth: float = 1.5e9) -> float:
    """Seconds that a run of two processes should take, given the report of one.

    Forward passes, Hessians and the solve are halved; of the solve, factorizations are not; the rest stays.

    Args:
        flops: of a Cholesky factorization, float32, per second. bandwidth: of an all-reduce, bytes per second.
    """
    phases = report["seconds_by_phase"]
    inner = sum(phases.get(name, 0.0) for name in ("hessian", "solve", "pack", "journal", "load"))
    inputs = _inputs(report["layers"])
    factors = sum(2 / 3 * n**3 for n in inputs) / flops
    exchange = sum(8 * n * n for n in inputs) / bandwidth
    halved = phases["walk"] - inner + phases["hessian"] + phases["solve"] - factors
    return report["seconds"] - halved / 2 + exchange


def _inputs(layers: Sequence[Mapping[str, Any]]) -> list[int]:
    """Features of every distinct input of a Llama's layers."""
    later = ("k_proj", "v_proj", "up_proj")
    return [layer["in_features"] for layer in layers if not layer["name"].endswith(later)]


def _table(machine: Machine, sequences: int) -> None:
    print("| model | ranks | time | faster | efficiency | largest parts |\n|---|--:|--:|--:|--:|---|")
    for model in MODELS:
        alone = sum(seconds(model, machine, 1, sequences, 2048).values())
        for ranks in (1, 8, 64, 512):
            parts = seconds(model, machine, ranks, sequences, 2048)
            total = sum(parts.values())
            largest = sorted(parts, key=lambda name: -parts[name])[:3]
            shares = ", ".join(f"{name} {parts[name] / total:.0%}" for name in largest)
            gain = f"{alone / total:.1f}× | {alone / total / ranks:.0%}"
            print(
                f"| {model.name if ranks == 1 else ''} | {ranks} | {_duration(total)} | {gain} | {shares} |"
            )


def _parts() -> None:
    print("| part | divided by | " + " | ".join(model.name for model in MODELS) + " |")
    print("|---|---|" + "--:|" * len(MODELS))
    alone = [seconds(model, H100, 1, 128, 2048) for model in MODELS]
    many = [seconds(model, H100, 64, 128, 2048) for model in MODELS]
    for name, divided in PARTS.items():
        times = many if divided == EXCHANGE else alone
        shown = " | ".join(_duration(parts[name]) for parts in times)
        print(f"| {name} | {divided} | {shown} |")


def _bytes() -> None:
    print("| model | layers | summed per block | summed in all | codes gathered |\n|---|--:|--:|--:|--:|")
    for model in MODELS:
        summed = sum(count * 8 * one.n**2 for count, one in model.inputs)
        _, inputs = model.blocks[-1]
        block = sum(8 * one.n**2 * one.times for one in inputs)
        layers = sum(count * len(one.rows) for count, one in model.inputs)
        sums = f"{block / 1e9:.1f} GB | {summed / 1e9:,.0f} GB"
        print(f"| {model.name} | {layers:,} | {sums} | {model.weights / 1e9:,.0f} GB |")


def _duration(value: float) -> str:
    if value < 120:
        return f"{value:.0f} s" if value >= 1 else f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def main() -> None:
    """The tables."""
    print("One rank; exchanges: 64 ranks. 128 × 2048 tokens\n")
    _parts()
    print("\nWhat ranks exchange\n")
    _bytes()
    for title, machine, sequences in (
        ("As it is, 128 × 2048 tokens", H100, 128),
        ("With the column loop in one kernel, 128 × 2048 tokens", FUSED, 128),
        ("With the column loop in one kernel, 512 × 2048 tokens", FUSED, 512),
    ):
        print(f"\n{title}\n")
        _table(machine, sequences)


if __name__ == "__main__":
    main()
