"""Many forward passes through one model in lockstep, each paused at every sync point.

This file knows nothing about quantization. A *job* is a function that runs the model's own forward once, on one batch.
Every job runs in a greenlet. There are two kinds of sync points:

- the forward of a *layer*: the job hands over its input and pauses. Once all jobs are paused, the earliest waiting
  layer has received every input it will get: `Hooks.on_layer` is called with them and may change the layer. Then the
  layer's own forward computes each job's output, and the job resumes until its next sync point;
- the end of the forward of a *block* of layers: the job hands over the block's arguments and its output. Once all jobs
  in the block are there, `Hooks.on_block_end` may change the block and the outputs.

So each job runs through each layer once, and the inputs of a layer went through all layers that were changed before it:
true-sequential quantization for the price of one forward pass, without code for any architecture. Jobs called
*references* see every layer as it was before `on_layer`: they are forward passes of the unchanged model, in step with
the others.

Greenlets share one OS thread, so grad mode, autocast and the default dtype are the same for all jobs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from transformers import Cache

from ..modeling.layers import forward_replaced


@dataclass(frozen=True)
class LayerInput:
    """The input `x` that job number `job` passed to a layer."""

    job: int
    x: Tensor


@dataclass(frozen=True)
class BlockCall:
    """One job's call of a block.

    Attributes:
        job: number of the job.
        args: positional arguments of the block's forward.
        kwargs: keyword arguments of the block's forward, without caches of keys and values.
        output: return value of the block's forward.
        intact: whether no in-place operation has changed the argument tensors.
    """

    job: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    intact: bool = True


OnLayer = Callable[[str, list[LayerInput]], None]
OnBlockEnd = Callable[[str, list[BlockCall]], Mapping[int, Callable[[], Any]]]
OnWaiting = Callable[[Collection[str]], None]
MinPosition = Callable[[int | None], int | None]
Running = Callable[[int], AbstractContextManager[None]]


@dataclass(frozen=True)
class Hooks:
    """Callbacks of a `Scheduler`.

    Attributes:
        on_layer: called at a layer's first use with its inputs in job order; may replace the layer's parameters.
        on_later_use: called likewise at each further use that `Scheduler` was told of.
        on_block_end: called once per block with the calls of all jobs in job order; the block and its layers can be
            called normally inside. Returns functions that compute new outputs, by job, for jobs that need one.
        on_waiting: called before every sync point with the names of all layers and blocks at which jobs are paused,
            the next one included.
        min_position: for runs of several processes, each with its own jobs: maps this process's earliest sync point
            to the earliest of all processes; None means that no job is paused. Every process then visits the same
            layers, possibly with no inputs.
        running: given a job's number, returns the context in which the job computes; exited when the job pauses.
    """

    on_layer: OnLayer
    on_block_end: OnBlockEnd | None = None
    on_later_use: OnLayer | None = None
    on_waiting: OnWaiting | None = None
    min_position: MinPosition = lambda position: position
    running: Running = lambda job: nullcontext()


@dataclass
class ScheduleStats:
    """Irregularities of a calibration pass.

    Attributes:
        late_inputs: layer → number of inputs that arrived after `on_layer`.
        late_reference_inputs: layer → number of such inputs of references, which from there on are no longer forward
            passes of the unchanged model.
        unreached: layers that no job reached.
    """

    late_inputs: Counter[str] = field(default_factory=Counter)
    late_reference_inputs: Counter[str] = field(default_factory=Counter)
    unreached: list[str] = field(default_factory=list)

    def without(self, names: Collection[str]) -> ScheduleStats:
        """Return the statistics without these sync points."""
        late, late_references = (
            Counter({name: count for name, count in counts.items() if name not in names})
            for counts in (self.late_inputs, self.late_reference_inputs)
        )
        return ScheduleStats(late, late_references, [name for name in self.unreached if name not in names])


@dataclass
class _Pause:
    """The state of a paused job: its call of a layer, or its finished call of a block."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    intact: bool = True


class Scheduler:
    """Runs jobs in lockstep.

    Args:
        layers: name → module. Among waiting layers, the first in this order is served first.
        jobs: functions that each run one forward pass of the model that holds the layers.
        hooks: callbacks.
        references: numbers of the jobs that see each layer as it was before `on_layer`.
        blocks: name → module. The names of a block's layers begin with the block's name and a dot.
        uses: layer → number of uses that the pass waits for; 1 if it is not given.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        jobs: Sequence[Callable[[], object]],
        hooks: Hooks,
        *,
        references: Collection[int] = (),
        blocks: Mapping[str, nn.Module] | None = None,
        uses: Mapping[str, int] | None = None,
    ) -> None:
        self.layers, self.blocks = layers, dict(blocks or {})
        self.hooks, self.references = hooks, frozenset(references)
        self.forwards = {name: module.forward for name, module in layers.items()}
        self.order = _execution_order(list(layers), list(self.blocks))
        self.positions = {name: i for i, name in enumerate(self.order)}
        self.pending = {*self.layers, *self.blocks}  # sync points that the pass still waits for
        self.uses_left = {name: (uses or {}).get(name, 1) for name in self.layers}
        self.met: set[str] = set()  # layers whose first use is over
        self.paused: dict[int, _Pause] = {}  # job number → where it waits
        self.greenlets = [greenlet(job) for job in jobs]
        self.stats = ScheduleStats()

    def run(self) -> ScheduleStats:
        """Run all jobs until every sync point was served, or no job is left.

        What the model computes after the last sync point is not run. A job that arrives at a layer after `on_layer` (a
        layer used twice, or an expert reached out of order) runs through it and is counted in the statistics.

        Raises:
            Exception: any exception of a job or a hook; all jobs are then ended and the forwards restored.
        """
        with _pausing_forwards(self.layers, self.blocks), _ended(self.greenlets):
            # Run every job up to its first sync point.
            for job in range(len(self.greenlets)):
                with self.hooks.running(job):
                    self._switch(job)
            # Invariant: every live job is paused. So no more inputs can come to the earliest sync point: whatever
            # a job still has to compute lies behind its pause.
            while (name := self._earliest()) is not None:
                if self.hooks.on_waiting is not None:
                    self.hooks.on_waiting({name, *(pause.name for pause in self.paused.values())})
                jobs = sorted(job for job, pause in self.paused.items() if pause.name == name)
                if name in self.blocks:
                    self._end_block(name, jobs)
                    continue
                original = dict(self.layers[name]._parameters)  # for references
                hook = self._begin_use(name, jobs)
                if hook is not None:
                    hook(name, [self._input(job) for job in jobs])
                self._resume(name, jobs, original)
        self.stats.unreached = [name for name in self.layers if name in self.pending]
        return self.stats

    def _earliest(self) -> str | None:
        """Return the next sync point; None at the end of the pass."""
        if not self.pending:
            return None
        mine = min((self.positions[pause.name] for pause in self.paused.values()), default=None)
        position = self.hooks.min_position(mine)
        return None if position is None else self.order[position]

    def _switch(self, job: int, *output: object) -> None:
        """Let a job run until it pauses or ends. Its paused forward returns `output`."""
        pause = self.greenlets[job].switch(*output)
        if not self.greenlets[job].dead:
            self.paused[job] = pause

    def _input(self, job: int) -> LayerInput:
        pause = self.paused[job]
        x: Tensor = pause.args[0] if pause.args else next(iter(pause.kwargs.values()))
        return LayerInput(job, x)

    def _begin_use(self, name: str, jobs: Sequence[int]) -> OnLayer | None:
        """Return the hook for this use of a layer; None if its inputs are late."""
        if name not in self.pending:
            self._count_late(name, jobs)
            return None
        hook = self.hooks.on_later_use if name in self.met else self.hooks.on_layer
        self.met.add(name)
        self.uses_left[name] -= 1
        if self.uses_left[name] == 0:
            self.pending.remove(name)
        return hook

    def _count_late(self, name: str, jobs: Sequence[int]) -> None:
        for job in jobs:
            late = self.stats.late_reference_inputs if job in self.references else self.stats.late_inputs
            late[name] += 1

    def _resume(self, name: str, jobs: Sequence[int], original: dict[str, Any]) -> None:
        """Run the layer's own forward for each job waiting there, and the job up to its next sync point."""
        for job in jobs:
            if not self.pending:  # nothing needs the output
                return
            call = self.paused.pop(job)
            with self.hooks.running(job):
                # The quantized path takes the layer as `on_layer` left it, the full-precision path as it was.
                with _parameters(self.layers[name], original if job in self.references else None):
                    output = self.forwards[name](*call.args, **call.kwargs)
                del call  # frees the input as soon as the job itself drops it
                self._switch(job, output)
                del output

    def _end_block(self, name: str, jobs: Sequence[int]) -> None:
        """Call `on_block_end`, and resume each job with the block's output, old or new."""
        pauses = [(job, self.paused.pop(job)) for job in jobs]
        calls = [BlockCall(job, p.args, _without_caches(p.kwargs), p.output, p.intact) for job, p in pauses]
        outputs: dict[int, Callable[[], Any]] = {call.job: partial(_same, call.output) for call in calls}
        if name in self.pending and self.hooks.on_block_end is not None:
            outputs |= self.hooks.on_block_end(name, calls)
        self.pending.discard(name)
        del calls, pauses  # from here on, only `outputs` and the jobs hold activations
        for job in jobs:
            if not self.pending:
                return
            with self.hooks.running(job):
                self._switch(job, outputs.pop(job)())


def _without_caches(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the cache of keys and values, which a repeated call would fill again."""
    return {key: None if isinstance(value, Cache) else value for key, value in kwargs.items()}


def _same(output: Any) -> Any:
    return output


def _execution_order(layers: list[str], blocks: list[str]) -> list[str]:
    """Sort the sync points: the end of a block comes right after the last of its layers."""
    last = {
        block: max(i for i, name in enumerate(layers) if name.startswith(f"{block}.")) for block in blocks
    }
    keys = {name: (i, 0) for i, name in enumerate(layers)} | {block: (last[block], 1) for block in blocks}
    return sorted(keys, key=keys.__getitem__)


@contextmanager
def _parameters(module: nn.Module, parameters: dict[str, Any] | None) -> Iterator[None]:
    """Give `module` these parameters while entered, if there are any."""
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
def _pausing_forwards(layers: Mapping[str, nn.Module], blocks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Replace the forward of each layer and block by one that pauses; restore the previous forwards on exit.

    Outside of the jobs, for example in `on_block_end`, the forwards run without a pause.
    """
    scheduler = getcurrent()

    def pause_before(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def paused(*args: Any, **kwargs: Any) -> Any:
            if getcurrent() is scheduler:
                return forward(*args, **kwargs)
            # Suspends this job; returns when the scheduler switches back with the layer's output.
            return scheduler.switch(_Pause(name, args, kwargs))

        return paused

    def pause_after(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def paused(*args: Any, **kwargs: Any) -> Any:
            if getcurrent() is scheduler:
                return forward(*args, **kwargs)
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            versions = [tensor._version for tensor in tensors]
            output = forward(*args, **kwargs)
            intact = versions == [tensor._version for tensor in tensors]
            return scheduler.switch(_Pause(name, args, kwargs, output, intact))

        return paused

    with ExitStack() as stack:
        for name, module in layers.items():
            stack.enter_context(forward_replaced(module, pause_before(name, module.forward)))
        for name, module in blocks.items():
            stack.enter_context(forward_replaced(module, pause_after(name, module.forward)))
        yield


@contextmanager
def _ended(greenlets: Sequence[greenlet]) -> Iterator[None]:
    """End every job that is still paused on exit, so that its stack and activations are freed."""
    try:
        yield
    finally:
        for job in greenlets:
            if job:
                job.throw()
