"""The walk: many forward passes through one model, each paused at every layer of interest.

This file knows nothing of quantization. A job is a function that runs the model's own forward once.
Each job runs in a greenlet; the forward of each layer is a meeting point, where the job hands over
its input and pauses. When every live job is paused, the earliest waiting layer has all the inputs it
will get: `meet` is called with them and may change the layer; then the layer's own forward gives each
job its output and the job runs on. So every job goes through every layer once, and each layer's
inputs come through all layers that were changed before it.

Greenlets share one OS thread, so grad mode, autocast and default dtype are the same for all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor, nn


@dataclass(frozen=True)
class Arrival:
    """The input `x` that job number `job` brought to a meeting point."""

    job: int
    x: Tensor


Meet = Callable[[str, list[Arrival]], None]


@dataclass
class Traffic:
    """What the walk saw: layers in the order met, inputs that came late, layers nobody reached."""

    met: list[str] = field(default_factory=list)
    late: Counter[str] = field(default_factory=Counter)
    unreached: list[str] = field(default_factory=list)


@dataclass
class _Call:
    """A job paused in the forward of the layer `name`."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def x(self) -> Tensor:
        first: Tensor = self.args[0] if self.args else next(iter(self.kwargs.values()))
        return first


def walk(layers: Mapping[str, nn.Module], jobs: Sequence[Callable[[], object]], meet: Meet) -> Traffic:
    """Run all `jobs` in lockstep and call ``meet(name, arrivals)`` once for every layer reached.

    The walk ends when the last layer has been met: what the model would compute after it is not run.
    A job that arrives at a layer already met (a layer used twice, or an expert reached out of order)
    runs through it and is counted in `Traffic.late`.

    Args:
        layers: name → module, in the order in which layers that wait at the same time are served.
        jobs: each runs one forward pass of the model that holds the layers.
        meet: may replace the layer's weight. Arrivals are in job order.

    Raises:
        Exception: whatever a job or `meet` raises; all jobs are then ended and the layers restored.
    """
    traffic = Traffic()
    order = {name: position for position, name in enumerate(layers)}
    forwards = {name: module.forward for name, module in layers.items()}
    unmet = set(layers)
    waiting: dict[int, _Call] = {}
    tasks = [greenlet(job) for job in jobs]

    def advance(job: int, *output: object) -> None:
        call = tasks[job].switch(*output)
        if not tasks[job].dead:
            waiting[job] = call

    with _meeting_points(layers), _ended(tasks):
        for job in range(len(tasks)):
            advance(job)
        while waiting and unmet:
            name = min((call.name for call in waiting.values()), key=order.__getitem__)
            group = [job for job in sorted(waiting) if waiting[job].name == name]
            if name in unmet:
                meet(name, [Arrival(job, waiting[job].x) for job in group])
                unmet.remove(name)
                traffic.met.append(name)
            else:
                traffic.late[name] += len(group)
            for job in group:
                if not unmet:
                    break
                call = waiting.pop(job)
                output = forwards[name](*call.args, **call.kwargs)
                del call  # the input may be freed as soon as the job itself lets go of it
                advance(job, output)
                del output
    traffic.unreached = [name for name in layers if name in unmet]
    return traffic


@contextmanager
def _meeting_points(layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Replace the forward of each layer by a pause; put back exactly what was there."""
    hub = getcurrent()

    def pause(name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: hub.switch(_Call(name, args, kwargs))

    previous = {name: module.__dict__.get("forward") for name, module in layers.items()}
    try:
        for name, module in layers.items():
            module.__dict__["forward"] = pause(name)
        yield
    finally:
        for name, module in layers.items():
            if previous[name] is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = previous[name]


@contextmanager
def _ended(tasks: Sequence[greenlet]) -> Iterator[None]:
    """End every job that is still paused, so that its stack and activations are released."""
    try:
        yield
    finally:
        for task in tasks:
            if task:
                task.throw()
