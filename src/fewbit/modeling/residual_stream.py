"""Which parameters read and write the residual stream of a decoder, found by one forward pass without weights.

Blocks add their outputs to the residual stream, and read it through a norm: `h + o_proj(attention(norm(h)))`. The pass
runs on the meta device. It tells of every tensor whether it is the stream, the stream behind a norm, the output of a
layer, or none of these. If the stream goes through any operation but the few below, the model is not understood: that
is an error with the name of the operation, never a guess.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import ModelError
from ..torch_internals import TorchDispatchMode, tree_leaves
from .experts import Expert, UnfusedExperts, unfused_modules
from .layers import NEEDS_VALUES, empty_state, forward_replaced, has_plain_forward

_TOKENS = 4
_aten = torch.ops.aten
_ADDITIONS = {_aten.add, _aten.add_}
_MULTIPLICATIONS = {_aten.mul, _aten.mul_}
_PRODUCTS = {_aten.mm, _aten.addmm}
_COPIES = {_aten.alias, _aten.clone, _aten.contiguous, _aten.detach, _aten.to, _aten._to_copy}
# These return their first argument, or some of its tokens, each multiplied by one number at most.
_KEEPING = _COPIES | {
    _aten.div, _aten.div_, _aten.expand, _aten.mul, _aten.mul_, _aten.reshape, _aten.select, _aten.slice,
    _aten.squeeze, _aten.unsqueeze, _aten._unsafe_view, _aten.view,
}  # fmt: skip
_EQUAL = 1e-3  # largest relative difference of equal results in float32


@dataclass(frozen=True)
class Norm:
    """A norm between the residual stream and the layers that read it: `(offset + weight) ∘ x / rms(x) + bias`.

    Attributes:
        parameters: which of "weight" and "bias" it has.
        offset: 0 or 1; 1 without a weight.
        centers: whether it subtracts the mean of x first (LayerNorm).
    """

    parameters: tuple[str, ...] = ()
    offset: float = 1.0
    centers: bool = False


@dataclass
class ResidualStream:
    """Names of the parameters that touch the residual stream.

    Attributes:
        width: Number of features.
        embeddings: Matrices whose rows start the stream.
        norms: Norms that read the stream, by the name of the module.
        reads: Matrix (out, width) → name of the norm through which it reads the stream, or None.
        writes: Matrices (width, in) of layers whose outputs are added to the stream.
    """

    width: int
    embeddings: set[str] = field(default_factory=set)
    norms: dict[str, Norm] = field(default_factory=dict)
    reads: dict[str, str | None] = field(default_factory=dict)
    writes: set[str] = field(default_factory=set)

    @property
    def parameters(self) -> set[str]:
        """All parameters that a rotation of the stream may change, among them biases that do not exist."""
        norms = {f"{name}.{key}" for name, norm in self.norms.items() for key in norm.parameters}
        return {*self.embeddings, *norms, *self.reads, *self.writes, *map(bias_beside, self.writes)}


def bias_beside(weight: str) -> str:
    """The name that the bias of a layer has, given the name of its matrix."""
    return weight.removesuffix("weight") + "bias"


@dataclass(frozen=True)
class _Known:
    """What a tensor holds.

    Attributes:
        kind: the stream; the stream behind the norm `names`; a sum of the outputs of the layers with the matrices
            `names`; the parameter `names`; or its transpose.
    """

    kind: Literal["stream", "normed", "output", "parameter", "transposed"]
    names: frozenset[str] = frozenset()


_STREAM = _Known("stream")


def find_residual_stream(model: nn.Module) -> ResidualStream:
    """Run `model`, which may be on the meta device, once without weights.

    Raises:
        ModelError: something else than layers behind a norm reads or writes the stream, or there is none.
    """
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(embedding, nn.Embedding):
        raise refusal(model, "it has no embedding of tokens")
    trace = _Trace(model, ResidualStream(embedding.embedding_dim))
    empty = empty_state(model)
    for name, _ in model.named_parameters():
        trace.mark(empty[name], _Known("parameter", frozenset([name])))
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    with torch.no_grad(), torch.device("meta"), trace.hooked(), trace:
        try:
            result = functional_call(model, empty, kwargs={"input_ids": ids})
        except ModelError:
            raise
        except NEEDS_VALUES as error:
            reason = str(error).strip().partition("\n")[0]
            raise refusal(model, f"its code looks at values of tensors ({reason})") from error
    return trace.complete(result)


class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Follows the stream through the operations of one forward pass."""

    def __init__(self, model: nn.Module, found: ResidualStream) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.found = found
        self._model = model
        self._inside: list[str] = []  # names of the modules that are running
        self._opaque = 0  # depth of layers, norms and embeddings, whose own operations are not looked at
        self._ran: set[str] = set()
        self._norms: list[str] = []
        self._read_other: set[str] = set()  # matrices of layers whose input is not the stream
        self._used_parameters: set[str] = set()  # without a call of their modules
        self._used_otherwise: dict[str, str] = {}
        self._known: dict[int, tuple[Tensor, _Known]] = {}  # with the tensor, so that its id stays its own

    def known(self, tensor: object) -> _Known | None:
        return self._known.get(id(tensor), (None, None))[1]

    def mark(self, tensor: Tensor, known: _Known | None) -> None:
        if known is None:
            self._known.pop(id(tensor), None)
        else:
            self._known[id(tensor)] = tensor, known

    def refuse(self, reason: str) -> ModelError:
        where = f" in {self._inside[-1]}" if self._inside and self._inside[-1] else ""
        return refusal(self._model, reason + where)

    # Operations outside of layers

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._opaque:
            given = [value for value in tree_leaves([args, kwargs]) if isinstance(value, Tensor)]
            rounds = (kwargs or {}).get("rounding_mode") is not None
            known = self._after(None if rounds else func.overloadpacket, given, result)
            if isinstance(result, Tensor):
                self.mark(result, known)
        return result

    def _after(self, operation: Any, tensors: list[Tensor], result: Any) -> _Known | None:
        """Return what the result of an operation holds."""
        if operation in _MULTIPLICATIONS and self.known(tensors[0]) is None:
            tensors = tensors[::-1]
        states = [self.known(tensor) for tensor in tensors]
        kinds = {state.kind if state else None for state in states}
        if kinds <= {None}:
            return None
        if operation in _ADDITIONS and len(states) == 2 and kinds <= {"stream", "output"}:
            names = frozenset().union(*(state.names for state in states if state))
            if "stream" not in kinds:
                return _Known("output", names)
            self.found.writes |= names
            return _STREAM
        if operation is _aten.t and states[0] and states[0].kind in ("parameter", "transposed"):
            return _Known("transposed" if states[0].kind == "parameter" else "parameter", states[0].names)
        if self._keeps(operation, tensors, states, result):
            return states[0]
        if operation is _aten.embedding and states[0] and result.shape[-1:] == (self.found.width,):
            self.found.embeddings |= states[0].names
            return _STREAM
        if operation in _PRODUCTS:
            x, matrix = states[-2:]
            reads = x is not None and x.kind in ("stream", "normed")
            if x and reads and matrix and matrix.kind == "transposed" and tensors[-1].ndim == 2:
                self._reads(next(iter(matrix.names)), x)
                return None
        if kinds & {"stream", "normed"}:
            if operation in _ADDITIONS:
                raise self.refuse("something that is no layer's output is added to the residual stream")
            raise self.refuse(f"the residual stream goes through the operation {operation}")
        for state in states:
            if state and state.kind == "output":
                self._used_otherwise |= dict.fromkeys(state.names, str(operation))
            elif state:  # also of a bias that is added to a product
                self._used_parameters |= state.names
        return None

    def _keeps(self, operation: Any, tensors: list[Tensor], states: list[_Known | None], result: Any) -> bool:
        """Whether the result holds what the first argument holds."""
        if states[0] is None or not isinstance(result, Tensor) or not result.is_floating_point():
            return False
        if states[0].kind in ("parameter", "transposed"):
            return operation in _COPIES
        scaled = all(tensor.ndim == 0 or tensor.shape[-1] == 1 for tensor in tensors[1:])
        return operation in _KEEPING and scaled and result.shape[-1:] == tensors[0].shape[-1:]

    def _reads(self, matrix: str, x: _Known) -> None:
        norm = next(iter(x.names), None)
        if self.found.reads.setdefault(matrix, norm) != norm:
            raise self.refuse(f"{matrix} reads the residual stream through two norms")

    # Layers, norms and experts

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Watch the modules of the model while entered."""
        with ExitStack() as stack:
            for name, module in self._model.named_modules():
                before = module.register_forward_pre_hook(self._entering(name), with_kwargs=True)
                after = module.register_forward_hook(self._leaving(name), with_kwargs=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
            for name, experts in unfused_modules(self._model).items():
                stack.enter_context(forward_replaced(experts, self._run_experts(name, experts)))
            yield

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._inside.append(name)
            self._ran.add(name)
            opaque = _is_opaque(module, self.known(_input(args, kwargs)))
            if opaque and sum(isinstance(value, Tensor) for value in tree_leaves([args, kwargs])) != 1:
                raise self.refuse("the residual stream and another tensor enter one layer or norm")
            self._opaque += opaque

        return hook

    def _leaving(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            x = self.known(_input(args, kwargs))
            self._inside.pop()
            if not _is_opaque(module, x):
                return
            self._opaque -= 1
            if self._opaque:
                return
            if not isinstance(result, Tensor):
                raise self.refuse(f"{name} returns more than one tensor")
            if isinstance(module, nn.Linear):
                self.mark(result, self._after_layer(f"{name}.weight", module, x))
            else:
                self._norms.append(name)
                self.mark(result, _Known("normed", frozenset([name])))

        return hook

    def _after_layer(self, matrix: str, layer: nn.Linear, x: _Known | None) -> _Known | None:
        if x is not None and x.kind in ("stream", "normed"):
            self._reads(matrix, x)
        else:
            self._read_other.add(matrix)
            self._used_otherwise |= dict.fromkeys(x.names if x else (), "a layer")
        return _Known("output", frozenset([matrix])) if layer.out_features == self.found.width else None

    def _run_experts(self, name: str, experts: UnfusedExperts) -> Callable[..., Tensor]:
        """What stands for the forward of experts, which depends on values: all of them get every token."""

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            known = self.known(x)
            if experts.layout.identities or experts.layout.norm or (known and known.kind == "output"):
                raise self.refuse("experts that are more than feed-forward networks read the residual stream")
            written: set[str] = set()
            for number in range(experts.num_experts):
                expert = experts.expert(number)
                layers = dict(expert.named_children())
                if not isinstance(expert, Expert) or not {"up_proj", "down_proj"} <= layers.keys():
                    raise self.refuse("experts that are no feed-forward networks")
                self._ran |= {f"{name}.{number}.{layer}" for layer in layers}
                for layer in layers.keys() - {"down_proj"}:
                    if known is not None:
                        self._reads(f"{name}.{number}.{layer}.weight", known)
                written.add(f"{name}.{number}.down_proj.weight")
            self._opaque += 1
            result = torch.empty_like(x)
            self._opaque -= 1
            self.mark(result, _Known("output", frozenset(written)))
            return result

        return forward

    def complete(self, result: Any) -> ResidualStream:
        """Return what was found, when the model has returned `result`.

        Raises:
            ModelError: parts of the model did not run, a norm is of another kind, something goes elsewhere too, or the
                model returns the stream.
        """
        found = self.found
        returned = [self.known(value) for value in tree_leaves(result)]
        if any(state and (state.kind != "output" or state.names & found.writes) for state in returned):
            raise refusal(self._model, "it returns the residual stream, without an output layer")
        for name in self._norms:
            module = self._model.get_submodule(name)
            try:
                norm = _probe_norm(module, found.width)
            except NEEDS_VALUES:
                norm = None
            if norm is None:
                reason = f"{name} ({type(module).__name__}) reads the residual stream and is no RMSNorm or LayerNorm"
                raise refusal(self._model, reason)
            found.norms[name] = norm
        for name, module in self._model.named_modules():
            parameters = {f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)}
            if name not in self._ran and parameters - self._used_parameters:
                raise refusal(self._model, f"{name} takes no part in a forward pass over text")
        twice = found.parameters & self._used_parameters | found.reads.keys() & self._read_other
        twice |= found.embeddings & {*found.reads, *found.writes}
        if twice:
            raise refusal(self._model, f"{min(twice)} is used in two ways")
        for name in sorted(found.writes & self._used_otherwise.keys()):
            use = self._used_otherwise[name]
            raise refusal(
                self._model, f"the output of {name} is used by {use}, not only by the residual stream"
            )
        if not found.writes or not found.reads:
            raise refusal(self._model, "no layer adds its output to the embeddings")
        return found


def _input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _is_opaque(module: nn.Module, x: _Known | None) -> bool:
    """Whether the operations inside a module are not looked at, given what its input is."""
    if isinstance(module, nn.Linear):
        return has_plain_forward(module)
    return x is _STREAM and not list(module.children()) and _is_norm_like(module)


def _is_norm_like(module: nn.Module) -> bool:
    return bool(list(module.parameters())) or "norm" in type(module).__name__.lower()


def _probe_norm(module: nn.Module, width: int) -> Norm | None:
    """Find out by small numbers which norm `module` is; None if it is neither an RMSNorm nor a LayerNorm.

    A reflection of the input must reflect the output: any reflection for an RMSNorm, one that keeps the mean for a
    LayerNorm. The weight must multiply the output, and the bias be added to it.
    """
    names = tuple(name for name, _ in module.named_parameters())
    if not {"weight", "bias"}.issuperset(names) or list(module.buffers()):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, width, generator=generator)
    weight, bias, y = torch.randn(3, width, generator=generator).unbind()
    none = torch.zeros(width)
    for offset in (0.0, 1.0) if "weight" in names else (1.0,):
        unit = torch.full((width,), 1 - offset)
        plain = _with_parameters(module, unit, none)(x)
        expected = plain * (offset + weight if "weight" in names else 1) + (bias if "bias" in names else 0)
        if not _close(_with_parameters(module, weight, bias)(x), expected):
            continue
        for centers, normal in ((False, y), (True, y - y.mean())):
            mirror = torch.eye(width) - 2 * torch.outer(normal, normal) / (normal @ normal)
            if _close(_with_parameters(module, unit, none)(x @ mirror), plain @ mirror):
                return Norm(names, offset, centers)
    return None


def _with_parameters(module: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    """Return a copy of a norm with other parameters, and without hooks."""
    small, given = copy.copy(module), {"weight": weight, "bias": bias}
    parameters = {
        key: None if old is None else nn.Parameter(given[key], requires_grad=False)
        for key, old in module._parameters.items()
    }
    small.__dict__ = {
        **module.__dict__,
        "_parameters": parameters,
        "_forward_hooks": {},
        "_forward_pre_hooks": {},
    }
    return small


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and float((a - b).norm()) <= _EQUAL * float(b.norm())


def refusal(model: nn.Module, reason: str) -> ModelError:
    """The error of a model that cannot be rotated."""
    return ModelError(f"{type(model).__name__} cannot be rotated: {reason}; leave rotate out")
