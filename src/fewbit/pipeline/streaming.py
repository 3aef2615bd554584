"""Weights in and out of memory, while the walk goes through a model.

The model is built on the meta device. Its tensors form units: one for each numbered block, one for each
embedding outside of blocks, one for all the rest. A unit is read from the safetensors files when the first
batch comes to one of its modules, and given back when no batch is in it any more. So memory holds the rest,
and one or two blocks.

For a GPU the next block is read into host memory while this one is computed with (`ahead`); a CPU would share its
memory with it, so there memory never holds more than is needed.

Where transformers keeps a tensor as it lies in the file, it is read here; where it merges or splits tensors,
transformers' own conversion is given the unit's tensors alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.file_tensor import FileTensor, check_all_finite
from ..planning import block_of, output_embedding_name
from ..profiling import Profiler
from .malloc import give_freed_memory_back, large_tensors_apart
from .prefetch import Held, ReadAhead, reading_ahead

Restore = Callable[[str], None]
Reading = Callable[[], AbstractContextManager[None]]


REST = ""  # the unit of what lies outside of blocks; it stays in memory


class Weights:
    """A model's weights that are in memory from the start, and stay there."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def load(self, name: str) -> None:
        """Have the unit that the module or parameter `name` belongs to in memory."""

    def release_except(self, names: Collection[str]) -> None:
        """Give back every unit that none of the modules `names` belongs to."""

    def load_all(self) -> None:
        """Have everything in memory from now on."""

    def shard_sizes(self) -> dict[str, int]:
        """Bytes of every unit: here all weights are one, which stays in memory."""
        return {REST: sum(tensor.nbytes for tensor in {*self.model.parameters(), *self.model.buffers()})}

    def pending_bytes(self) -> int:
        """Bytes that will be read at most, beyond what is in memory, at a time."""
        return 0

    def untie(self, name: str) -> None:
        """Give the tied parameter `name` a tensor of its own, with the same values."""
        module, _, key = name.rpartition(".")
        parameter = self.model.get_parameter(name).detach().clone()
        setattr(self.model.get_submodule(module), key, nn.Parameter(parameter, requires_grad=False))

    @contextmanager
    def on_demand(self, restore: Restore, reading: Reading = nullcontext) -> Iterator[None]:
        """While entered, units come by themselves.

        Args:
            restore: called with a unit that was read. reading: gives what is entered for both.
        """
        yield

    def shards(self, without: Collection[str] = ()) -> Iterator[list[str]]:
        """Names of the model's state, part by part; while a part is the current one, it is in memory.

        Args:
            without: tensors that need not be read.
        """
        yield list(self.model.state_dict())


class StreamedWeights(Weights):
    """Weights that are read when they are needed, and given back.

    Args:
        model: on the meta device, but for what is not in the files (buffers that it computes).
        files: every tensor of the source by its name there.
        device: where to read to.
        ahead: whether the next block is read while this one is in use; None: for every device but the CPU.

    Attributes:
        read_bytes: of all units read so far. resident_bytes, peak_bytes: in memory now, and at most so far, on the
            device. prefetched_shards: units that had been read before they were needed.
    """

    def __init__(
        self,
        model: nn.Module,
        files: Mapping[str, FileTensor],
        device: torch.device,
        profiler: Profiler,
        *,
        ahead: bool | None = None,
    ) -> None:
        self.model, self.device = model, device
        self.read_bytes = self.resident_bytes = self.peak_bytes = self.prefetched_shards = 0
        self._reads_ahead = device.type != "cpu" if ahead is None else ahead
        self._ahead: ReadAhead | None = None
        self._files = files
        self._profiler = profiler
        self._restore: Restore | None = None
        self._pinned = False
        _move_computed(model, device)
        state = model.state_dict(keep_vars=True)
        self._names = [name for name, tensor in state.items() if tensor.is_meta]
        self._plain, self._converted = _sources(model, files)
        self._aliases = _aliases(state, {*self._plain, *self._converted})
        self._converted = _with_parts(set(self._names) - {*self._plain, *self._aliases}, self._converted)
        self._embeddings = _embeddings(model)
        modules = {name for name, _ in model.named_modules()}
        self._unit_of = {name: self._unit(self._aliases.get(name, name), modules) for name in self._names}
        self._members: dict[str, list[str]] = {}
        for name in self._names:
            if name not in self._aliases:
                self._members.setdefault(self._unit_of[name], []).append(name)
        self._loaded: dict[str, int] = {}

    def load(self, name: str) -> None:
        """Have the unit that the module or parameter `name` belongs to in memory."""
        units = self._units_at(name)
        for unit in units:
            self._load(unit)

    def release_except(self, names: Collection[str]) -> None:
        """Give back every unit that none of the modules `names` belongs to."""
        if self._pinned:
            return
        kept = {REST}.union(*(self._units_at(name) for name in names))
        gone = [unit for unit in self._loaded if unit not in kept]
        for unit in gone:
            self._release(unit)
        if gone:
            give_freed_memory_back()

    def load_all(self) -> None:
        """Have everything in memory from now on."""
        for unit in self._members:
            self._load(unit)
        self._pinned = True

    def shard_sizes(self) -> dict[str, int]:
        """Bytes of every unit, once it is in memory."""
        return {unit: sum(self._get(name).nbytes for name in names) for unit, names in self._members.items()}

    def pending_bytes(self) -> int:
        """Bytes that will be read at most, beyond what is in memory, at a time: the rest, and two units."""
        units = self.shard_sizes()
        rest = units.pop(REST, 0)
        return max(0, rest + sum(sorted(units.values())[-2:]) - self.resident_bytes)

    def untie(self, name: str) -> None:
        """Give the tied parameter `name` a tensor of its own, with the same values."""
        owner = self._aliases.pop(name, None)
        super().untie(name)
        if owner is None:
            return
        self._plain[name] = self._plain[owner]
        unit = self._unit(name, {module for module, _ in self.model.named_modules()})
        self._unit_of[name] = unit
        self._members.setdefault(unit, []).append(name)

    @contextmanager
    def on_demand(self, restore: Restore, reading: Reading = nullcontext) -> Iterator[None]:
        """While entered, units come by themselves."""
        owners: dict[str, set[str]] = {}
        for name in self._names:
            owners.setdefault(name.rpartition(".")[0], set()).add(self._unit_of[name])
        for unit in self._members:
            if unit != REST:
                owners.setdefault(unit, set()).add(unit)

        def hook(units: Iterable[str]) -> Callable[..., None]:
            def load(module: nn.Module, arguments: Any) -> None:
                with reading():
                    for unit in units:
                        self._load(unit)

            return load

        with ExitStack() as stack:
            stack.enter_context(large_tensors_apart())
            self._restore = restore
            stack.callback(self._forget_restore)
            for name, units in owners.items():
                handle = self.model.get_submodule(name).register_forward_pre_hook(hook(sorted(units)))
                stack.callback(handle.remove)
            if self._reads_ahead:
                self._ahead = stack.enter_context(reading_ahead(pinned=self.device.type == "cuda"))
                stack.callback(self._forget_ahead, self._ahead)
            self._load(REST)
            yield

    def shards(self, without: Collection[str] = ()) -> Iterator[list[str]]:
        """Names of the model's state, part by part; while a part is the current one, it is in memory."""
        units = {name: self._unit_of.get(name, REST) for name in self.model.state_dict()}
        for unit in dict.fromkeys(units.values()):
            self.release_except([])
            self._load(unit, without)
            yield [name for name, of in units.items() if of == unit]
        self.release_except([])

    def _forget_restore(self) -> None:
        self._restore = None

    def _forget_ahead(self, ahead: ReadAhead) -> None:
        self.prefetched_shards += ahead.units
        self._ahead = None

    def _units_at(self, name: str) -> set[str]:
        """The units of a parameter, or of the parameters right in a module, or around it."""
        if name in self._unit_of:
            return {self._unit_of[name]}
        block = block_of(name)
        if block in self._members:
            return {block}
        return {self._unit_of[own] for own in self._names if own.rpartition(".")[0] == name}

    def _unit(self, name: str, modules: Collection[str]) -> str:
        block, module = block_of(name), name.rpartition(".")[0]
        if block != name and block in modules:
            return block
        return module if module in self._embeddings else REST

    def _load(self, unit: str, without: Collection[str] = ()) -> None:
        if unit not in self._loaded:
            with self._profiler.time("load"):
                self._read(unit, without, self._ahead.take(unit) if self._ahead else {})
            self._begin_next(unit)
            if self._restore is not None:
                self._restore(unit)

    def _begin_next(self, unit: str) -> None:
        """Let the block be read that the model comes to after `unit`: it computes in the order of its state."""
        blocks = [name for name in self._members if name != REST and name not in self._embeddings]
        if self._ahead is None or unit in self._embeddings:
            return
        following = blocks[blocks.index(unit) + 1 :] if unit in blocks else blocks
        if following and following[0] not in self._loaded:
            names = self._members[following[0]]
            plain = [self._plain[name] for name in names if name in self._plain]
            merged = [self._files[source] for name in names for source in self._converted.get(name, ())]
            self._ahead.start(following[0], list(dict.fromkeys([*plain, *merged])))

    def _read(self, unit: str, without: Collection[str], held: Held) -> None:
        """Read a unit's tensors, but for those that are `held` in host memory, and put all on the device."""
        members = [name for name in self._members.get(unit, ()) if name not in without]
        for name in members:
            if name in self._plain:
                source, dtype = self._plain[name], self._get(name).dtype
                tensor = held[source].to(self.device, non_blocking=True) if source in held else source[...]
                self._set(name, tensor.to(self.device, dtype))
        self._convert({source for name in members for source in self._converted.get(name, ())}, held)
        tensors = {name: self._get(name) for name in members}
        check_all_finite(tensors)
        self._tie(unit)
        size = sum(tensor.nbytes for tensor in tensors.values())
        self._loaded[unit] = size
        self.read_bytes += size
        self.resident_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.resident_bytes)

    def _convert(self, sources: Collection[str], held: Held) -> None:
        """Let transformers read these tensors of the source, merging and splitting them as it does."""
        if not sources:
            return
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        model: Any = self.model
        conversions = model._weight_conversions
        options = LoadStateDictConfig(device_map={"": self.device}, weight_mapping=conversions)
        tensors = {name: held.get(self._files[name], self._files[name]) for name in sources}
        with quietly():
            convert_and_load_state_dict_in_model(model, tensors, options)
        model._weight_conversions = conversions  # it keeps only those that it has just used

    def _release(self, unit: str) -> None:
        for name in self._members.get(unit, ()):
            self._set(name, torch.empty_like(self._get(name), device="meta"))
        self._tie(unit)
        self.resident_bytes -= self._loaded.pop(unit)

    def _tie(self, unit: str) -> None:
        """Let tied names have the very parameter that they are tied to."""
        for alias, owner in self._aliases.items():
            if self._unit_of[alias] == unit:
                module, _, key = alias.rpartition(".")
                setattr(self.model.get_submodule(module), key, self._get(owner))

    def _get(self, name: str) -> Tensor:
        module, _, key = name.rpartition(".")
        tensor: Tensor = getattr(self.model.get_submodule(module), key)
        return tensor

    def _set(self, name: str, tensor: Tensor) -> None:
        module_name, _, key = name.rpartition(".")
        module = self.model.get_submodule(module_name)
        if key in module._buffers:
            module._buffers[key] = tensor
        else:
            module._parameters[key] = nn.Parameter(tensor, requires_grad=False)


def _sources(
    model: nn.Module, files: Mapping[str, FileTensor]
) -> tuple[dict[str, FileTensor], dict[str, set[str]]]:
    """Parameter → the tensor it is in the files; and parameter → names of all tensors it is converted from."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    any_model: Any = model
    conversions = any_model._weight_conversions or []
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    prefix, state = any_model.base_model_prefix, model.state_dict()
    plain: dict[str, FileTensor] = {}
    converted: dict[str, set[str]] = {}
    for source, tensor in files.items():
        name, pattern = rename_source_key(source, renamings, converters, prefix, state)
        if name not in state and source in state:
            name, pattern = rename_source_key(source, [], [], prefix, state)
        if name not in state:
            continue
        if pattern is None:
            plain[name] = tensor
        else:
            converted.setdefault(name, set()).add(source)
    return plain, converted


def _with_parts(orphans: Collection[str], converted: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Where a tensor of the files is split, only the first part is known by name: others are in its block."""
    blocks: dict[str, set[str]] = {}
    for name, sources in converted.items():
        blocks.setdefault(block_of(name), set()).update(sources)
    parts = {name: blocks[block_of(name)] for name in orphans if block_of(name) in blocks}
    return {**parts, **converted}


def _aliases(state: Mapping[str, Tensor], known: Collection[str]) -> dict[str, str]:
    """Tied name → the name that its parameter has in the files."""
    groups: dict[int, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(id(tensor), []).append(name)
    aliases = {}
    for names in groups.values():
        owner = next((name for name in names if name in known), names[0])
        aliases.update({name: owner for name in names if name != owner})
    return aliases


def _embeddings(model: nn.Module) -> set[str]:
    """Modules outside of blocks that are large and needed only at the beginning or the end."""
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    head = output_embedding_name(model)
    return names | ({head} if head is not None else set())


def _move_computed(model: nn.Module, device: torch.device) -> None:
    """Move what is not in the files and therefore is there already."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None and not tensor.is_meta:
                    tensor.data = tensor.data.to(device)


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' progress bars: one per unit would be too many."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
