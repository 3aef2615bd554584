"""Weights in and out of memory during the pass through a model.

The model is built on the meta device. Its tensors are divided into shards: one for each numbered block, one for each
embedding outside of blocks, and one for everything else. A shard is read from the safetensors files when the first
batch reaches one of its modules, and released when no batch is in it any more. So memory holds the tensors outside of
blocks and one or two blocks.

For a GPU the next block is read into host memory while the device computes with the current one (`prefetch`). A CPU
would share its memory with the prefetched block, so there nothing is prefetched.

A tensor that transformers keeps as it is in the file is read here. Where transformers merges or splits tensors, its own
conversion gets the tensors of one shard.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoint.safetensors_file import FileTensor, check_all_finite
from ..modeling.experts import UnfusedExperts, unfused_modules
from ..modeling.residual_stream import find_residual_stream, refusal
from ..modeling.rotation import norm_with_zeros, rotated, stream_like
from ..modeling.source import without_progress_bars
from ..planning import block_of, output_embedding_name
from ..profiling import Profiler
from ..transformers_internals import WeightNames, conversions, load_converted
from .allocator import own_pages_for_large_tensors, release_freed_memory
from .prefetch import HostTensors, Prefetcher

Restore = Callable[[str], None]
Reading = Callable[[], AbstractContextManager[None]]

REST = ""  # name of the shard outside of blocks, which stays in memory


class Weights:
    """Weights of a model that is in memory as a whole.

    Attributes:
        unused: Tensors of the source that the model has no parameter for, by their names in the files, such as the
            layers for multi-token prediction. The checkpoint gets a copy.
        stored_dtypes: Dtypes in the checkpoint of the state that the model computes with in another one.
        untied: Names of parameters that share their values with another one in the source, and no longer do.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.unused: dict[str, FileTensor] = {}
        self.stored_dtypes: Mapping[str, torch.dtype] = {}
        self.untied: set[str] = set()
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def load(self, name: str) -> None:
        """Read the shard of the module or parameter `name` if it is not in memory."""

    def release_except(self, names: Collection[str]) -> None:
        """Release every shard that holds none of the modules `names`."""

    def load_all(self) -> None:
        """Read everything and keep it in memory."""

    def shard_sizes(self) -> dict[str, int]:
        """Return the bytes of every shard: here one shard, which stays in memory."""
        return {REST: sum(tensor.nbytes for tensor in {*self.model.parameters(), *self.model.buffers()})}

    def pending_bytes(self) -> int:
        """Return an upper bound on the bytes that will be in memory beyond those that already are."""
        return 0

    def untie(self, name: str) -> None:
        """Give the tied parameter `name` its own tensor with the same values."""
        module, _, key = name.rpartition(".")
        parameter = self.model.get_parameter(name).detach().clone()
        setattr(self.model.get_submodule(module), key, nn.Parameter(parameter, requires_grad=False))

    def tied_vectors(self) -> list[str]:
        """Return the names of tied parameters that are no matrices, such as the biases of output layers.

        A model whose embeddings are not tied ties none of them either.
        """
        tied = getattr(self.model, "all_tied_weights_keys", {})
        return [name for name in tied if self.model.get_parameter(name).ndim == 1]

    @contextmanager
    def on_demand(self, restore: Restore, reading: Reading = nullcontext) -> Iterator[None]:
        """Load shards when the forward pass reaches them, while entered.

        `restore` is called with the name of each shard that was read, inside a context that `reading` returns.
        """
        yield

    def state_by_shard(self) -> list[list[str]]:
        """Return the names of the model's state, shard by shard."""
        return [list(self.model.state_dict())]

    def shards(self, without: Collection[str] = ()) -> Iterator[list[str]]:
        """Yield the names of the model's state, shard by shard, each in memory except for the tensors `without`."""
        yield from self.state_by_shard()


class StreamedWeights(Weights):
    """Weights that are read when they are needed, and released afterwards.

    Args:
        model: Model on the meta device, except for buffers that it computes and that are not in the files.
        files: Every tensor of the source by its name there.
        device: Device to read to.
        profiler: Gets the seconds of reading, as "load".
        stored_dtypes: See `Weights`; None if there are none.

    Attributes:
        read_bytes: Bytes of all shards read so far.
        resident_bytes: Bytes in memory on the device.
        peak_bytes: Maximum of `resident_bytes` so far.
        prefetched_shards: Number of shards that were read before they were needed.
    """

    def __init__(
        self,
        model: nn.Module,
        files: Mapping[str, FileTensor],
        device: torch.device,
        profiler: Profiler,
        stored_dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        self.model, self.device = model, device
        self.stored_dtypes, self.untied = stored_dtypes or {}, set()
        self.read_bytes = self.resident_bytes = self.peak_bytes = self.prefetched_shards = 0
        self._prefetches = device.type != "cpu"
        self._prefetcher: Prefetcher | None = None
        self._files = files
        self._profiler = profiler
        self._restore: Restore | None = None
        self._keeps_all = False
        _move_computed(model, device)
        state = model.state_dict(keep_vars=True)
        self._names = [name for name, tensor in state.items() if tensor.is_meta]
        self._experts = {
            name: module for name, module in unfused_modules(model).items() if module.stored_fused
        }
        self._fused = {
            f"{name}.{own}": f"{name}.{fused}"
            for name, module in self._experts.items()
            for own, fused in module.sources().items()
        }
        with _fused_for_loading(self._experts.values()):
            self._plain, self._converted, self.unused = _sources(model, files)
        self._aliases = _aliases(state, {*self._plain, *self._converted})
        orphans = set(self._names) - {*self._plain, *self._aliases, *self._fused}
        self._converted = _with_split(orphans, self._converted)
        self._embeddings = _embeddings(model)
        self._modules = {name for name, _ in model.named_modules()}
        self._shard_of = {name: self._shard(self._aliases.get(name, name)) for name in self._names}
        self._members: dict[str, list[str]] = {}
        for name in self._names:
            if name not in self._aliases:
                self._members.setdefault(self._shard_of[name], []).append(name)
        self._loaded: dict[str, int] = {}

    def load(self, name: str) -> None:
        for shard in self._shards_at(name):
            self._load(shard)

    def release_except(self, names: Collection[str]) -> None:
        if self._keeps_all:
            return
        kept = {REST}.union(*(self._shards_at(name) for name in names))
        unused = [shard for shard in self._loaded if shard not in kept]
        for shard in unused:
            self._release(shard)
        if unused:
            release_freed_memory()

    def load_all(self) -> None:
        for shard in self._members:
            self._load(shard)
        self._keeps_all = True

    def shard_sizes(self) -> dict[str, int]:
        return {
            shard: sum(self._get(name).nbytes for name in names) for shard, names in self._members.items()
        }

    def pending_bytes(self) -> int:
        """Return the bytes of the shard outside of blocks and of the two largest others, less those in memory."""
        sizes = self.shard_sizes()
        rest = sizes.pop(REST, 0)
        return max(0, rest + sum(sorted(sizes.values())[-2:]) - self.resident_bytes)

    def untie(self, name: str) -> None:
        owner = self._aliases.pop(name, None)
        super().untie(name)
        if owner is None:
            return
        self._plain[name] = self._plain[owner]
        self._shard_of[name] = shard = self._shard(name)
        self._members.setdefault(shard, []).append(name)

    def tied_vectors(self) -> list[str]:
        tied = getattr(self.model, "all_tied_weights_keys", {})
        return [n for n in self._aliases if n in {*tied, *tied.values()} and self._get(n).ndim == 1]

    def rotate(self, seed: int) -> None:
        """Rotate the residual stream of the model: its tensors are rotated while they are read.

        A layer that shares its matrix with the embeddings gets its own.

        Raises:
            ModelError: the stream is not understood, or its tensors are not one by one in the files; nothing changed.
        """
        stream = find_residual_stream(self.model)
        if unused := stream_like(self.model, self.unused, stream.width):
            raise refusal(self.model, f"it does not run {unused[0]}, which may read the stream")
        names = [name for name in self._names if name in stream.parameters]
        for name in names:
            if self._aliases.get(name, name) not in self._plain:
                raise refusal(self.model, f"{name} is no tensor of its own in the files")
        if norm := norm_with_zeros(stream, self._plain):
            raise refusal(self.model, f"{norm} has weights of 0 and a bias")
        shared = [
            name
            for name, owner in self._aliases.items()
            if {name, owner} & stream.parameters and self._module(name) is not self._module(owner)
        ]
        for name in (*shared, *(self.tied_vectors() if shared else ())):
            self.untie(name)
            self.untied.add(name)
        if self.untied and isinstance(self.model, PreTrainedModel):
            self.model.config.tie_word_embeddings = False
        self._plain |= rotated(stream, self._plain, {name: self._get(name).dtype for name in names}, seed)

    @contextmanager
    def on_demand(self, restore: Restore, reading: Reading = nullcontext) -> Iterator[None]:
        owners: dict[str, set[str]] = {}
        for name in self._names:
            owners.setdefault(name.rpartition(".")[0], set()).add(self._shard_of[name])
        for shard in self._members:
            if shard != REST:
                owners.setdefault(shard, set()).add(shard)

        def hook(shards: Iterable[str]) -> Callable[..., None]:
            def load(module: nn.Module, arguments: Any) -> None:
                with reading():
                    for shard in shards:
                        self._load(shard)

            return load

        with ExitStack() as stack:
            stack.enter_context(own_pages_for_large_tensors())
            self._restore = restore
            stack.callback(setattr, self, "_restore", None)
            for name, shards in owners.items():
                handle = self.model.get_submodule(name).register_forward_pre_hook(hook(sorted(shards)))
                stack.callback(handle.remove)
            for name in self._embeddings:
                if name in self._members and hasattr(self.model.get_submodule(name), "weight"):
                    module = self.model.get_submodule(name)
                    stack.enter_context(_load_when_read(module, partial(self._load, name)))
            if self._prefetches:
                thread = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="fewbit-prefetch"))
                self._prefetcher = Prefetcher(thread, pinned=self.device.type == "cuda")
                stack.callback(self._prefetcher.cancel)
                stack.callback(setattr, self, "_prefetcher", None)
            self._load(REST)
            yield

    def state_by_shard(self) -> list[list[str]]:
        shards: dict[str, list[str]] = {}
        for name in self.model.state_dict():
            shards.setdefault(self._shard_of.get(name, REST), []).append(name)
        return list(shards.values())

    def shards(self, without: Collection[str] = ()) -> Iterator[list[str]]:
        for names in self.state_by_shard():
            self.release_except([])
            self._load(self._shard_of.get(names[0], REST), without)
            yield names
        self.release_except([])

    def _shards_at(self, name: str) -> set[str]:
        """Find the shards of a parameter, of the parameters directly in a module, or of the block around it."""
        if name in self._shard_of:
            return {self._shard_of[name]}
        block = block_of(name)
        if block in self._members:
            return {block}
        return {self._shard_of[own] for own in self._names if own.rpartition(".")[0] == name}

    def _shard(self, name: str) -> str:
        block, module = block_of(name), name.rpartition(".")[0]
        if block != name and block in self._modules:
            return block
        return module if module in self._embeddings else REST

    def _load(self, shard: str, without: Collection[str] = ()) -> None:
        if shard not in self._loaded:
            with self._profiler.time("load"):
                prefetched = self._prefetcher.take(shard) if self._prefetcher else {}
                self.prefetched_shards += bool(prefetched)
                self._read(shard, without, prefetched)
            self._prefetch_after(shard)
            if self._restore is not None:
                self._restore(shard)

    def _prefetch_after(self, shard: str) -> None:
        """Prefetch the block that follows `shard` in the order of the model's state."""
        blocks = [name for name in self._members if name != REST and name not in self._embeddings]
        if self._prefetcher is None or shard in self._embeddings:
            return
        following = blocks[blocks.index(shard) + 1 :] if shard in blocks else blocks
        if following and following[0] not in self._loaded:
            names = self._with_fused(self._members[following[0]])
            plain = [self._plain[name] for name in names if name in self._plain]
            merged = [self._files[source] for name in names for source in self._converted.get(name, ())]
            self._prefetcher.start(following[0], list(dict.fromkeys([*plain, *merged])))

    def _read(self, shard: str, without: Collection[str], prefetched: HostTensors) -> None:
        """Put a shard's tensors on the device, from host memory if they are `prefetched`, else from the files."""
        members = [name for name in self._members.get(shard, ()) if name not in without]
        fused = [name for name in self._with_fused(members) if name not in self._members[shard]]
        experts = [
            module for name, module in self._experts.items() if any(f.startswith(f"{name}.") for f in fused)
        ]
        with _fused_for_loading(experts):
            for name in (*members, *fused):
                if name in self._plain:
                    source, dtype = self._plain[name], self._get(name).dtype
                    tensor = prefetched.get(source)
                    tensor = source[...] if tensor is None else tensor.to(self.device, non_blocking=True)
                    self._set(name, tensor.to(self.device, dtype))
            sources = {source for name in (*members, *fused) for source in self._converted.get(name, ())}
            if sources:
                with without_progress_bars():
                    files = {name: prefetched.get(self._files[name], self._files[name]) for name in sources}
                    load_converted(self.model, files, self.device)
        tensors = {name: self._get(name) for name in members}
        for name in (
            tensors.keys() & self.stored_dtypes.keys()
        ):  # compute with the values that the checkpoint gets
            tensors[name].data.copy_(tensors[name].to(self.stored_dtypes[name]))
        check_all_finite(tensors)
        self._tie(shard)
        size = sum(tensor.nbytes for tensor in tensors.values())
        self._loaded[shard] = size
        self.read_bytes += size
        self.resident_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.resident_bytes)

    def _with_fused(self, names: Iterable[str]) -> list[str]:
        """Add the fused parameters that the files hold in place of single experts."""
        names = list(names)
        return list(dict.fromkeys([*names, *(self._fused[name] for name in names if name in self._fused)]))

    def _release(self, shard: str) -> None:
        for name in self._members.get(shard, ()):
            self._set(name, torch.empty_like(self._get(name), device="meta"))
        self._tie(shard)
        self.resident_bytes -= self._loaded.pop(shard)

    def _tie(self, shard: str) -> None:
        """Give tied names the same parameter object as the name that they are tied to."""
        for alias, owner in self._aliases.items():
            if self._shard_of[alias] == shard:
                module, _, key = alias.rpartition(".")
                setattr(self.model.get_submodule(module), key, self._get(owner))

    def _module(self, name: str) -> nn.Module:
        return self.model.get_submodule(name.rpartition(".")[0])

    def _get(self, name: str) -> Tensor:
        module, key = self._module(name), name.rpartition(".")[2]
        tensor = module._buffers[key] if key in module._buffers else module._parameters[key]
        assert tensor is not None
        return tensor

    def _set(self, name: str, tensor: Tensor) -> None:
        module, key = self._module(name), name.rpartition(".")[2]
        if key in module._buffers:
            module._buffers[key] = tensor
        else:
            module._parameters[key] = nn.Parameter(tensor, requires_grad=False)


@contextmanager
def _fused_for_loading(experts: Iterable[UnfusedExperts]) -> Iterator[None]:
    with ExitStack() as stack:
        for module in experts:
            stack.enter_context(module.fused_for_loading())
        yield


def _sources(
    model: nn.Module, files: Mapping[str, FileTensor]
) -> tuple[dict[str, FileTensor], dict[str, set[str]], dict[str, FileTensor]]:
    """Map parameters to their tensors in the files, or to the names of all tensors they are converted from.

    The third result is the tensors that belong to no parameter.
    """
    assert isinstance(model, PreTrainedModel)
    names = WeightNames(model, conversions(model) or [])
    state = model.state_dict()
    plain: dict[str, FileTensor] = {}
    converted: dict[str, set[str]] = {}
    unused: dict[str, FileTensor] = {}
    for source, tensor in files.items():
        name, merged_into = names.rename(source)
        if name not in state:
            unused[source] = tensor
        elif merged_into:
            converted.setdefault(name, set()).add(source)
        else:
            plain[name] = tensor
    return plain, converted, unused


def _with_split(orphans: Collection[str], converted: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Add the sources of `orphans`: where a tensor of the files is split, only its first part is known by name."""
    blocks: dict[str, set[str]] = {}
    for name, sources in converted.items():
        blocks.setdefault(block_of(name), set()).update(sources)
    parts = {name: blocks[block_of(name)] for name in orphans if block_of(name) in blocks}
    return {**parts, **converted}


def _aliases(state: Mapping[str, Tensor], known: Collection[str]) -> dict[str, str]:
    """Map each tied name to the name that its parameter has in the files."""
    groups: dict[int, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(id(tensor), []).append(name)
    aliases = {}
    for names in groups.values():
        owner = next((name for name in names if name in known), names[0])
        aliases.update({name: owner for name in names if name != owner})
    return aliases


def _embeddings(model: nn.Module) -> set[str]:
    """Find the modules outside of blocks that are large and needed only at the beginning or the end."""
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    head = output_embedding_name(model)
    return names | ({head} if head is not None else set())


@contextmanager
def _load_when_read(module: nn.Module, load: Callable[[], None]) -> Iterator[None]:
    """Call `load` whenever the model reads ``module.weight``, which some do without a call of the module."""

    loading = False

    def weight(self: nn.Module) -> Tensor | None:
        nonlocal loading
        if not loading:  # transformers' conversion reads the weight that it is to replace
            loading = True
            try:
                load()
            finally:
                loading = False
        return self._parameters["weight"]

    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"weight": property(weight)})
    try:
        yield
    finally:
        module.__class__ = kind


def _move_computed(model: nn.Module, device: torch.device) -> None:
    """Move the tensors that are not in the files, and that the model has therefore computed already."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None and not tensor.is_meta:
                    tensor.data = tensor.data.to(device)
