"""``fewbit bench --layers``, ``--shapes`` and ``--device cuda``: one layer shape at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from .display import console, plain

if TYPE_CHECKING:
    import torch

    from ..bench.layers import Candidate, Measured, Shape
    from ..bench.machine import Machine

_LINEAR, _INT4 = "Linear", "torch int4"
_TOKENS = {"cpu": (1, 16, 512), "cuda": (1, 16, 2048)}


@dataclass(frozen=True)
class Found:
    """What was measured: for each shape tokens → kernel → times, and the kernels that cannot run it."""

    machine: Machine
    dtype: torch.dtype
    shapes: list[tuple[Shape, dict[int, dict[str, Measured]], dict[str, str]]]

    def facts(self, rounds: bool) -> dict[str, Any]:
        """As JSON; `rounds`: with the seconds of every round."""
        rows = [
            {
                "shape": asdict(shape),
                "results": [
                    self._cell(shape, tokens, name, row, rounds)
                    for tokens, row in results.items()
                    for name in row
                ],
                "refused": refused,
            }
            for shape, results, refused in self.shapes
        ]
        return {"machine": asdict(self.machine), "layers": rows}

    def show(self) -> None:
        """Print the machine's limits and one table per shape."""
        screen, machine = Console(), self.machine
        rate = machine.peaks.get(_name(self.dtype), 0.0)
        reads = "reads" if machine.name == "CPU" else "copies"
        where = f"{machine.threads} threads" if machine.name == "CPU" else machine.name
        screen.print(
            f"{where}: {reads} {machine.read_bandwidth / 1e9:.1f} GB/s from memory, "
            f"{rate / 1e9:.0f} GFLOP/s in {_name(self.dtype)}"
        )
        for shape, results, refused in self.shapes:
            screen.print(self._table(shape, results))
            for name, why in refused.items():
                console.print(plain(f"{name}: {why}"))

    def _cell(
        self, shape: Shape, tokens: int, name: str, row: dict[str, Measured], rounds: bool
    ) -> dict[str, Any]:
        """One cell of the table; `share` is of what limits it, read bandwidth or the arithmetic peak."""
        seconds = row[name].times.minimum
        dense_bytes = shape.out_features * shape.in_features * self.dtype.itemsize
        nbytes = dense_bytes if name == _LINEAR else shape.nbytes
        rate, peak = shape.operations(tokens) / seconds, self.machine.peaks.get(_name(self.dtype))
        of_bandwidth = nbytes / seconds / self.machine.read_bandwidth
        by_memory = not peak or of_bandwidth >= rate / peak
        share = of_bandwidth if by_memory else rate / peak if peak else None
        facts: dict[str, Any] = {
            "kernel": name,
            "tokens": tokens,
            "ms": seconds * 1e3,
            "ms_median": row[name].times.median * 1e3,
            "gigabytes_per_second": nbytes / seconds / 1e9,
            "gigaflops": rate / 1e9,
            "limit": "memory" if by_memory else "arithmetic",
            "share": share if peak or tokens == 1 else None,
            "times_linear": row[_LINEAR].times.minimum / seconds,
            "error": row[name].error,
        }
        if _INT4 in row:
            facts["times_torch_int4"] = row[_INT4].times.minimum / seconds
        return facts | ({"seconds": row[name].times.seconds} if rounds else {})

    def _table(self, shape: Shape, results: dict[int, dict[str, Measured]]) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left")
        groups = "one group per row" if shape.group_size == -1 else f"groups of {shape.group_size}"
        layers = f"{shape.count} layers of {shape.out_features} x {shape.in_features}"
        table.title = f"{layers}, {shape.bits} bits, {groups}"
        table.add_column("tokens", justify="right")
        table.add_column("kernel")
        for column in ("ms", "median", "GB/s", "share of", "", "x Linear", "x int4", "error"):
            table.add_column(column, justify="right")
        for tokens, row in results.items():
            for name in row:
                facts = self._cell(shape, tokens, name, row, rounds=False)
                share, against = facts["share"], facts.get("times_torch_int4")
                memory = facts["limit"] == "memory"
                table.add_row(
                    str(tokens),
                    name,
                    f"{facts['ms']:.3f}" if facts["ms"] >= 0.1 else f"{facts['ms']:.4f}",
                    f"{facts['ms_median']:.3f}" if facts["ms"] >= 0.1 else f"{facts['ms_median']:.4f}",
                    f"{facts['gigabytes_per_second']:.1f}" if memory else "",
                    "" if share is None else f"{share:.0%}",
                    "" if share is None else facts["limit"],
                    f"{facts['times_linear']:.2f}",
                    "" if against is None else f"{against:.2f}",
                    f"{facts['error']:.1e}",
                )
        return table


def measure_layers(
    shapes: list[Shape],
    kernels: list[str],
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    progress: Callable[[str, int, int], None],
    rivals: Mapping[str, Candidate] | None = None,
) -> Found:
    """Every shape on every kernel, on a CPU or a GPU, beside the dense layer and torch's int4 operator.

    Args:
        rivals: further candidates, by name.

    Raises:
        KernelError: the GPU is not here.
    """
    from ..bench import layers
    from ..bench.gpu import cuda_clock, measure_gpu
    from ..bench.machine import measure_machine
    from ..bench.timing import seconds_per_call

    candidates = {name: layers.registered(name) for name in kernels}
    candidates |= {_LINEAR: layers.dense(dtype), _INT4: layers.torch_operator, **(rivals or {})}
    on_gpu = device.type != "cpu"
    stopwatch = cuda_clock(device) if on_gpu else seconds_per_call
    machine = measure_gpu(device, stopwatch) if on_gpu else measure_machine()
    found = []
    for done, shape in enumerate(shapes):
        progress(f"{shape.out_features} x {shape.in_features}", done, len(shapes))
        results, refused = layers.measure_shape(
            shape,
            _TOKENS[device.type],
            candidates,
            dtype,
            rounds=rounds,
            device=device,
            stopwatch=stopwatch,
        )
        found.append((shape, results, refused))
    return Found(machine, dtype, found)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
