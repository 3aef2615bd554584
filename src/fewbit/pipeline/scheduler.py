"""The walk: many forward passes through one model, each paused at every place of interest.

This file knows nothing of quantization. A job is a function that runs the model's own forward once.
Each job runs in a greenlet. There are two kinds of meeting points:

- the forward of a *layer*: the job hands over its input and pauses. When every live job is paused, the
  earliest waiting layer has all the inputs it will get: `meet` is called with them and may change the
  layer; then the layer's own forward gives each job its output and the job runs on;
- the end of the forward of a *block* of layers: the job hands over what went in and what came out. When
  all jobs that are in the block are there, `leave` may change the block and the outputs.

So every job goes through every layer once, and each layer's inputs come through all layers that were
changed before it. Jobs called references see every layer as it was before `meet`: they are the same
forward passes through the unchanged model, side by side with the others.

Greenlets share one OS thread, so grad mode, autocast and default dtype are the same for all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerInput:
    """The input `x` that job number `job` brought to a layer."""

    job: int
    x: Tensor


@dataclass(frozen=True)
class BlockCall:
    """What job number `job` brought into a block, and what came out of it.

    Attributes:
        intact: whether the tensors it brought are as they were: no operation in place has changed them.
    """

    job: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    intact: bool = True


OnLayer = Callable[[str, list[LayerInput]], None]
Earliest = Callable[[int | None], int | None]
OnBlockEnd = Callable[[str, list[BlockCall]], Mapping[int, Callable[[], Any]]]
Running = Callable[[int], AbstractContextManager[None]]


@dataclass
class ScheduleStats:
    """What the walk saw: layers in the order met, inputs that came late, layers nobody reached.

    `late_references` are inputs of references, which therefore no longer are the unchanged model's.
    """

    met: list[str] = field(default_factory=list)
    late: Counter[str] = field(default_factory=Counter)
    late_references: Counter[str] = field(default_factory=Counter)
    unreached: list[str] = field(default_factory=list)

    def forget(self, points: Collection[str]) -> None:
        """Leave out meeting points that are no layers of interest."""
        for point in points:
            self.late.pop(point, None)
            self.late_references.pop(point, None)
        self.met = [name for name in self.met if name not in points]
        self.unreached = [name for name in self.unreached if name not in points]


@dataclass
class _Call:
    """A job paused in the forward of the layer `name`."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def arrival(self, job: int) -> LayerInput:
        first: Tensor = self.args[0] if self.args else next(iter(self.kwargs.values()))
        return LayerInput(job, first)


@dataclass
class _Exit:
    """A job paused at the end of the block `name`."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    intact: bool


def walk(
    layers: Mapping[str, nn.Module],
    jobs: Sequence[Callable[[], object]],
    meet: OnLayer,
    *,
    references: Collection[int] = (),
    blocks: Mapping[str, nn.Module] | None = None,
    leave: OnBlockEnd | None = None,
    gathered: Callable[[Collection[str]], None] | None = None,
    earliest: Earliest = lambda position: position,
    running: Running = lambda job: nullcontext(),
) -> ScheduleStats:
    """Run all `jobs` in lockstep and call ``meet(name, arrivals)`` once for every layer reached.

    The walk ends when the last layer has been met and its block left: what the model would compute after
    that is not run. A job that arrives at a layer already met (a layer used twice, or an expert reached
    out of order) runs through it and is counted in `ScheduleStats.late`; so does a reference, which then sees
    the changed layer and is counted in `ScheduleStats.late_references`.

    Args:
        layers: name → module, in the order in which layers that wait at the same time are served.
        jobs: each runs one forward pass of the model that holds the layers.
        meet: may replace the layer's parameters. Arrivals are in job order.
        references: numbers of the jobs that see each layer as it was before `meet`.
        blocks: name → module; their layers have names that begin with the block's name and a dot.
        leave: called with all passages through a block, in job order; the block and its layers then run
            normally. Returns functions that compute new outputs, for the jobs that need one.
        gathered: called before every meeting with the names of the layers and blocks at which jobs wait: they
            are nowhere else. The one that is met next is among them.
        earliest: where the same walk goes on in several processes, each with its own jobs: the first position of
            all of them, given that of this one, or None where nobody waits. Each process then meets every layer
            that any of them does, with its own arrivals, which may be none.
        running: gives, for a job's number, what is entered before the job computes and left when it pauses.

    Raises:
        Exception: whatever a job, `meet` or `leave` raises; all jobs are then ended and the layers restored.
    """
    changed = (meet, leave, gathered, earliest, running)
    return _Walk(layers, jobs, frozenset(references), dict(blocks or {}), *changed).run()


class _Walk:
    """The state of one walk."""

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        jobs: Sequence[Callable[[], object]],
        references: frozenset[int],
        blocks: Mapping[str, nn.Module],
        meet: OnLayer,
        leave: OnBlockEnd | None,
        gathered: Callable[[Collection[str]], None] | None,
        earliest: Earliest,
        running: Running,
    ) -> None:
        self.layers, self.blocks, self.references = layers, blocks, references
        self.meet, self.leave, self.gathered = meet, leave, gathered
        self.earliest, self.running = earliest, running
        self.stops = _in_order(list(layers), list(blocks))
        self.order = {name: i for i, name in enumerate(self.stops)}
        self.forwards = {name: module.forward for name, module in layers.items()}
        self.unmet, self.unleft = set(layers), set(blocks)
        self.traffic = ScheduleStats()
        self.waiting: dict[int, _Call | _Exit] = {}
        self.tasks = [greenlet(job) for job in jobs]

    def run(self) -> ScheduleStats:
        with _meeting_points(self.layers, self.blocks), _ended(self.tasks):
            for job in range(len(self.tasks)):
                with self.running(job):
                    self.advance(job)
            while (name := self.next()) is not None:
                if self.gathered is not None:
                    self.gathered({name, *(stop.name for stop in self.waiting.values())})
                group = [job for job in sorted(self.waiting) if self.waiting[job].name == name]
                if name in self.blocks:
                    self.pass_block(name, group)
                else:
                    self.pass_layer(name, group)
        self.traffic.unreached = [name for name in self.layers if name in self.unmet]
        return self.traffic

    def next(self) -> str | None:
        """Where the walk goes on; None at its end."""
        if not (self.unmet or self.unleft):
            return None
        first = self.earliest(min((self.order[stop.name] for stop in self.waiting.values()), default=None))
        return None if first is None else self.stops[first]

    def advance(self, job: int, *output: object) -> None:
        stop = self.tasks[job].switch(*output)
        if not self.tasks[job].dead:
            self.waiting[job] = stop

    def pass_layer(self, name: str, group: list[int]) -> None:
        module = self.layers[name]
        before = dict(module._parameters)
        if name in self.unmet:
            self.meet(name, [self.call(job).arrival(job) for job in group])
            self.unmet.remove(name)
            self.traffic.met.append(name)
        else:
            references = sum(job in self.references for job in group)
            self.traffic.late.update({name: len(group) - references} if len(group) > references else {})
            self.traffic.late_references.update({name: references} if references else {})
        for job in group:
            if not (self.unmet or self.unleft):
                return
            call = self.call(job)
            del self.waiting[job]
            with self.running(job):
                with _parameters(module, before if job in self.references else None):
                    output = self.forwards[name](*call.args, **call.kwargs)
                del call  # the input may be freed as soon as the job itself lets go of it
                self.advance(job, output)
                del output

    def call(self, job: int) -> _Call:
        call = self.waiting[job]
        assert isinstance(call, _Call)
        return call

    def pass_block(self, name: str, group: list[int]) -> None:
        passages = [self.passage(job) for job in group]
        outputs = {passage.job: _given(passage.output) for passage in passages}
        if name in self.unleft and self.leave is not None:
            outputs |= self.leave(name, passages)
        self.unleft.discard(name)
        del passages
        for job in group:
            if not (self.unmet or self.unleft):
                return
            with self.running(job):
                self.advance(job, outputs.pop(job)())

    def passage(self, job: int) -> BlockCall:
        stop = self.waiting.pop(job)
        assert isinstance(stop, _Exit)
        return BlockCall(job, stop.args, stop.kwargs, stop.output, stop.intact)


def _given(output: Any) -> Callable[[], Any]:
    return lambda: output


def _in_order(layers: list[str], blocks: list[str]) -> list[str]:
    """Names of layers and of blocks, which stand for their ends: a block ends after the last of its layers."""
    last = {
        block: max(i for i, name in enumerate(layers) if name.startswith(f"{block}.")) for block in blocks
    }
    keys = {name: (i, 0) for i, name in enumerate(layers)} | {block: (last[block], 1) for block in blocks}
    return sorted(keys, key=keys.__getitem__)


@contextmanager
def _parameters(module: nn.Module, parameters: dict[str, Any] | None) -> Iterator[None]:
    """While entered, `module` has these parameters, if any are given."""
    if parameters is None:
        yield
        return
    current = module._parameters
    module._parameters = parameters
    try:
        yield
    finally:
        module._parameters = current


@contextmanager
def _meeting_points(layers: Mapping[str, nn.Module], blocks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Replace the forward of each layer and block by one that pauses; put back exactly what was there.

    Outside of the jobs, as in `leave`, they run without a pause.
    """
    hub = getcurrent()

    def pause(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def paused(*args: Any, **kwargs: Any) -> Any:
            if getcurrent() is hub:
                return forward(*args, **kwargs)
            return hub.switch(_Call(name, args, kwargs))

        return paused

    def pause_after(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def paused(*args: Any, **kwargs: Any) -> Any:
            if getcurrent() is hub:
                return forward(*args, **kwargs)
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            versions = [tensor._version for tensor in given]
            output = forward(*args, **kwargs)
            intact = versions == [tensor._version for tensor in given]
            return hub.switch(_Exit(name, args, kwargs, output, intact))

        return paused

    stops = [(module, pause(name, module.forward)) for name, module in layers.items()]
    stops += [(module, pause_after(name, module.forward)) for name, module in blocks.items()]
    previous = [module.__dict__.get("forward") for module, _ in stops]
    try:
        for module, forward in stops:
            module.__dict__["forward"] = forward
        yield
    finally:
        for (module, _), own in zip(stops, previous, strict=True):
            if own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = own


@contextmanager
def _ended(tasks: Sequence[greenlet]) -> Iterator[None]:
    """End every job that is still paused, so that its stack and activations are released."""
    try:
        yield
    finally:
        for task in tasks:
            if task:
                task.throw()
